"""What `agentmesh run --detach` leaves behind: `python -m agentmesh.cli.detached`, told what to do as child.py is."""

import sys

from agentmesh.cli.child import taken_spec
from agentmesh.cli.exits import end_quickly
from agentmesh.cli.run import keep_worker

if __name__ == "__main__":
    end_quickly()
    sys.exit(keep_worker(taken_spec()))
