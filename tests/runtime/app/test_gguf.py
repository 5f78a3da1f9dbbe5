"""GGUF files, written by the package `gguf` in the layouts that exist: the logits are those of the weights in them."""

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf", reason="GGUF files are written with the package gguf")
from support.audio import wav_bytes
from support.checkpoints import SavedCheckpoint, relative_rms, save_checkpoint
from support.command_line import CommandLine
from support.gguf_files import audiocpp_kinds, kinds_by_part, write_package, write_pair
from support.logits import last_logits, question
from support.tokenizers import CHAT_TEMPLATE

import afnext
from afnext.quant.ggml import packed_scales
from afnext.quant.recipe import recipe
from afnext.quant.scheme import SchemeError
from afnext.runtime.app.quantize import quantize
from afnext.runtime.errors import AfnextError, CheckpointError, ConfigError
from afnext.runtime.io.prompt import PromptTemplate
from afnext.runtime.io.tokenizer import Tokenizer
from afnext.runtime.model import gguf_checkpoint, gguf_pair
from afnext.runtime.model.checkpoint import check_fit
from afnext.runtime.model.gguf_file import GgufFile
from afnext.runtime.model.opened import open_checkpoint

MIXED = [
    *(("embed_tokens", "Q6_K"), ("lm_head", "Q6_K"), ("v_proj", "Q6_K"), ("down_proj", "Q5_K"), ("q_proj", "Q5_K")),
    *(("k_proj", "Q5_0"), ("up_proj", "Q4_1"), ("gate_proj", "Q4_0"), ("o_proj", "Q5_1")),
]
DECODER = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedCheckpoint:
    """A checkpoint whose rows are whole blocks of 256."""
    encoder = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("saved")
    return save_checkpoint(folder, encoder=encoder, decoder=DECODER, partial_rotary_factor=0.25)


@pytest.fixture(scope="module")
def saved_for_pair(tmp_path_factory: pytest.TempPathFactory) -> SavedCheckpoint:
    """One whose decoder's rows are, with the RoTE that a pair does not state."""
    return save_checkpoint(tmp_path_factory.mktemp("saved"), encoder={"num_hidden_layers": 1}, decoder=DECODER)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_same_logits(file: Path, dense: Path, rng: np.random.Generator) -> afnext.Model:
    model, expected = afnext.load(file, dtype="float32"), afnext.load(dense, dtype="float32")
    for audio in (rng.normal(size=30_000).astype(np.float32), None):
        messages = question(audio, "Who <sound> speaks?")
        # Both sum in float32, in different orders: 5e-6 apart at most in the draws seen.
        assert relative_rms(last_logits(model, messages), last_logits(expected, messages)) < 2e-5
    return model


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_K"])
def test_packages_of_audiocpp(kind: str, saved: SavedCheckpoint, tmp_path: Path, rng: np.random.Generator) -> None:
    namespace = {"Q4_K": "weights.", "Q8_0": "weights:"}.get(kind, "")
    file = tmp_path / "model.gguf"
    dense = write_package(file, saved.folder, audiocpp_kinds(kind), rng, namespace=namespace, old_files=kind == "Q8_0")
    model = assert_same_logits(file, dense, rng)
    stored = model.network.config.quantization
    assert (stored is None) == (kind == "BF16")
    assert model.ask(None, "What?", max_new_tokens=2).token_ids


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, "{{ messages }}"])
def test_pairs_of_llama_cpp(
    template: str, saved_for_pair: SavedCheckpoint, tmp_path: Path, rng: np.random.Generator
) -> None:
    """A template that writes no <sound> is replaced."""
    dense = write_pair(tmp_path / "pair", saved_for_pair.folder, kinds_by_part(MIXED), rng, template)
    if template != CHAT_TEMPLATE:
        (dense / "chat_template.jinja").write_text(gguf_pair.TEMPLATE)
    model = assert_same_logits(tmp_path / "pair", dense, rng)
    assert model.tokenizer.eos_ids == afnext.load(dense).tokenizer.eos_ids


