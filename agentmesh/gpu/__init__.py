"""The engine that answers many prompts in shared batches, on a GPU or a CPU; torch and transformers live here."""
