"""The user interfaces: the Python API and the command line."""
