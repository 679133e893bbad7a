"""The options that stand before the command, for every command."""

from pathlib import Path


class Options:
    """Set before the command runs."""

    config: Path | None = None
    debug: bool = False
