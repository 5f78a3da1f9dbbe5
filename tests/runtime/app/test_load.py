"""`afnext.load`: how often it opens each file, the component layout, and adapters beside the weights."""

import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from support.fake_graphs import FakeGraphs
from support.layouts import write_components

import afnext
from afnext.runtime.errors import CheckpointError, ConfigError

_opened: list[str] = []
_watched: list[Path] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str) and str(_watched[0]) in arguments[0]:
        _opened.append(arguments[0])


def test_each_file_of_a_checkpoint_is_opened_once(folder: Path) -> None:
    sys.addaudithook(_watch)  # hooks cannot be removed: this one looks away unless something is watched
    _watched.append(folder)
    try:
        afnext.load(folder)
    finally:
        _watched.clear()
    counts = Counter(Path(name).name for name in _opened)
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= counts.keys()
    assert set(counts.values()) == {1}, counts


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("mps", r'Apple\'s GPUs.*"cpu".*Apple silicon'),
        ("mps:0", "Apple's GPUs"),
        ("abacus", "'abacus' cannot be used.*\"cpu\""),
    ],
    ids=["mps", "mps:0", "abacus"],
)
def test_a_device_that_cannot_be_used_is_named_with_those_that_can(device: str, said: str) -> None:
    with pytest.raises(afnext.AfnextError, match=said):
        afnext.load(device=device)


def component_layout(source: Path, target: Path) -> Path:
    """The checkpoint `source` as NVIDIA stores it, tokenizer and generation settings in llm/."""
    weights = load_file(source / "model.safetensors")
    write_components(target, weights, shards=1)
    config = json.loads((source / "config.json").read_text())
    parts = {"llm": config["text_config"], "sound_tower": config["audio_config"], "sound_mm_projector": {}}
    for name, values in parts.items():
        (target / name / "config.json").write_text(json.dumps(values))
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(source / name, target / "llm")
    added = json.loads((source / "tokenizer.json").read_text())["added_tokens"]
    settings = {"added_tokens_decoder": {str(token.pop("id")): token for token in added}, "eos_token": "<|im_end|>"}
    (target / "llm" / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(source / "chat_template.jinja", target)
    (target / "config.json").write_text(json.dumps({"model_type": "llava_llama", "dtype": config["dtype"]}))
    return target


def answer(model: afnext.Model, seed: int) -> afnext.Answer:
    noise = np.random.default_rng(seed).standard_normal(20_000).astype(np.float32)
    return model.ask((noise, 16_000), "What is café?", max_new_tokens=8)


@pytest.mark.parametrize("place", ["llm", "top", "vocabulary"])
def test_the_component_layout_answers_as_its_conversion(
    folder: Path, model: afnext.Model, tmp_path: Path, seed: int, place: str
) -> None:
    components = component_layout(folder, tmp_path)
    tokenizer = components / "llm" / "tokenizer.json"
    if place == "top":
        tokenizer.rename(components / "tokenizer.json")
    elif place == "vocabulary":
        stored = json.loads(tokenizer.read_text())["model"]
        (components / "llm" / "vocab.json").write_text(json.dumps(stored["vocab"]))
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["merges"]]
        (components / "llm" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        tokenizer.unlink()
    loaded = afnext.load(components, dtype="float32")
    assert loaded.tokenizer.eos_ids == model.tokenizer.eos_ids
    assert answer(loaded, seed).text == answer(model, seed).text
    assert loaded.tokenizer.added_tokens == model.tokenizer.added_tokens


def test_the_component_layout_needs_a_template_that_knows_audio(folder: Path, tmp_path: Path) -> None:
    components = component_layout(folder, tmp_path)
    (components / "chat_template.jinja").rename(components / "llm" / "chat_template.jinja")
    afnext.load(components)
    (components / "llm" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(afnext.AfnextError, match="no chat template"):
        afnext.load(components)


def test_a_vocabulary_of_another_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    components = component_layout(folder, tmp_path)
    (components / "llm" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        afnext.load(components)
    (components / "llm" / "vocab.json").write_text('{"a": 0, "b": 1}')
    (components / "llm" / "merges.txt").write_text("a b\n")
    with pytest.raises(CheckpointError, match=r"merges\.txt do not fit"):
        afnext.load(components)
    (components / "llm" / "merges.txt").write_text("")
    with pytest.raises(ConfigError, match=r"gives .* the id"):
        afnext.load(components)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "llm/adapter_config.json"])
def test_an_adapter_beside_the_weights_is_not_ignored(folder: Path, tmp_path: Path, name: str) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text("{}")
    with pytest.raises(CheckpointError, match="PEFT adapter"):
        afnext.load(copied)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "broken link"])
def test_files_of_a_checkpoint_have_to_be_regular(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copied / name).unlink()
    if kind == "fifo":
        os.mkfifo(copied / name)
    elif kind == "folder":
        (copied / name).mkdir()
    else:
        (copied / name).symlink_to("/dev/zero" if kind == "device" else tmp_path / "absent")
    with pytest.raises(afnext.AfnextError, match=re.escape(name)):
        afnext.load(copied)


def test_a_link_to_a_regular_file_is_followed(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    afnext.load(tmp_path)


def test_warmup_records_what_requests_use(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = FakeGraphs(monkeypatch)
    seen: list[tuple[str, int, int]] = []
    options = {"max_batch": 1, "draft_tokens": 0, "memory": "600MB"}
    with afnext.load(**options, warmup=True, progress=lambda *report: seen.append(report)) as model:
        recorded = len(graphs.pools)
        assert seen[-1] == ("recording CUDA graphs", recorded, recorded)
        model.ask(None, "Hello?", max_new_tokens=3)
        assert len(graphs.pools) == recorded > 0
