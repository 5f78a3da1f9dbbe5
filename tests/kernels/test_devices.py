"""The table of devices against what their chips are made of, and the names that torch and people give them."""

import pytest
import torch

from afnext.kernels.devices import DEVICES, Device, DeviceError, device_named, find_device

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
    if "fp8" in device.flops:  # with float32 accumulation twice the rate of float16
        assert device.flops["fp8"] == pytest.approx(2 * giga * float16, rel=0.01)
    assert device.bandwidth == pytest.approx(bus * pin * 1e9 / 8, rel=0.025)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_only_turing_lacks_bfloat16(device: Device) -> None:
    assert ("bfloat16" in device.flops) == (device.name != "T4")
    assert device.flops.get("bfloat16", device.flops["float16"]) == device.flops["float16"]
    assert "NVIDIA" in device.source


def test_only_ada_hopper_and_blackwell_have_fp8() -> None:
    with_fp8 = {device.name for device in DEVICES if "fp8" in device.flops}
    assert with_fp8 == {"H100 SXM", "H100 PCIe", "H200", "L4", "RTX 4060 8GB", "RTX 4090", "RTX 5090"}


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
    assert device_named("rtx3060").name == "RTX 3060 12GB"
    assert device_named("A100").name == "A100 80GB SXM"
    assert device_named("H100").name == "H100 SXM"
    assert device_named("h100 pcie").name == "H100 PCIe"


def test_a_name_that_tells_no_device_is_refused_with_a_choice() -> None:
    with pytest.raises(DeviceError, match=r"unknown .*RTX 9090.*H100 SXM"):
        device_named("RTX 9090")
    with pytest.raises(DeviceError, match=r"ambiguous .*rtx.*RTX 3060 12GB, RTX 3090"):
        device_named("rtx")
    with pytest.raises(DeviceError, match=r"unknown .*''"):
        device_named("")


@pytest.mark.gpu
def test_this_gpu_has_the_memory_its_entry_says() -> None:
    properties = torch.cuda.get_device_properties(0)
    device = find_device(properties.name)
    if device is None:
        pytest.skip(f"{properties.name} is not in the table")
    assert properties.total_memory == pytest.approx(device.memory, rel=0.15)
