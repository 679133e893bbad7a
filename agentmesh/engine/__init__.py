"""What carries runs forward: replay, plan, execute, commit. Knows no Celery, no Redis and no model."""
