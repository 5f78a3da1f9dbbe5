"""Which config a kernel is launched with: the chip's family, the tables, and the choice by timing."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from afnext.kernels import autotune, configs
from afnext.kernels.compilation import collecting
from afnext.kernels.configs import CHIPS, Config, Configs, family, multiprocessors, targeting
from afnext.kernels.errors import BackendError

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
SLOW, FAST, HUGE = Config({"BLOCK": 16}), Config({"BLOCK": 32}, num_warps=8), Config({"BLOCK": 2**20})


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("AFNEXT_AUTOTUNE", raising=False)
    monkeypatch.setattr(configs, "_winners", {})
    configs._family.cache_clear()
    configs._multiprocessors.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an A10 whose clock says that FAST takes half as long as SLOW, and where HUGE does not fit."""

    class OutOfResourcesError(Exception):
        pass

    def milliseconds(function: object) -> float:
        config = function()  # type: ignore[operator]
        if config == HUGE:
            raise OutOfResourcesError
        return 1.0 if config == FAST else 2.0

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(multi_processor_count=72))
    errors = SimpleNamespace(errors=SimpleNamespace(OutOfResources=OutOfResourcesError))
    monkeypatch.setattr(configs, "triton", SimpleNamespace(__version__="3.7.1", runtime=errors))
    monkeypatch.setattr(autotune, "triton", configs.triton)
    monkeypatch.setattr(autotune, "milliseconds", milliseconds)


@pytest.mark.parametrize("device", [CPU, META])
def test_tensors_without_a_chip_count_as_on_sm90_or_on_the_target(device: torch.device) -> None:
    assert (family(device), multiprocessors(device)) == ("sm90", CHIPS["sm90"].multiprocessors)
    with targeting("sm86"):
        assert (family(device), multiprocessors(device)) == ("sm86", CHIPS["sm86"].multiprocessors)
        with targeting("gfx942"):
            assert family(device) == "gfx942"
        assert family(device) == "sm86"
    assert family(device) == "sm90"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU here")
def test_fake_cuda_tensors_count_as_on_sm90() -> None:
    assert family(CUDA) == "sm90"
    assert multiprocessors(torch.device("cuda")) == CHIPS["sm90"].multiprocessors


@pytest.mark.usefixtures("gpu")
def test_a_real_chip_is_asked_once_and_the_target_has_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (family(CUDA), multiprocessors(CUDA)) == ("sm86", 72)
    for name in ("get_device_capability", "get_device_properties"):
        monkeypatch.delattr(torch.cuda, name)
    assert (family(torch.device("cuda")), multiprocessors(CUDA)) == ("sm86", 72)
    with targeting("sm100"):
        assert (family(CUDA), multiprocessors(CUDA)) == ("sm100", CHIPS["sm100"].multiprocessors)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), "sm80"),
        ((8, 6), "sm86"),
        ((8, 7), "sm86"),
        ((8, 9), "sm89"),
        ((9, 0), "sm90"),
        ((10, 0), "sm100"),
        ((10, 3), "sm100"),
        ((12, 0), "sm120"),
        ((12, 1), "sm120"),
        ((13, 0), "sm120"),
    ],
)
def test_families_of_compute_capabilities(capability: tuple[int, int], expected: str) -> None:
    assert configs._family_of(*capability) == expected


def test_what_has_no_family_is_refused() -> None:
    with pytest.raises(BackendError, match=r"8\.0 or later.*7\.5.*AFNEXT_BACKEND=torch"):
        configs._family_of(7, 5)
    with pytest.raises(BackendError, match=r"'sm75'.*sm80, .*gfx942"), targeting("sm75"):
        pass
    with pytest.raises(ValueError, match=r"example.*sm91.*sm90"):
        Configs("example", SLOW, {"sm91": FAST})


def test_the_table_of_a_kernel_and_its_default() -> None:
    table = Configs("example", SLOW, {"sm86": FAST})
    assert table.on(CPU) == SLOW
    with targeting("sm86"):
        assert table.on(META) == FAST
    assert FAST.options() == {"BLOCK": 32, "num_warps": 8, "num_stages": 3}


@pytest.mark.usefixtures("gpu")
def test_nothing_is_timed_unless_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = Configs("example", SLOW, candidates=[FAST])

    def launch(config: Config) -> None:
        raise AssertionError("launched for timing")

    assert table.on(CUDA, (1,), launch) == SLOW
    monkeypatch.setenv("AFNEXT_AUTOTUNE", "1")
    assert table.on(CPU, (1,), launch) == SLOW
    assert table.on(CUDA, (1,)) == SLOW
    assert Configs("fixed", SLOW).on(CUDA, (1,), launch) == SLOW
    with targeting("sm80"):
        assert table.on(CUDA, (1,), launch) == SLOW
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert table.on(CUDA, (1,), launch) == SLOW
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("gpu")
def test_the_fastest_is_found_once_and_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AFNEXT_AUTOTUNE", "1")
    table = Configs("example", SLOW, candidates=[HUGE, FAST])
    launched: list[Config] = []

    def launch(config: Config) -> Config:
        launched.append(config)
        return config

    assert table.on(CUDA, (16, "int4"), launch) == FAST
    assert launched == [SLOW, HUGE, FAST]
    assert table.on(CUDA, (16, "int4"), launch) == FAST
    monkeypatch.setattr(configs, "_winners", {})  # another process
    assert table.on(CUDA, (16, "int4"), launch) == FAST
    assert len(launched) == 3
    (name,) = json.loads((tmp_path / "afnext" / "autotune.json").read_text())
    assert name == "NVIDIA A10 | triton 3.7.1 | example | (16, 'int4')"
    assert table.on(CUDA, (32, "int4"), launch) == FAST
    assert len(launched) == 6

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert table.on(CUDA, (16, "int4"), launch) == FAST, "also while a graph is captured"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    monkeypatch.setattr(configs, "_winners", {})
    without = Configs("example", SLOW, candidates=[HUGE])
    assert without.on(CUDA, (16, "int4"), launch) == SLOW, "what is stored is no candidate any more"


@pytest.mark.usefixtures("gpu")
def test_collecting_launches_every_candidate_and_times_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AFNEXT_AUTOTUNE", "1")
    table = Configs("example", SLOW, candidates=[HUGE, FAST])
    launched: list[Config] = []
    with monkeypatch.context() as timing:
        timing.delattr(autotune, "milliseconds")
        with collecting():
            assert table.on(CUDA, (), launched.append) == SLOW
    assert launched == [SLOW, HUGE, FAST]
    assert list(tmp_path.iterdir()) == []
    assert table.on(CUDA, (), lambda config: config) == FAST
    with collecting():
        assert table.on(CUDA, (), launched.append) == FAST
    assert len(launched) == 3


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("content", ["{", "[1]", '{"other": 1}'])
def test_a_broken_file_is_replaced(
    content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AFNEXT_AUTOTUNE", "1")
    path = tmp_path / "afnext" / "autotune.json"
    path.parent.mkdir()
    path.write_text(content)
    assert Configs("example", SLOW, candidates=[FAST]).on(CUDA, (), lambda config: config) == FAST
    assert bool(caplog.records) == ("other" not in content)
    assert any("example" in name for name in json.loads(path.read_text()))
    assert [file.name for file in path.parent.iterdir()] == ["autotune.json"]


@pytest.mark.usefixtures("gpu")
def test_no_candidate_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFNEXT_AUTOTUNE", "1")
    with pytest.raises(BackendError, match="none of 2 configs fits"):
        Configs("example", HUGE, candidates=[HUGE]).on(CUDA, (), lambda config: config)
