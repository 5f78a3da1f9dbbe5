"""Counters in memory of the GPU, by which the last block of a launch to finish a step finds out that it is the last.

Each block writes its results and increments a counter; the one that makes it full reads the results of all others and
sets the counter back to zero, so the next launch, or the replay of a CUDA graph, finds zeros.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .triton_language import tl, triton

_FEWEST = 512
_counters: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def counters_of(owner: Tensor, count: int) -> Tensor:
    """At least `count` counters for launches that use the tensor `owner`: int32 zeros on its device.

    Each tensor has its own, so that launches that use different tensors may run at the same time. They live as long as
    the tensor, because CUDA graphs refer to them by address.
    """
    held = _counters.setdefault(owner, [])
    for counters in held:
        if len(counters) >= count:
            return counters
    counters = torch.zeros(max(_FEWEST, 1 << (count - 1).bit_length()), dtype=torch.int32, device=owner.device)
    if not (owner.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        held.append(counters)  # a capture writes the zeros only when the graph is replayed
    return counters


@triton.jit
def is_last(counter, count):  # type: ignore[no-untyped-def]
    """Whether this block is the last of `count` blocks to call this with `counter`, and so sees what all of them have
    written. The others' results must be loaded past the L1 cache (".cg")."""
    tl.debug_barrier()  # every thread's results are written before one of them increments the counter
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter, 0)
    return last
