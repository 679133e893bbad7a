"""What brings a crew up on this machine: crew files, the embedded Valkey, and the worker thread behind `run()`."""
