"""The step of the online softmax that the Triton kernels of attention share.

Source: Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from .triton_language import tl, triton


@triton.jit
def weigh(scores, row_max, row_sum):  # type: ignore[no-untyped-def]
    """One step of the online softmax: (weights of these scores, factor for the sums so far, new maximum, new sum)."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    weights = tl.exp2(scores - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    return weights, decay, new_max, row_sum * decay + tl.sum(weights, 1)
