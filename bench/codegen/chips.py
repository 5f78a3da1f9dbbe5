"""The products for which times are projected; their peak rates are in `kernels/devices.py`."""

from dataclasses import dataclass

from ...kernels.devices import Device, device_named
from ..core.roofline import least_seconds


@dataclass(frozen=True)
class Gpu:
    """A product for which times are projected. name: in the tables; sm: its target, 90 for sm_90."""

    name: str
    device: Device
    sm: int

    @property
    def peaks(self) -> dict[str, float]:
        """FLOP/s of dense matrix products by dtype; float32 runs as tf32, at half the rate of bfloat16."""
        flops = self.device.flops
        return {
            **{dtype: flops[dtype] for dtype in ("bfloat16", "float16", "int8", "fp8") if dtype in flops},
            "float32": flops["bfloat16"] / 2,
        }

    def least_seconds(self, flops: float, bytes: float, dtype: str) -> tuple[float, str]:
        """The least time of this work on the product, in seconds, and its limit: "memory" or "compute"."""
        return least_seconds(flops, bytes, self.peaks[dtype], self.device.bandwidth)


GPUS = (
    Gpu("H100 SXM", device_named("H100 SXM"), 90),
    Gpu("A100 SXM", device_named("A100 80GB SXM"), 80),
    Gpu("RTX 5090", device_named("RTX 5090"), 120),
    Gpu("RTX 4090", device_named("RTX 4090"), 89),
    Gpu("RTX 3090", device_named("RTX 3090"), 86),
    Gpu("RTX 4060", device_named("RTX 4060 8GB"), 89),
)
