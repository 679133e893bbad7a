"""Where events live: the protocol as pure functions, and the journals that keep it."""
