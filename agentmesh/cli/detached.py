"""What `agentmesh run --detach` leaves behind: `python -m agentmesh.cli.detached`, told what to do as child.py is."""

import sys

from agentmesh.cli.run import keep_worker
from agentmesh.runtime.process_exit import skip_final_collection
from agentmesh.worker.asyncio_worker import take_spec

if __name__ == "__main__":
    skip_final_collection()
    sys.exit(keep_worker(take_spec()))
