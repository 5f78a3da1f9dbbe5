"""llama.cpp as a baseline: files that its own reader understands, and the function that our runtime computes."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.bench.core.record import read
from afnext.bench.model import llama_cpp, llama_cpp_comparison
from afnext.bench.model.llama_cpp_comparison import run_llama_cpp
from afnext.kernels.errors import AfnextError
from afnext.runtime.app.api import load
from afnext.runtime.engine.kv_cache import KVCache, page_table
from afnext.runtime.model.audio_flamingo import AudioFlamingo
from afnext.runtime.model.config import ModelConfig

gguf = pytest.importorskip("gguf", reason="GGUF files are written with the package gguf")
random_gguf = pytest.importorskip("afnext.bench.model.random_gguf")


def library_missing() -> str:
    try:
        llama_cpp.library()
    except AfnextError as error:
        return str(error)
    return ""


needs_library = pytest.mark.skipif(bool(library_missing()), reason=library_missing())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint without RoTE, which llama.cpp does not compute."""
    folder = write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "audioflamingo3"}))
    return folder


@pytest.fixture(scope="module")
def network(checkpoint: Path) -> AudioFlamingo:
    return load(checkpoint, device="cpu", dtype="float32").network


def backbone(folder: Path, checkpoint: Path, kind: str = "bf16") -> Path:
    return random_gguf.write_random_backbone(folder / f"{kind}.gguf", ModelConfig.from_folder(checkpoint), kind)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def scores_after(network: AudioFlamingo, x: Tensor) -> Tensor:
    """[1, vocab]: of our runtime, after embeddings [1, time, hidden]."""
    with torch.inference_mode():
        cache = KVCache(network.config.decoder, pages=1, page_size=64, device=network.device, dtype=network.dtype)
        positions = torch.arange(x.shape[1])[None]
        view = cache.view(page_table([cache.allocate(x.shape[1])], network.device), positions)
        return network.decoder.logits(network.decoder(x, positions, view)[:, -1])


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_0"])
def test_the_reader_of_gguf_finds_every_tensor_of_a_backbone(tmp_path: Path, checkpoint: Path, kind: str) -> None:
    config = ModelConfig.from_folder(checkpoint).decoder
    reader = gguf.GGUFReader(backbone(tmp_path, checkpoint, kind))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 12 * config.layers
    assert tensors["blk.1.ffn_down.weight"].shape.tolist() == [config.intermediate_size, config.hidden_size]
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == kind.upper()
    assert tensors["blk.0.attn_q.bias"].tensor_type.name == "F32"
    assert reader.get_field("qwen2.attention.head_count_kv").contents() == config.kv_heads


def test_packed_weights_have_the_size_of_dense_ones_and_layers_repeat(tmp_path: Path, checkpoint: Path) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(backbone(tmp_path, checkpoint, "q4_0")).tensors}
    gate = tensors["blk.0.ffn_gate.weight"]
    weights = gguf.quants.dequantize(gate.data, gate.tensor_type)
    assert weights.std() == pytest.approx(weights.shape[1] ** -0.5, rel=0.05)
    np.testing.assert_array_equal(gate.data, tensors["blk.1.ffn_gate.weight"].data)


def test_blocks_of_the_head_unpack_to_weights_of_that_size_too() -> None:
    shape = (64, 512)
    (blocks,) = random_gguf._random_blocks({"head": shape}, {"head": "q6_k"}, seed=0)
    weights = gguf.quants.dequantize(blocks.view(np.uint8).reshape(64, -1), gguf.GGMLQuantizationType.Q6_K)
    assert weights.shape == shape
    assert weights.std() == pytest.approx(512**-0.5, rel=0.05)


def wide(config: ModelConfig, layers: int) -> ModelConfig:
    """A config whose rows hold whole blocks of Q4_K."""
    decoder = replace(config.decoder, hidden_size=256, intermediate_size=512, heads=16, layers=layers)
    return replace(config, decoder=decoder)


