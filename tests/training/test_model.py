"""The training model computes what the runtime computes on the checkpoint exported from it."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import afnext
from afnext.kernels.log_mel import log_mel
from afnext.runtime.engine.kv_cache import KVCache, page_table
from afnext.runtime.model.decoder import CacheView
from training.batches import PREFIX
from training.export import export
from training.model import MELS, TinyModel
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, afnext.Model]:
    """A training model with random weights, and the runtime's model of its export."""
    torch.manual_seed(0)
    model = TinyModel(TOKENIZER.get_vocab_size())
    model.round_as_stored()
    return model.eval(), afnext.load(export(model, tmp_path_factory.mktemp("tiny")))


@torch.inference_mode()
def test_audio_tokens_and_scores_equal_the_runtimes(pair: tuple[TinyModel, afnext.Model], seed: int) -> None:
    trained, loaded = pair
    window = 30 * 16_000
    samples = torch.randn(2 * window) * 0.1
    mel = torch.cat([log_mel(half[None], mel_bins=MELS, window_samples=window) for half in samples.split(window)])
    audio = trained.adapted(trained.audio_tower(mel, torch.arange(2))).flatten(0, 1)
    network = loaded.network
    mels = network.log_mel(list(samples.split(window)))
    expected = torch.cat(network.encode(mels, [window, window], [0, 1]))
    assert len(audio) == 1500 == len(expected)
    torch.testing.assert_close(audio, expected, atol=2e-4, rtol=1e-3)

    embed = trained.decoder.embed_tokens
    prompt, question = (torch.tensor(TOKENIZER.encode(text).ids) for text in (PREFIX, "<|sound_eos|>What is it?"))
    x = torch.cat((embed(prompt), audio[:100], embed(question)))[None]
    positions = torch.arange(x.shape[1])[None]
    bias = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
    logits = trained.language_model["lm_head"](trained.decode(x, positions, bias)[0])[0]

    cache = KVCache(network.config.decoder, pages=2, page_size=256, device=network.device, dtype=torch.float32)
    table = page_table([cache.allocate(x.shape[1])], network.device)
    view = CacheView.of(cache.keys, cache.values, table, positions)
    own = network.decoder.logits(network.decoder(x, positions, view))[0]
    torch.testing.assert_close(logits, own, atol=1e-3, rtol=1e-3)


def test_the_window_tells_tokens_apart(pair: tuple[TinyModel, afnext.Model], seed: int) -> None:
    trained, _ = pair
    mel = torch.randn(1, MELS, 400).expand(2, -1, -1)
    with torch.inference_mode():
        first, later = trained.audio_tower(mel, torch.tensor([0, 7]))
    assert (first - later).abs().mean() > 0.01


def test_the_checkpoint_is_small_and_of_two_precisions(pair: tuple[TinyModel, afnext.Model], tmp_path: Path) -> None:
    folder = export(pair[0], tmp_path)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 16_000_000
    with safe_open(folder / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert set(dtypes.values()) == {torch.float16, torch.float8_e4m3fn}
    small = [name for name, dtype in dtypes.items() if dtype == torch.float8_e4m3fn]
    assert all(re.fullmatch(r"audio_tower\.layers\.\d\.[\w.]+\.weight", name) for name in small)
