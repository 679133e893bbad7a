"""Documents in, quoted passages out. Knows nothing of journals, models or Celery."""

from importlib import import_module

from agentmesh.errors import ExtraMissing

try:
    import_module("numpy")  # every room here has vectors, and whichever is entered first says what is missing
except ImportError as e:
    raise ExtraMissing(
        f"documents and vectors need {e.name}, which is not installed: pip install 'agentmesh-celery[rag]'"
    ) from None
