"""An OpenAI-compatible endpoint over a mesh: each request is a run."""
