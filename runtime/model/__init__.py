"""The network: its configuration, its checkpoints, and its modules."""
