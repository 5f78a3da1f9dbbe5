"""One operation, one file; each with its reference, its implementations and one public function."""

from .dispatch import backend

__all__ = ["backend"]
