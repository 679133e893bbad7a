"""What `agentmesh run --detach` leaves behind: `python -m agentmesh.cli.detached SPEC`."""

import json
import sys

from agentmesh.cli.run import keep_worker

if __name__ == "__main__":
    sys.exit(keep_worker(json.loads(sys.argv[1])))
