"""Checkpoint and load_weights on checkpoints that transformers saves, rewritten into every layout of the family."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.layouts import LAYOUTS, Weights, write, write_components

from afnext.runtime.errors import CheckpointError
from afnext.runtime.model.checkpoint import Checkpoint, expected_shapes, load_weights
from afnext.runtime.model.config import ModelConfig
from afnext.runtime.model.opened import with_stored_head
from afnext.runtime.model.parameters import canonical_name


@pytest.fixture(scope="session")
def session_seed() -> int:
    """As `seed`, for the checkpoint that all tests share."""
    value = int(os.environ.get("AFNEXT_TEST_SEED", random.SystemRandom().randrange(1 << 31)))
    print(f"AFNEXT_TEST_SEED={value}")
    return value


@dataclass(frozen=True)
class Saved:
    """A checkpoint that transformers saved, its tensors under the names in the file, and those of the live model."""

    folder: Path
    flat: Weights
    model: Weights

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_folder(self.folder)


def save_with_transformers(folder: Path, model_type: str, seed: int, **text: Any) -> Saved:
    import transformers

    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    text_config = transformers.Qwen2Config(
        vocab_size=32, hidden_size=16, num_key_value_heads=2, eos_token_id=2, **sizes, **text
    )
    audio_config = transformers.AudioFlamingo3EncoderConfig(
        num_mel_bins=8, hidden_size=40, max_source_positions=20, **sizes
    )
    ids: dict[str, Any] = {"audio_token_id": 5}
    config_class: Any
    model_class: Any
    if model_type == "musicflamingo":
        config_class, model_class = transformers.MusicFlamingoConfig, transformers.MusicFlamingoForConditionalGeneration
        ids |= {"audio_bos_token_id": 6, "audio_eos_token_id": 7}
    else:
        config_class = transformers.AudioFlamingo3Config
        model_class = transformers.AudioFlamingo3ForConditionalGeneration
    torch.manual_seed(seed)
    model = model_class(config_class(audio_config=audio_config, text_config=text_config, **ids)).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    modules = {"model.audio_tower.": "encoder.", "model.multi_modal_projector.": "adaptor."}
    modules |= {"model.language_model.": "decoder.", "lm_head.": "decoder.lm_head."}
    live = {}
    for name, tensor in model.state_dict().items():
        prefix = next(prefix for prefix in modules if name.startswith(prefix))
        live[modules[prefix] + name.removeprefix(prefix)] = tensor.detach().clone()
    return Saved(folder, load_file(folder / "model.safetensors"), live)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, session_seed: int) -> Saved:
    return save_with_transformers(tmp_path_factory.mktemp("musicflamingo"), "musicflamingo", session_seed)


@pytest.fixture
def copied(saved: Saved, tmp_path: Path) -> Saved:
    """The same checkpoint in a folder that the test may spoil."""
    shutil.copytree(saved.folder, tmp_path / "copy")
    return replace(saved, folder=tmp_path / "copy")


def assert_holds(folder: Path, expected: Weights) -> None:
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.names) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor), name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_model(layout: str, shards: int, saved: Saved, tmp_path: Path) -> None:
    write(tmp_path, {LAYOUTS[layout](name): tensor for name, tensor in saved.flat.items()}, shards)
    assert_holds(tmp_path, saved.model)


@pytest.mark.parametrize("shards", [1, 2])
def test_component_layout(shards: int, saved: Saved, tmp_path: Path) -> None:
    write_components(tmp_path, saved.flat, shards)
    assert_holds(tmp_path, saved.model)
    assert len(Checkpoint.open(tmp_path).files) == 3 * shards


@pytest.mark.parametrize("name", ["audio_tower.pos_emb.freqs", "model.audio_tower.pos_emb.freqs"])
def test_stored_rote_frequencies_are_ignored(name: str, saved: Saved, tmp_path: Path) -> None:
    write(tmp_path, {**saved.flat, name: torch.zeros(128)})
    assert_holds(tmp_path, saved.model)


def test_audio_flamingo_3(tmp_path: Path, seed: int) -> None:
    saved = save_with_transformers(tmp_path, "audioflamingo3", seed)
    assert_holds(tmp_path, saved.model)
    loaded = dict(load_weights(Checkpoint.open(tmp_path), saved.config, device="cpu", dtype=torch.bfloat16))
    assert loaded.keys() == saved.model.keys()


def test_shards_that_transformers_itself_writes(saved: Saved, tmp_path: Path) -> None:
    import transformers

    model = transformers.MusicFlamingoForConditionalGeneration.from_pretrained(saved.folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_holds(tmp_path, saved.model)


def test_sizes_are_counted(saved: Saved) -> None:
    checkpoint = Checkpoint.open(saved.folder)
    assert checkpoint.parameter_count == sum(tensor.numel() for tensor in saved.model.values())
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in saved.model.values())
    assert checkpoint.files == (saved.folder / "model.safetensors",)


def test_full_size_names_and_shapes(shared_data: Path) -> None:
    full = json.loads((shared_data / "layouts" / "afnext_flat_keys_shapes.json").read_text())
    shapes = expected_shapes(ModelConfig.from_folder(shared_data / "tokenizer" / "afnextA"))
    assert shapes == {canonical_name(name): tuple(shape) for name, shape in full["keys"].items()}
    assert len(shapes) == 830
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 8_267_215_360


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_lose_nothing(stored: torch.dtype, copied: Saved) -> None:
    """They load as what they stand for, also as `transformers` does, and are told by the bytes they take."""
    import transformers

    packed = {name: tensor.to(stored) if tensor.ndim == 2 else tensor for name, tensor in copied.flat.items()}
    write(copied.folder, packed)
    checkpoint = Checkpoint.open(copied.folder)
    loaded = dict(load_weights(checkpoint, copied.config, device="cpu", dtype=torch.float32))
    for name, tensor in packed.items():
        assert torch.equal(loaded[canonical_name(name)], tensor.float()), name
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in packed.values())
    reference = transformers.MusicFlamingoForConditionalGeneration.from_pretrained(copied.folder, dtype=torch.float32)
    state = {canonical_name(name): tensor for name, tensor in reference.state_dict().items()}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_loading_converts_exactly_as_torch_does(dtype: torch.dtype, saved: Saved) -> None:
    calls: list[tuple[int, int]] = []
    checkpoint = Checkpoint.open(saved.folder)
    weights = load_weights(
        checkpoint, saved.config, device="cpu", dtype=dtype, progress=lambda done, total: calls.append((done, total))
    )
    loaded = dict(weights)
    assert loaded.keys() == expected_shapes(saved.config).keys() == saved.model.keys()
    for name, tensor in saved.model.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor.to(dtype)), name
    assert calls == sorted(calls)
    assert calls[-1] == (checkpoint.nbytes, checkpoint.nbytes)
    assert len(calls) == len(loaded)


def test_tensors_outlive_the_checkpoint(saved: Saved) -> None:
    tensor = Checkpoint.open(saved.folder).tensor("encoder.conv1.weight")
    assert torch.equal(tensor, saved.model["encoder.conv1.weight"])


def test_released_memory_is_read_again(saved: Saved) -> None:
    checkpoint = Checkpoint.open(saved.folder)
    tensor = checkpoint.tensor("encoder.conv2.weight")
    checkpoint.release("encoder.conv2.weight")
    assert torch.equal(tensor, saved.model["encoder.conv2.weight"])


def test_unaligned_data(copied: Saved) -> None:
    path = copied.folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert len(header) % 2 == 1
    assert_holds(copied.folder, copied.model)


def test_float16_that_would_overflow_is_refused(copied: Saved) -> None:
    name = "language_model.model.norm.weight"
    write(copied.folder, {**copied.flat, name: torch.full_like(copied.flat[name], 1e30)})
    checkpoint = Checkpoint.open(copied.folder)
    with pytest.raises(CheckpointError, match=r"'language_model\.model\.norm\.weight' has values beyond float16"):
        list(load_weights(checkpoint, copied.config, device="cpu", dtype=torch.float16))
    assert len(list(load_weights(checkpoint, copied.config, device="cpu", dtype=torch.float32))) == len(copied.model)


def tied(saved: Saved) -> ModelConfig:
    return replace(saved.config, decoder=replace(saved.config.decoder, tie_word_embeddings=True))


def test_tied_embeddings(copied: Saved) -> None:
    without = {name: tensor for name, tensor in copied.flat.items() if name != "language_model.lm_head.weight"}
    expected = copied.model.keys() - {"decoder.lm_head.weight"}
    write(copied.folder, without)
    checkpoint = Checkpoint.open(copied.folder)
    assert with_stored_head(tied(copied), checkpoint) == tied(copied)
    weights = load_weights(checkpoint, tied(copied), device="cpu", dtype=torch.float32)
    assert dict(weights).keys() == expected == expected_shapes(tied(copied)).keys()
    with pytest.raises(CheckpointError, match=r"1 missing \(decoder\.lm_head\.weight\)"):
        load_weights(Checkpoint.open(copied.folder), copied.config, device="cpu", dtype=torch.float32)


def test_a_stored_head_is_used_whatever_the_flag_says(tmp_path: Path, seed: int) -> None:
    """As transformers does, which stores one even for tied embeddings."""
    saved = save_with_transformers(tmp_path, "musicflamingo", seed, tie_word_embeddings=True)
    assert saved.config.decoder.tie_word_embeddings
    checkpoint = Checkpoint.open(tmp_path)
    config = with_stored_head(saved.config, checkpoint)
    weights = dict(load_weights(checkpoint, config, device="cpu", dtype=torch.bfloat16))
    assert torch.equal(weights["decoder.lm_head.weight"], saved.model["decoder.lm_head.weight"])


def test_what_does_not_fit_is_listed_at_once(copied: Saved) -> None:
    weights = dict(copied.flat)
    for index in range(7):
        weights[f"vision_tower.layer{index}"] = torch.zeros(1)
    missing = [name for name in weights if re.search(r"audio_tower\.layers\.0\.fc\d", name)]
    for name in missing:
        del weights[name]
    weights["audio_tower.conv1.bias"] = torch.zeros(3, 2, dtype=torch.bfloat16)
    weights["audio_tower.conv2.bias"] = torch.zeros(40, dtype=torch.int8)
    weights["audio_tower.layer_norm.bias"] = torch.zeros(40, dtype=torch.bool)
    write(copied.folder, weights)
    with pytest.raises(CheckpointError) as caught:
        load_weights(Checkpoint.open(copied.folder), copied.config, device="cpu", dtype=torch.bfloat16)
    message = str(caught.value)
    assert "4 missing (encoder.layers.0.fc1.weight, encoder.layers.0.fc1.bias, " in message
    assert "7 unexpected (" in message
    assert message.count("vision_tower") == 5
    assert "1 misshapen (model.safetensors: tensor 'audio_tower.conv1.bias' [3, 2] instead of [40])" in message
    assert "2 in a dtype other than F8_E4M3, F8_E5M2, F16, BF16, F32, F64 (" in message
    assert "'audio_tower.conv2.bias' I8" in message
    assert "'audio_tower.layer_norm.bias' BOOL" in message


def test_a_config_of_another_size(saved: Saved) -> None:
    config = replace(saved.config, decoder=replace(saved.config.decoder, layers=512))
    with pytest.raises(CheckpointError, match=r"6120 missing \(decoder\.layers\.2\.input_layernorm\.weight, "):
        load_weights(Checkpoint.open(saved.folder), config, device="cpu", dtype=torch.bfloat16)


def test_two_spellings_of_one_parameter(copied: Saved) -> None:
    write(copied.folder, {**copied.flat, "model.audio_tower.conv1.bias": torch.zeros(40)})
    with pytest.raises(CheckpointError, match=r"are both 'encoder\.conv1\.bias'; keep one"):
        Checkpoint.open(copied.folder)


def test_unknown_parameter(saved: Saved) -> None:
    checkpoint = Checkpoint.open(saved.folder)
    assert "encoder.conv1.bias" in checkpoint
    assert "encoder.conv3.bias" not in checkpoint
    with pytest.raises(CheckpointError, match=r"has no parameter 'encoder\.conv3\.bias'"):
        checkpoint.tensor("encoder.conv3.bias")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickle_is_refused_unread(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(
        CheckpointError, match=rf"pickle \({re.escape(name)}\), which is refused.*convert it to safetensors"
    ):
        Checkpoint.open(tmp_path)


def test_nothing_to_load(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a folder"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        Checkpoint.open(tmp_path)
    write(tmp_path, saved.flat, shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"It has model-00001-of-00002\.safetensors, .*but no index"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be mapped"):
        Checkpoint.open(tmp_path)


def test_missing_component(saved: Saved, tmp_path: Path) -> None:
    write_components(tmp_path, saved.flat, shards=1)
    shutil.rmtree(tmp_path / "sound_mm_projector")
    with pytest.raises(CheckpointError, match=r"has llm, sound_tower but lacks sound_mm_projector"):
        Checkpoint.open(tmp_path)


def test_damaged_component_is_named(saved: Saved, tmp_path: Path) -> None:
    write_components(tmp_path, saved.flat, shards=1)
    path = tmp_path / "llm" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"^llm/model\.safetensors: tensor '.*' ends beyond the file"):
        Checkpoint.open(tmp_path)


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda names: names.update({"lm_head.x": FIRST}),
            rf"{FIRST} lacks, against its index, 1 tensors: 'lm_head\.x'",
        ),
        (lambda names: names.update({min(names): "model-3.safetensors"}), r"model-3\.safetensors is missing, though"),
        (
            lambda names: names.pop("audio_tower.conv1.bias"),
            r"has, against its index, 1 tensors: 'audio_tower\.conv1\.bias'",
        ),
        (lambda names: names.clear(), r"has no weight_map of names to files"),
        *(
            (lambda names, path=path: names.update({min(names): path}), r"only \.safetensors files that lie beside it")
            for path in ("../x.safetensors", "/x.safetensors", "a/b.safetensors", "a\\b.safetensors", ".x.safetensors")
        ),
        (lambda names: names.update({min(names): "model.bin"}), r"into 'model\.bin'; only \.safetensors files"),
        (lambda names: names.update({min(names): 3}), r"into 3; only \.safetensors files"),
    ],
)
def test_index_that_lies(change: Callable[[dict[str, Any]], Any], message: str, saved: Saved, tmp_path: Path) -> None:
    write(tmp_path, saved.flat, shards=2)
    save_file({"a": torch.zeros(1)}, tmp_path.parent / "x.safetensors")
    Checkpoint.open(tmp_path)
    change_index(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_shards(saved: Saved, tmp_path: Path) -> None:
    write(tmp_path, saved.flat, shards=2)
    name = next(iter(load_file(tmp_path / SECOND)))
    save_file(load_file(tmp_path / FIRST) | {name: saved.flat[name]}, tmp_path / FIRST)
    with pytest.raises(CheckpointError, match=rf"^{FIRST} has, against its index, 1 tensors: '{re.escape(name)}'"):
        Checkpoint.open(tmp_path)


def test_single_file_beside_an_index(saved: Saved, tmp_path: Path) -> None:
    write(tmp_path, saved.flat, shards=2)
    write(tmp_path, saved.flat)
    with pytest.raises(CheckpointError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        Checkpoint.open(tmp_path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject, saved: Saved, tmp_path: Path) -> None:
    content = bytearray((saved.folder / "model.safetensors").read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for position in data.draw(st.lists(st.integers(0, header_end - 1), min_size=1, max_size=3)):
        content[position] = data.draw(st.integers(0, 255))
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) - data.draw(st.sampled_from([0, 0, 1, 5000]))])
    try:
        weights = dict(load_weights(Checkpoint.open(tmp_path), saved.config, device="cpu", dtype=torch.float32))
    except CheckpointError:
        return
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected_shapes(saved.config)


MEMORY_SCRIPT = """
import re, sys
import torch
from afnext.runtime.model.checkpoint import Checkpoint, load_weights
from afnext.runtime.model.config import ModelConfig

def kibibytes(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.zeros(1, dtype=torch.bfloat16).to(torch.float32)
config = ModelConfig.from_folder(folder)
before = kibibytes("VmRSS")
weights = dict(load_weights(Checkpoint.open(folder), config, device="cpu", dtype=dtype))
print((kibibytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
def test_peak_memory_of_loading(tmp_path: Path, seed: int) -> None:
    config = {
        "model_type": "audioflamingo3",
        "audio_token_id": 5,
        "audio_config": {"num_mel_bins": 8, "hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4},
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 1000,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    shapes = expected_shapes(ModelConfig.from_folder(tmp_path))
    write(tmp_path, {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}, shards=2)
    stored = Checkpoint.open(tmp_path).nbytes
    largest = max(torch.Size(shape).numel() for shape in shapes.values()) * 4
    slack = 16 << 20

    def peak(dtype: str) -> int:
        command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path), dtype]
        environment = {"OMP_NUM_THREADS": "1", "PATH": ""}
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    converted = peak("float32")
    assert 2 * stored <= converted + slack
    assert converted <= 2 * stored + largest + slack < 3 * stored
    assert peak("bfloat16") <= slack < stored / 2
