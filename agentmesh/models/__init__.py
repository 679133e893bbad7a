"""Models: messages in, message out (or tokens). One adapter a file; none imports another."""
