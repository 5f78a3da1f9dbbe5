"""The only module that imports Triton, so that the kernels' modules import without it (macOS, Windows).

Kernels use `from .triton_language import tl, triton`. Without Triton all names are stand-ins under which decorated
kernels can be defined but not launched, and `AVAILABLE` is false: nothing registers a `triton` implementation then.
"""

from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    AVAILABLE = True
except ImportError:

    class _Missing:
        """Returns itself for every attribute and call; as a decorator it returns the decorated function."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **options: Any) -> Any:
            return args[0] if args and callable(args[0]) else self

    triton = tl = TensorDescriptor = _Missing()
    AVAILABLE = False

__all__ = ["AVAILABLE", "TensorDescriptor", "tl", "triton"]
