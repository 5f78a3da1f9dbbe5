"""One operation, one file; each with its reference, its implementations and one public function."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dispatch import backend

__all__ = ["backend"]


def __getattr__(name: str) -> Any:
    # Deferred, because it imports torch, which the command line's help and errors do not need.
    if name != "backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .dispatch import backend

    return backend
