"""Model files on this machine: the cache, downloads, and GGUF conversion. Standard library only where a run needs it."""
