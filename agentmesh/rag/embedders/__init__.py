"""The kinds of embedders, one a file; none imports another."""
