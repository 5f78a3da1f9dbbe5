"""The roofline of known devices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afnext.bench.record import Record
from afnext.bench.roofline import project, roofline_seconds
from afnext.kernels.devices import DeviceError, device_named


def test_decoding_on_an_h100_is_bound_by_memory_and_prefill_by_compute() -> None:
    h100 = device_named("H100 SXM")
    # 16.5 GB of weights read once: 4.9 ms at 3.35 TB/s; 1024 tokens through 7.6 B parameters: 15.7 ms at 989 TFLOP/s.
    assert roofline_seconds(h100, flops=15.2e9, bytes=16.5e9, dtype="bfloat16") == pytest.approx(4.93e-3, rel=0.01)
    assert roofline_seconds(h100, flops=1024 * 15.2e9, bytes=16.5e9, dtype="bfloat16") == pytest.approx(
        15.73e-3, rel=0.01
    )


def test_a_dtype_without_tensor_cores_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"T4 .* bfloat16.*float16"):
        roofline_seconds(device_named("T4"), flops=1, bytes=1, dtype="bfloat16")


@given(st.floats(0, 1e18), st.floats(0, 1e15), st.floats(1, 1e3))
def test_more_work_never_takes_less_time(flops: float, moved: float, factor: float) -> None:
    device = device_named("L4")
    once = roofline_seconds(device, flops=flops, bytes=moved, dtype="float16")
    assert roofline_seconds(device, flops=flops * factor, bytes=moved, dtype="float16") >= once
    assert roofline_seconds(device, flops=flops, bytes=moved * factor, dtype="float16") >= once


def test_a_projection_says_that_it_is_one() -> None:
    case = {"label": "decode 1 x 512", "dtype": "bfloat16", "device": "cpu"}
    values = {"median_s": 1.0, "flops": 7.3e6, "bytes": 1.05e6}
    measured = Record("kernels", "decode_attention", "afnext bfloat16", case, values, machine={"cpu": "this one"})
    projected = project(measured, device_named("RTX 4090"))
    assert projected.kind == "projected"
    assert "RTX 4090" in projected.subject
    assert projected.machine == {}
    assert projected.values["median_s"] == pytest.approx(1.05e6 / 1008e9)
    assert projected.key != measured.key
