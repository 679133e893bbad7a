"""What the options before the command say, for every command."""

from pathlib import Path


class Options:
    """Filled before the command runs."""

    config: Path | None = None
    debug: bool = False
