"""Packed copies: written once by load(quant=..., keep_packed=True), mapped from then on, listed and removed."""

import logging
import os
import shutil
from pathlib import Path

import pytest

import afnext
from afnext.runtime.app import api, packed
from afnext.runtime.app.quantize import quantize
from afnext.runtime.errors import ConfigError
from afnext.runtime.model import hub


@pytest.fixture
def source(folder: Path, tmp_path: Path) -> Path:
    """A copy of the random checkpoint that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "dense"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AFNEXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path / "no hub")
    return tmp_path / "cache" / "packed"


def tokens(model: afnext.Model) -> list[int]:
    return list(model.ask(None, "Hello?", max_new_tokens=8).token_ids)


def test_the_copy_is_written_once_and_answers_the_same(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(packed, "quantize", lambda *a, **k: calls.append(1) or quantize(*a, **k))
    expected = tokens(afnext.load(source, quant="int4-g32"))
    assert list(cache.glob("*")) == []
    stages = set()
    first = afnext.load(source, quant="int4-g32", keep_packed=True, progress=lambda stage, *_: stages.add(stage))
    second = afnext.load(source, quant="int4-g32", keep_packed=True)
    assert (tokens(first), tokens(second), len(calls)) == (expected, expected, 1)
    assert "packing weights" in stages
    (copy,) = cache.iterdir()
    assert copy.name.startswith("dense-int4-g32-")
    assert tokens(afnext.load(copy)) == expected
    os.utime(source / "model.safetensors")  # as if it had been downloaded anew
    afnext.load(source, quant="int4-g32", keep_packed=True)
    afnext.load(source, quant="int8", keep_packed=True)
    assert len(calls) == len(list(cache.iterdir())) == 3


def test_a_failure_leaves_nothing_behind(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(done: int, total: int) -> None:
        raise KeyboardInterrupt

    recipe = api.recipe("int4-g32")
    with pytest.raises(KeyboardInterrupt):
        packed.packed_copy(source, recipe, device=api.usable_device("cpu"), progress=fails)
    assert list(cache.iterdir()) == []


def test_copies_are_listed_and_removed(source: Path, cache: Path) -> None:
    afnext.load(source, quant="int8", keep_packed=True)
    (copy,) = cache.iterdir()
    listed = {model.name: model for model in hub.local_models()}
    assert listed[str(copy)].nbytes == sum(path.stat().st_size for path in copy.rglob("*"))
    assert hub.remove(str(copy)) == listed[str(copy)].nbytes
    assert not copy.exists()
    with pytest.raises(afnext.CheckpointError, match="not in the Hub's cache"):
        hub.remove(str(source))
    assert source.is_dir()


def test_only_packed_weights_are_kept(source: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match='quant="int4"'):
        afnext.load(source, keep_packed=True)
    copy = packed.packed_copy(source, api.recipe("int4-g32"), device=api.usable_device("cpu"))
    afnext.load(copy, quant="int4-g32", keep_packed=True)
    assert list(cache.iterdir()) == [copy]


def test_packing_a_large_checkpoint_gets_the_command_that_keeps_it(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        afnext.load(source, quant="int4-g32")
        assert caplog.text == ""
        monkeypatch.setattr(packed, "LARGE", 1)
        afnext.load(source)
        afnext.load(source, quant="int4-g32", keep_packed=True)
        assert caplog.text == ""
        afnext.load(source, quant="int4-g32")
    assert f"afnext quantize {source} dense-int4-g32 --scheme int4-g32" in caplog.text
    assert "--keep-packed" in caplog.text
