"""The steps of an ingest: plan, parse, embed, index."""
