"""The backend of attention that is chosen by timing: when, where it is kept, and what is logged.

flash-attn is a stand-in, the GPUs are those of `support/fake_cuda.py`, and the clock says what a test wants.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from support.fake_cuda import FakeCuda
from torch import Tensor

from afnext import kernels
from afnext.kernels import attention_libraries, autotune, configs, fastest
from afnext.kernels.attention import attention
from afnext.kernels.decode_attention import decode_attention
from afnext.kernels.dispatch import operations
from afnext.kernels.errors import BackendError
from afnext.kernels.row_groups import row_invariant
from afnext.runtime.app import backend_info

GPU = torch.device("cuda", 0)


class Machine:
    """A GPU with flash-attn 3 and without cuDNN. clock: milliseconds by backend; timed, used: backends in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.clock = {"triton": 2.0, "flash_attn": 1.0}
        self.timed: list[str] = []
        self.used: list[str] = []
        self.lengths: list[Tensor] = []
        library = ModuleType("flash_attn_interface")
        library.__version__ = "3.0.1"  # type: ignore[attr-defined]
        library.flash_attn_with_kvcache = self._flash_attn  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn_interface", library)
        monkeypatch.setattr(autotune, "milliseconds", self._milliseconds)
        (operation,) = (operation for operation in operations() if operation.name == "attention")
        monkeypatch.setitem(operation.implementations, "cudnn", self._no_cudnn)

    def _flash_attn(self, q: Tensor, k: Tensor, v: Tensor, cache_seqlens: Any = None, **_: Any) -> Tensor:
        self.used.append("flash_attn")
        self.lengths.append(cache_seqlens)
        return torch.zeros_like(q)

    def _no_cudnn(self, *_: Any) -> Tensor:
        raise RuntimeError("cuDNN is missing")

    def _milliseconds(self, run: Callable[[], object]) -> float:
        before = len(self.used)
        run()
        name = "flash_attn" if len(self.used) > before else "triton"
        del self.used[before:]
        self.timed.append(name)
        return self.clock[name]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeCuda]:
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("AFNEXT_AUTOTUNE", "1")
    monkeypatch.delenv("AFNEXT_BACKEND", raising=False)
    forget(monkeypatch)
    with FakeCuda(monkeypatch).active() as cuda:
        yield cuda
    forget(monkeypatch)


