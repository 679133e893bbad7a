"""What the options before the command say, for every command."""

from pathlib import Path


class State:
    """Filled before the command runs."""

    config: Path | None = None
    debug: bool = False
