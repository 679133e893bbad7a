"""Documents in, quoted passages out. Knows nothing of journals, models or Celery."""
