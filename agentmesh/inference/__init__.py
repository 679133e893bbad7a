"""The engine that answers many prompts in shared batches, on a GPU or a CPU; torch and transformers live here."""

import os

# OpenMP reads this when torch is imported. On two cores that others use too, threads that spin while they wait for each
# other made a step three to ten times as slow; with threads that sleep the fastest of sixty steps was no slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