def test_q4_k_m_is_llama_cpps_mix(tmp_path: Path, checkpoint: Path) -> None:
    config = wide(ModelConfig.from_folder(checkpoint), 16)
    reader = gguf.GGUFReader(random_gguf.write_random_backbone(tmp_path / "mix.gguf", config, "q4_k_m"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kinds = [tensors[f"blk.{layer}.ffn_down.weight"].tensor_type.name for layer in range(16)]
    assert [layer for layer, kind in enumerate(kinds) if kind == "Q6_K"] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert kinds == [tensors[f"blk.{layer}.attn_v.weight"].tensor_type.name for layer in range(16)]
    assert tensors["output.weight"].tensor_type.name == "Q6_K"
    gate = tensors["blk.0.ffn_gate.weight"]
    assert gate.tensor_type.name == "Q4_K"
    weights = gguf.quants.dequantize(gate.data, gate.tensor_type)
    assert weights.std() == pytest.approx(256**-0.5, rel=0.05)
    assert abs(weights.mean()) < 0.01 * weights.std()
    with pytest.raises(ValueError, match="multiple of 256"):
        backbone(tmp_path, checkpoint, "q4_k_m")


@needs_library
@pytest.mark.parametrize("flash", [True, False])
def test_both_sides_compute_the_same_scores_of_the_same_weights(
    tmp_path: Path, checkpoint: Path, network: AudioFlamingo, flash: bool
) -> None:
    model = llama_cpp.LlamaCppModel(backbone(tmp_path, checkpoint))
    subject = llama_cpp.LlamaCpp("llama.cpp bf16", model, flash=flash)
    subject.hold([torch.empty(0)], [torch.empty(0)], room=16)
    x = torch.randn(1, 7, model.hidden_size, generator=torch.Generator().manual_seed(1))
    for time in (7, 1):  # the second call finds the prefix as the first one did
        assert relative_error(subject.extend(x[:, :time]), scores_after(network, x[:, :time])) < 0.02


@needs_library
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
def test_a_prefix_takes_part_and_stays_as_it_is(tmp_path: Path, checkpoint: Path, narrow: bool, flash: bool) -> None:
    """Computed by the model itself, or copied from a narrow one."""
    model, prefixes = llama_cpp.LlamaCppModel(backbone(tmp_path, checkpoint)), None
    if narrow:
        config = llama_cpp_comparison._narrow(ModelConfig.from_folder(checkpoint))
        prefixes = llama_cpp.LlamaCppModel(random_gguf.write_random_backbone(tmp_path / "narrow.gguf", config, "bf16"))
    subject = llama_cpp.LlamaCpp("llama.cpp bf16", model, flash=flash, prefixes=prefixes)
    x = torch.randn(1, 1, model.hidden_size, generator=torch.Generator().manual_seed(1))
    scores = []
    for depth in (0, 600):
        subject.hold([torch.empty(depth, 2, 16)], [torch.empty(depth, 2, 16)], room=16)
        scores += [subject.step(x), subject.step(x)]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[2], scores[3])
    assert relative_error(scores[2], scores[0]) > 0.1


@needs_library
def test_both_sides_encode_a_window_alike(tmp_path: Path, checkpoint: Path, network: AudioFlamingo) -> None:
    waveform = 0.1 * np.random.default_rng(0).standard_normal(480_000).astype(np.float32)
    encoder = random_gguf.write_random_encoder(tmp_path / "encoder.gguf", ModelConfig.from_folder(checkpoint))
    model = llama_cpp.LlamaCppModel(backbone(tmp_path, checkpoint))
    theirs = llama_cpp.LlamaCppEncoder(encoder, model, waveform).encode()
    with torch.inference_mode():
        mel = network.log_mel([torch.from_numpy(waveform)])
        ours = network.encode(mel, [waveform.size], [0])[0]
    assert theirs.shape == ours.shape == (750, model.hidden_size)
    assert relative_error(theirs, ours) < 0.02


@needs_library
def test_the_comparison_measures_every_stage_for_both_sides(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    records = run_llama_cpp(
        out, shape="tiny", schemes=["int8"], kinds=["q8_0"], depths=[0, 20], chunk=8, repeats=2, quiet=True
    )
    assert list(read(out)) == records
    subjects = ["afnext int8", "llama.cpp q8_0, flash", "llama.cpp q8_0, no flash"]
    cases = ["one window", "8 tokens after 0", "8 tokens after 20", "1 token after 0", "1 token after 20"]
    assert [(r.case["label"], r.subject) for r in records] == list(product(cases, subjects))
    for ours, *theirs in (records[i : i + 3] for i in range(0, len(records), 3)):
        best = min(theirs, key=lambda record: record.values["median_s"])
        assert ours.values["speedup_over"] == best.subject
        assert ours.values["speedup"] == pytest.approx(best.values["median_s"] / ours.values["median_s"])
        assert best.values["compiled_for"].startswith("CPU")


@needs_library
def test_decoding_is_extrapolated_to_all_layers(tmp_path: Path) -> None:
    """The two numbers of layers, and the full model's time on the line through them; with quantized KV caches too."""
    records = run_llama_cpp(
        tmp_path / "results.jsonl", shape="tiny", schemes=["int8", "int8+kv4", "q4_k"], kinds=["q8_0"],
        stages=["decode"], depths=[20], repeats=2, fewer=1, quiet=True,
    )  # fmt: skip
    assert [record.kind for record in records] == ["measured"] * 10 + ["extrapolated"] * 5
    for more, few, full in zip(records[:5], records[5:10], records[10:], strict=True):
        assert more.subject == few.subject == full.subject
        seconds = [record.values["median_s"] for record in (more, few, full)]
        assert seconds[2] == pytest.approx(seconds[0] + (28 - 2) * (seconds[0] - seconds[1]))
        assert full.values["tokens_per_s"] == pytest.approx(1 / seconds[2])
        assert full.case["model"] == "full"


@needs_library
def test_nothing_is_extrapolated_from_one_number_of_layers(tmp_path: Path) -> None:
    with pytest.raises(AfnextError, match="2 and 2 layers"):
        run_llama_cpp(
            tmp_path / "results.jsonl", shape="tiny", schemes=["int8"], stages=["decode"], fewer=2, quiet=True
        )


def test_an_unknown_scheme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AfnextError, match="unknown scheme"):
        run_llama_cpp(tmp_path / "results.jsonl", shape="tiny", schemes=["int5"])


def test_a_library_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(llama_cpp.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(AfnextError, match=r"none\.so is no llama\.cpp"):
        llama_cpp.library.__wrapped__()


@needs_library
def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(AfnextError, match="cannot load"):
        llama_cpp.LlamaCppModel(tmp_path / "empty.gguf")
