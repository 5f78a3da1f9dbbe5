"""The roofline: the time below which no kernel can do its work on a machine.

    least seconds = max(FLOPs / peak rate, bytes / memory bandwidth)

Source: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model".
"""


def least_seconds(flops: float, bytes: float, rate: float | None, bandwidth: float) -> tuple[float, str]:
    """Least seconds and what sets them, "compute" or "memory".

    rate: FLOP/s, None where it is not known, which leaves the limit of memory; bandwidth: bytes/s.
    """
    compute = flops / rate if rate else 0.0
    memory = bytes / bandwidth
    return max(compute, memory), "compute" if compute > memory else "memory"
