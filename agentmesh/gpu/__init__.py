"""GPU-bound inference: the room for the batching engine. torch and transformers live here and in models.local alone."""
