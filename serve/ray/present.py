"""The names of the replicas that this process may call; see `router`."""

names: tuple[str, ...] = ()
