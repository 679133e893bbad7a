"""The only rooms that know Celery; importing this package loads nothing of it."""
