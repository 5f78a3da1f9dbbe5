"""The training model computes what the runtime computes on the checkpoint exported from it."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import afnext
from afnext.bench.tiny.batches import PREFIX, crop_log_mel
from afnext.bench.tiny.export import export
from afnext.bench.tiny.model import MARGIN, TinyModel
from afnext.bench.tiny.tokenizer import build_tokenizer
from afnext.runtime.engine.kv_cache import KVCache, page_table
from afnext.runtime.model.decoder import CacheView

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, afnext.Model]:
    """A training model with random weights, and the runtime's model of its export."""
    torch.manual_seed(0)
    model = TinyModel(TOKENIZER.get_vocab_size())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model.eval(), afnext.load(export(model, tmp_path_factory.mktemp("tiny")))


@torch.inference_mode()
def test_audio_tokens_and_scores_equal_the_runtimes(pair: tuple[TinyModel, afnext.Model], seed: int) -> None:
    trained, loaded = pair
    samples = torch.randn(3 * 16_000) * 0.1
    padded = torch.nn.functional.pad(samples, (0, MARGIN * 320))
    mel = crop_log_mel(padded[None].numpy())
    start = torch.zeros(1, dtype=torch.long)
    audio = trained.audio(mel, start, start, 0)
    network = loaded.network
    expected = network.encode(network.log_mel([samples]), [len(samples)], [0])[0]
    assert audio.shape[1] == 75 == len(expected)
    torch.testing.assert_close(audio[0], expected, atol=2e-4, rtol=1e-3)

    embed = trained.decoder.embed_tokens
    prompt, question = (torch.tensor(TOKENIZER.encode(text).ids) for text in (PREFIX, "<|sound_eos|>What is it?"))
    x = torch.cat((embed(prompt), audio[0], embed(question)))[None]
    positions = torch.arange(x.shape[1])[None]
    bias = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
    logits = trained.language_model["lm_head"](trained.decode(x, positions, bias)[0])[0]

    cache = KVCache(network.config.decoder, pages=2, page_size=256, device=network.device, dtype=torch.float32)
    table = page_table([cache.allocate(x.shape[1])], network.device)
    view = CacheView.of(cache.keys, cache.values, table, positions)
    own = network.decoder.logits(network.decoder(x, positions, view))[0]
    torch.testing.assert_close(logits, own, atol=1e-3, rtol=1e-3)


def test_a_later_crop_stands_at_its_own_time(pair: tuple[TinyModel, afnext.Model], seed: int) -> None:
    trained, _ = pair
    mel = torch.randn(2, 80, 2 * (100 + 2 * MARGIN))
    starts, windows = torch.tensor([0, 500]), torch.tensor([0, 7])
    with torch.inference_mode():
        both = trained.audio(mel, starts, windows, MARGIN)
        alone = trained.audio(mel[1:], starts[1:], windows[1:], MARGIN)
    torch.testing.assert_close(both[1:], alone)
    assert (both[0] - both[1]).abs().mean() > 0.01


def test_the_checkpoint_is_small_and_half_precision(pair: tuple[TinyModel, afnext.Model], tmp_path: Path) -> None:
    folder = export(pair[0], tmp_path)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 16_000_000
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
