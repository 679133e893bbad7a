"""What a `crew.py` declares: agents, tools, steps, queues, limits, schedules, and the crew that names them all."""
