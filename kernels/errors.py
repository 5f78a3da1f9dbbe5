"""The base of every error that afnext raises on purpose."""


class AfnextError(Exception):
    """Something the caller can act on: the message says what was wrong and what to do about it."""


class BackendError(AfnextError):
    """A backend was asked for that does not exist, or that has no implementation of an operation."""
