"""Retrieval: documents are loaded, chunked, embedded and stored, and passages are found. Knows no journal and no Celery."""

from importlib import import_module

from agentmesh.errors import ExtraMissing

try:
    import_module("numpy")  # every module here needs it: the first import reports what is missing
except ImportError as e:
    raise ExtraMissing(
        f"documents and vectors need {e.name}, which is not installed", hint="pip install 'agentmesh-celery[rag]'"
    ) from None
