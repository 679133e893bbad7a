"""Logs, metrics and traces: observers of steps and runs. The engine knows none of them."""
