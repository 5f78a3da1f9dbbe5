"""The roofline of a known device: the least time that work can take there, projected and labelled so.

    seconds >= max(operations / rate[dtype], bytes / bandwidth)

Source: Williams et al. 2009; the figures of the devices stand in `kernels/devices.py`.
"""

from dataclasses import replace

from ..kernels.devices import Device, DeviceError
from .record import Record


def roofline_seconds(device: Device, *, flops: float, bytes: float, dtype: str) -> float:
    """The least time the device can take, in seconds: projected, never measured.

    flops: operations in `dtype` ("float32", "float16", "bfloat16", "int8"); bytes: moved to and from its memory.
    Raises DeviceError when the device has no rate for the dtype.
    """
    if dtype not in device.flops:
        raise DeviceError(f"{device.name} has no tensor cores for {dtype}; choose one of {', '.join(device.flops)}")
    return max(flops / device.flops[dtype], bytes / device.bandwidth)


def project(record: Record, device: Device) -> Record:
    """What the roofline of `device` says about a measured kernel: a record of kind "projected", and labelled so.

    record: a measurement whose values hold `flops` and `bytes` and whose case holds `dtype`, as `run_kernels` makes
    them. Raises DeviceError when the device has no rate for the dtype.
    """
    flops, moved = record.values["flops"], record.values["bytes"]
    seconds = roofline_seconds(device, flops=flops, bytes=moved, dtype=record.case["dtype"])
    values = {"median_s": seconds, "flops": flops, "bytes": moved, "source": device.source}
    subject = f"roofline of {device.name}"
    case = {**record.case, "device": device.name}
    return replace(record, subject=subject, case=case, values=values, kind="projected", machine={})
