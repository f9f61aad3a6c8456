"""Celery tasks, the supervisor of a job's process, and the engine that process runs."""
