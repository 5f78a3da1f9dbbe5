"""The roofline: the least time of a kernel on a machine.

    least seconds = max(FLOPs / peak rate, bytes / memory bandwidth)

Source: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model".
"""


def least_seconds(flops: float, bytes: float, rate: float | None, bandwidth: float) -> tuple[float, str]:
    """Least seconds and their limit, "compute" or "memory".

    rate: FLOP/s, None if unknown, so that only memory limits; bandwidth: bytes/s.
    """
    compute = flops / rate if rate else 0.0
    memory = bytes / bandwidth
    return max(compute, memory), "compute" if compute > memory else "memory"
