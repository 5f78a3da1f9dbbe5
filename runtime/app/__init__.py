"""What people touch: the Python API and the command line."""
