"""The base of every error that afnext raises on purpose."""


class AfnextError(Exception):
    """An error that the caller can act on: the message says what was wrong and what to do about it."""


class BackendError(AfnextError):
    """The requested backend does not exist or has no implementation of an operation."""
