"""Worker processes and their supervisor: what `agentmesh worker` starts, watches and starts again."""