@pytest.fixture(scope="module")
def mixed(saved: SavedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A package with layers of many types, and the folder of the weights that they stand for."""
    file = tmp_path_factory.mktemp("mixed") / "model.gguf"
    return file, write_package(file, saved.folder, kinds_by_part(MIXED[2:]), np.random.default_rng(5))


def test_a_package_is_quantized_once_for_all(mixed: tuple[Path, Path], tmp_path: Path) -> None:
    """Layers in blocks keep their values, those that the file holds dense get the scheme that was asked for."""
    file, dense = mixed
    done = quantize(file, tmp_path / "out", recipe("int8"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    model, direct = afnext.load(tmp_path / "out"), afnext.load(file)
    written, made = model.network.state_dict(), direct.network.state_dict()
    assert str(model.network.decoder.lm_head.scheme) == "int8"
    assert direct.network.decoder.lm_head.scheme is None
    for name, tensor in written.items():
        if name.startswith("decoder.layers"):
            assert torch.equal(tensor, made[name]), name
    assert sum(tensor.nbytes for tensor in written.values()) == done["bytes"]
    assert done["recipe"] == "gguf-q5_k and int8"


def test_scales_are_decoded_once(mixed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """For the check that they are finite and for the model; with their zero points, where there are any."""
    decoded: list[int] = []

    def counting(kind: str, data: torch.Tensor) -> Any:
        decoded.append(data.data_ptr())
        return packed_scales(kind, data)

    monkeypatch.setattr(gguf_checkpoint, "packed_scales", counting)
    model = afnext.load(mixed[0])
    packed = [name for name in model.network.state_dict() if name.endswith("weight_scales")]
    assert len(decoded) == len(set(decoded)) == len(packed) > 0


def test_weights_in_blocks_are_not_rounded_again(mixed: tuple[Path, Path], tmp_path: Path) -> None:
    file, _ = mixed
    with pytest.raises(SchemeError, match=r"down_proj is int8-g32-zeros-f32 already, and int4-g64 would round"):
        quantize(file, tmp_path / "out", recipe("int8", rules=[("*.down_proj", "int4-g64")]))
    with pytest.raises(ConfigError, match="quantized already"):
        afnext.load(file, quant="int4")


def test_a_dense_package_is_quantized_like_a_folder(saved: SavedCheckpoint, tmp_path: Path) -> None:
    dense = write_package(tmp_path / "a.gguf", saved.folder, audiocpp_kinds("F32"), np.random.default_rng(0))
    from_file, from_folder = afnext.load(tmp_path / "a.gguf", quant="int8"), afnext.load(dense, quant="int8")
    expected = from_folder.network.state_dict()
    for name, tensor in from_file.network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_kept_copy_is_what_the_file_holds(
    mixed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFNEXT_CACHE", str(tmp_path))
    expected = afnext.load(mixed[0]).network.state_dict()
    for _ in range(2):
        kept = afnext.load(mixed[0], keep_packed=True).network.state_dict()
        assert kept.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.items())
    assert len(list((tmp_path / "packed").iterdir())) == 1


def test_the_command_line(
    mixed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = CommandLine(monkeypatch, capsys)
    described = json.loads(run("info", mixed[0], "--json").stdout)
    held = sum(tensor.nbytes for tensor in afnext.load(mixed[0], dtype="float32").network.state_dict().values())
    assert described["bytes"] == held
    assert described["files"] == ["model.gguf"]
    assert described["quantization"]["recipe"].startswith("gguf-q")
    assert "int8-g32-zeros-f32" in described["schemes_by_part"]["decoder layers"]
    plan = json.loads(
        run("plan", "--gpu", "8GB", "-m", mixed[0], "--audio", "30", "--dtype", "float32", "--json").stdout
    )
    weights = ("encoder", "encoder layers", "adaptor", "embeddings", "decoder layers", "lm_head")
    assert sum(part["nbytes"] for part in plan["parts"] if part["name"] in weights) == held
    (mixed[0].parent / "a.wav").write_bytes(wav_bytes(np.zeros(8000, np.float32)))
    arguments = ("ask", mixed[0].parent / "a.wav", "What?", "-m", mixed[0], "--max-new-tokens", "2", "--json")
    assert len(json.loads(run(*arguments).stdout)["token_ids"]) <= 2


def set_value(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        values[key] = value(values[key]) if callable(value) else value

    return change


NAMES, OFFSETS, DATA = (f"embedded_files.{key}" for key in ("names", "offsets", "data"))
LYING: dict[str, Callable[[dict[str, Any]], None]] = {
    "of the family 'whisper'": set_value("model_spec.family", "whisper"),
    r"embeds a file called '\.\./config\.json'": set_value(NAMES, lambda v: ["../config.json", *v[1:]]),
    r"embeds a file called '/etc/passwd'": set_value(NAMES, lambda v: ["/etc/passwd", *v[1:]]),
    "each with its own name": set_value(NAMES, lambda v: [v[1], *v[1:]]),
    "embedded_files.names is not a list of strings": set_value(NAMES, "config.json"),
    "offsets do not cut": set_value(OFFSETS, lambda v: v[:-1]),
    "offsets do not cut [0-9,]+ bytes": set_value(OFFSETS, lambda v: np.concatenate([v[:-1], v[-1:] + 1])),
    "offsets do not cut [0-9,]+": set_value(OFFSETS, lambda v: np.concatenate([v[:1], v[:0:-1]])),
    "offsets is not a list of whole numbers": set_value(OFFSETS, lambda v: v.astype(np.float64)),
    "data are not bytes": set_value(DATA, lambda v: v.astype(np.uint16)),
    "has no config.json": set_value(NAMES, lambda v: ["other.json", *v[1:]]),
    "names and [0-9]+ ranks for them": set_value("tensor_names", lambda v: v[:-1]),
    "'other' is 'audio_tower": set_value("tensor_names", lambda v: ["other", *v[1:]]),
    "impossible rank -1": set_value("tensor_ranks", lambda v: np.concatenate([np.array([-1], v.dtype), v[1:]])),
    "in the table; the file is damaged": set_value("tensor_shapes", lambda v: np.concatenate([v[:1] + 1, v[1:]])),
    "sizes of no tensor": set_value("tensor_shapes", lambda v: np.concatenate([v, v[:1]])),
}


@pytest.mark.parametrize("message", LYING)
def test_lying_packages_are_refused(message: str, saved: SavedCheckpoint, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_package(file, saved.folder, audiocpp_kinds("F16"), np.random.default_rng(0), change=LYING[message])
    with pytest.raises((CheckpointError, ConfigError), match=message):
        open_checkpoint(file)


def test_which_files_belong_together(saved_for_pair: SavedCheckpoint, tmp_path: Path, rng: np.random.Generator) -> None:
    pair = tmp_path / "pair"
    write_pair(pair, saved_for_pair.folder, kinds_by_part([], "F16"), rng)
    text, encoder = pair / "model-Q4_K_M.gguf", pair / "mmproj-model.gguf"
    with pytest.raises(CheckpointError, match=r"mmproj-model\.gguf is an audio encoder alone"):
        open_checkpoint(encoder)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copyfile(text, alone / "text.gguf")
    with pytest.raises(CheckpointError, match=r"text\.gguf is a text model alone"):
        open_checkpoint(alone / "text.gguf")
    shutil.copyfile(text, pair / "model-Q8_0.gguf")
    with pytest.raises(CheckpointError, match="several models"):
        open_checkpoint(pair)
    assert open_checkpoint(text).config.model_type == "musicflamingo"
    (alone / "other.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0))
    with pytest.raises(CheckpointError, match=r"other\.gguf holds a model of the architecture 'None'"):
        open_checkpoint(alone / "other.gguf")


@pytest.fixture(scope="module")
def files(
    saved: SavedCheckpoint, saved_for_pair: SavedCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A package, and the two files of a pair."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(1)
    write_package(folder / "package.gguf", saved.folder, audiocpp_kinds("Q4_K"), rng)
    write_pair(folder / "pair", saved_for_pair.folder, kinds_by_part(MIXED), rng, CHAT_TEMPLATE)
    return {path.stem: path for path in (folder / "package.gguf", *sorted((folder / "pair").glob("*.gguf")))}


REFUSED: list[tuple[str, str, Any, str]] = [
    ("model", "tokenizer.ggml.model", "llama", "tokenizer.ggml.model is 'llama'"),
    ("model", "tokenizer.ggml.pre", "llama3", "tokenizer.ggml.pre is 'llama3'"),
    ("model", "tokenizer.ggml.merges", None, "tokenizer.ggml.merges is missing"),
    ("model", "tokenizer.ggml.eos_token_id", None, "eos_token_id is None where a number"),
    ("model", "qwen2.rope.scaling.type", "yarn", "scales rotary positions"),
    ("model", "qwen2.embedding_length", "x", "qwen2.embedding_length is 'x' where a number"),
    ("model", "qwen2.rope.freq_base", float("nan"), "qwen2.rope.freq_base is nan"),
    ("mmproj", "clip.audio.projector_type", "qwen2a", "has the projector 'qwen2a'"),
    ("mmproj", "clip.audio.attention.layer_norm_epsilon", 1e-6, "has a norm with epsilon 1e-06"),
    ("mmproj", "clip.audio.block_count", None, "clip.audio.block_count is None"),
]


@pytest.mark.parametrize(("which", "key", "value", "message"), REFUSED)
def test_pairs_that_are_not_understood_are_refused(
    which: str, key: str, value: Any, message: str, files: dict[str, Path]
) -> None:
    pair = {name: GgufFile(files[name]) for name in ("model-Q4_K_M", "mmproj-model")}
    changed = next(file for name, file in pair.items() if name.startswith(which))
    if key == "clip.audio.projector_type":
        changed.metadata.pop("clip.projector_type", None)
    changed.metadata[key] = value
    with pytest.raises(ConfigError, match=message) as caught:
        gguf_pair.pair_contents(*pair.values())
    assert changed.label in str(caught.value)


def test_a_vocabulary_without_marks_around_audio_is_that_of_audio_flamingo_3(files: dict[str, Path]) -> None:
    text, encoder = GgufFile(files["model-Q4_K_M"]), GgufFile(files["mmproj-model"])
    assert json.loads(gguf_pair.pair_contents(text, encoder)["config.json"])["model_type"] == "musicflamingo"
    tokens = text.metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index("<|sound_bos|>")] = "[other]"
    config = json.loads(gguf_pair.pair_contents(text, encoder)["config.json"])
    assert config["model_type"] == "audioflamingo3"
    assert "audio_bos_token_id" not in config
    tokens[tokens.index("<sound>")] = "[sound]"
    with pytest.raises(ConfigError, match="has no token <sound>"):
        gguf_pair.pair_contents(text, encoder)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_open_or_are_refused(data: st.DataObject, files: dict[str, Path], tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(sorted(files)))
    source = files[name]
    content = bytearray(source.read_bytes())
    end = min(tensor.start for tensor in GgufFile(source).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 9))
        width = data.draw(st.sampled_from([1, 4, 8]))
        value = data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 32, 255, 2**31, 2**63]))
        content[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    folder = tmp_path / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if name != "package":
        for path in source.parent.glob("*.gguf"):
            (folder / path.name).symlink_to(path)
        (folder / source.name).unlink()
    (folder / source.name).write_bytes(content)
    with contextlib.suppress(AfnextError):
        opened = open_checkpoint(folder)
        check_fit(opened.weights, opened.config)
        Tokenizer.from_folder(opened.files)
        PromptTemplate.from_folder(opened.files)
