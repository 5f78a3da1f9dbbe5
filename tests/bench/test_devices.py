"""The table of devices against what their chips are made of, names as torch gives them, and the roofline."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afnext.bench.devices import (
    DEVICES,
    Device,
    DeviceError,
    device_named,
    find_device,
    project,
    roofline_seconds,
)
from afnext.bench.record import Record

# Cores (SMs), boost GHz, operations a core and clock in float32, float16 with float32 accumulation, int8; bus bits and
# Gbit/s a pin: from the architecture whitepapers, independently of the printed rates.
CHIPS = {
    "H100 SXM": (132, 1.83, 256, 4096, 8192, 5120, 5.235),
    "H100 PCIe": (114, 1.62, 256, 4096, 8192, 5120, 3.19),
    "H200": (132, 1.83, 256, 4096, 8192, 6144, 6.25),
    "A100 80GB SXM": (108, 1.41, 128, 2048, 4096, 5120, 3.186),
    "L4": (58, 2.04, 256, 1024, 2048, 192, 12.5),
    "T4": (40, 1.59, 128, 1024, 2048, 256, 10.0),
    "RTX 3060 12GB": (28, 1.777, 256, 512, 2048, 192, 15.0),
    "RTX 3090": (82, 1.695, 256, 512, 2048, 384, 19.5),
    "RTX 4060 8GB": (24, 2.46, 256, 512, 2048, 128, 17.0),
    "RTX 4090": (128, 2.52, 256, 512, 2048, 384, 21.0),
    "RTX 5090": (170, 2.407, 256, 512, 2048, 512, 28.0),
}
# The plain cores of Hopper's float32 figures boost higher than its tensor cores.
FLOAT32_CLOCK = {"H100 SXM": 1.98, "H100 PCIe": 1.755, "H200": 1.98}


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_rates_are_those_of_the_chip(device: Device) -> None:
    cores, clock, float32, float16, int8, bus, pin = CHIPS[device.name]
    giga = cores * clock * 1e9
    assert device.flops["float32"] == pytest.approx(
        cores * FLOAT32_CLOCK.get(device.name, clock) * 1e9 * float32, rel=0.01
    )
    assert device.flops["float16"] == pytest.approx(giga * float16, rel=0.01)
    assert device.flops["int8"] == pytest.approx(giga * int8, rel=0.01)
    assert device.bandwidth == pytest.approx(bus * pin * 1e9 / 8, rel=0.025)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_only_turing_lacks_bfloat16(device: Device) -> None:
    assert ("bfloat16" in device.flops) == (device.name != "T4")
    assert device.flops.get("bfloat16", device.flops["float16"]) == device.flops["float16"]
    assert "NVIDIA" in device.source


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
    ],
)
def test_finds_the_names_that_torch_gives(reported: str, name: str) -> None:
    found = find_device(reported)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA L40S",
        "NVIDIA GeForce RTX 3060 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D",
        "",
    ],
)
def test_another_card_of_a_similar_name_is_unknown(reported: str) -> None:
    assert find_device(reported) is None


def test_memory_tells_apart_cards_of_one_name() -> None:
    name = "NVIDIA GeForce RTX 3060"
    assert find_device(name, memory=12_620_000_000) is not None
    assert find_device(name, memory=8_500_000_000) is None


def test_people_may_name_devices_loosely() -> None:
    assert device_named("rtx4090").name == "RTX 4090"
    with pytest.raises(DeviceError, match=r"RTX 9090.*H100 SXM"):
        device_named("RTX 9090")


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


@pytest.mark.gpu
def test_this_gpu_has_the_memory_its_entry_says() -> None:
    properties = torch.cuda.get_device_properties(0)
    device = find_device(properties.name)
    if device is None:
        pytest.skip(f"{properties.name} is not in the table")
    assert properties.total_memory == pytest.approx(device.memory, rel=0.15)
