"""The command line. Commands import what they need when they run: `--help` must be quick."""