@pytest.fixture
def machine(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be another process."""
    for module, name, empty in ((fastest, "_winners", {}), (fastest, "_reported", set()), (configs, "_winners", {})):
        monkeypatch.setattr(module, name, empty)
    attention_libraries._library.cache_clear()
    attention_libraries.versions.cache_clear()


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, device=GPU)


def decode(batch: int = 1, pages: int = 3, *, keys: torch.dtype = torch.bfloat16) -> Tensor:
    lengths = torch.full((batch,), 20, device=GPU)
    table = torch.zeros(batch, pages, dtype=torch.int32, device=GPU)
    pools = [torch.zeros(4, 256, 2, 64, dtype=keys, device=GPU) for _ in range(2)]
    scales = [torch.ones(4, 256, 2, device=GPU) for _ in range(2)] if keys == torch.int8 else [None, None]
    named = {"k_scales": scales[0], "v_scales": scales[1], "key_lengths": lengths, "page_table": table}
    return decode_attention(zeros(batch, 1, 6, 64), *pools, **named)  # type: ignore[arg-type]


def entries(tmp_path: Path) -> dict[str, Any]:
    """The choices in the file, besides configs of kernels."""
    stored = json.loads((tmp_path / "afnext" / "autotune.json").read_text())
    return {name: value for name, value in stored.items() if isinstance(value, dict) and "backend" in value}


@pytest.mark.parametrize("winner", ["triton", "flash_attn"])
def test_the_fastest_is_timed_once_and_used(
    machine: Machine,
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    winner: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine.clock[winner] = 0.5
    with caplog.at_level(logging.INFO, "afnext.kernels"):
        decode()
    assert machine.timed == ["triton", "flash_attn"]
    assert machine.used == ["flash_attn"] * (winner == "flash_attn")
    assert f"{winner} is the fastest: triton" in caplog.text
    assert machine.lengths[0].tolist() == [384], "timed with half of the keys that fit into 3 pages"
    forget(monkeypatch)
    decode()
    decode(pages=4)  # the same power of two
    assert len(machine.timed) == 2
    decode(batch=2)
    assert len(machine.timed) == 4
    first, second = entries(tmp_path).items()
    parts = first[0].split(" | ")
    assert parts[0] == "fake H100"
    assert parts[-2:] == ["decode_attention", parts[-1]]
    assert parts[-1] == "bfloat16, 6 heads of 64 on 2, 1 x 1 queries, 1024 keys in pages of 256, causal"
    assert {"triton " + configs.triton.__version__, f"torch {torch.__version__}", "flash-attn 3 3.0.1"} < set(parts)
    assert first[1]["milliseconds"] == machine.clock
    assert first[1]["backend"] == second[1]["backend"] == winner


def test_a_captured_graph_repeats_the_choice_and_makes_none(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    decode()
    assert machine.timed == machine.used == []
    capturing = False
    decode()
    capturing = True
    decode()
    assert machine.used == ["flash_attn"] * 2
    assert len(machine.timed) == 2


def test_what_another_version_chose_is_reported_and_timed_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decode()
    sys.modules["flash_attn_interface"].__version__ = "3.1.0"  # type: ignore[attr-defined]
    machine.clock["flash_attn"] = 9.0
    forget(monkeypatch)
    machine.used.clear()
    with caplog.at_level(logging.WARNING, "afnext.kernels"):
        decode()
        decode(batch=2)
    assert machine.used == []
    assert len(machine.timed) == 6
    (warning,) = caplog.records
    assert re.search(r"decode_attention: .*timed again.*flash-attn 3 3\.0\.1 and this is .*3\.1\.0", warning.message)
    described = backend_info.describe_backends(GPU)
    assert [choice["backend"] for choice in described["timed"]["choices"]] == ["triton"] * 2
    assert [machine.split(" | ")[-1] for machine in described["timed"]["ignored"]] == ["flash-attn 3 3.0.1"]


def test_info_tells_what_was_chosen_and_why(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode()
    for wanted, state in (("1", "used"), ("0", "not used: set AFNEXT_AUTOTUNE=1")):
        monkeypatch.setenv("AFNEXT_AUTOTUNE", wanted)
        Console(width=200).print(backend_info.table(backend_info.describe_backends(GPU)))
        shown = " ".join(capsys.readouterr().out.split())
        assert f"chosen by timing {state}" in shown
        assert "decode_attention flash_attn for bfloat16, 6 heads of 64 on 2, 1 x 1 queries, 1024 keys" in shown
        assert "causal: flash_attn 1 ms, triton 2 ms" in shown
    assert backend_info.describe_backends(torch.device("cpu"))["timed"] is None


def test_nothing_is_timed_where_there_is_no_choice(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    decode(keys=torch.int8)
    with row_invariant():
        decode()
    with kernels.backend("triton"):
        decode()
    monkeypatch.setenv("AFNEXT_BACKEND", "decode_attention=triton")
    decode()
    monkeypatch.delenv("AFNEXT_BACKEND")
    monkeypatch.setenv("AFNEXT_AUTOTUNE", "0")
    decode()
    assert machine.timed == machine.used == []


def test_a_library_that_fails_is_reported_and_not_chosen(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    del machine.clock["flash_attn"]
    x = zeros(2, 30, 4, 64)
    attention(x, x, x)
    assert "flash_attn failed and is not chosen" in caplog.text
    (entry,) = entries(tmp_path).values()
    assert entry["backend"] == "triton"
    assert list(entry["milliseconds"]) == ["triton"]
    with pytest.raises(BackendError, match="none of a, b computes it"):
        fastest.fastest("other", "any", ["a", "b"], GPU, (), lambda name: {}[name])


@pytest.mark.parametrize("content", ["{", "[1]", '{"a | b | c": 3}', '{"x": {"backend": "y"}}'])
def test_a_broken_file_is_replaced(machine: Machine, tmp_path: Path, content: str) -> None:
    path = tmp_path / "afnext" / "autotune.json"
    path.parent.mkdir()
    path.write_text(content)
    decode()
    assert machine.used == ["flash_attn"]
    assert "flash_attn" in [value["backend"] for value in entries(tmp_path).values()]
    assert backend_info.describe_backends(GPU)["timed"]["choices"]
