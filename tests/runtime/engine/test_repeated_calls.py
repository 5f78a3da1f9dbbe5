"""The decoder's layers from a recording against plain calls of the decoder."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from afnext import kernels
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.kernels import native
from afnext.kernels.native.threads import limited_threads
from afnext.quant.recipe import recipe
from afnext.runtime.engine.kv_cache import QUANTIZED, KVCache, page_table
from afnext.runtime.engine.repeated_calls import MOST_TOKENS, RepeatedCalls, repeatable
from afnext.runtime.model.audio_flamingo import AudioFlamingo
from afnext.runtime.model.decoder import CacheView

PAGE_SIZE, ROOM = 16, 64
needs_native = pytest.mark.skipif(not native.AVAILABLE, reason="the native kernels are not built")


def packed_model(folder: Path, scheme: str | None, dtype: torch.dtype) -> AudioFlamingo:
    quant = None if scheme is None else recipe(scheme)
    write_random_checkpoint(folder, quant=quant)
    return AudioFlamingo.from_folder(folder, device=torch.device("cpu"), dtype=lambda stored: dtype)


def one_sequence(model: AudioFlamingo) -> tuple[Tensor, Callable[[], CacheView]]:
    """The position of the first token of a sequence, and what views its place in a cache."""
    cache = KVCache(model.config.decoder, pages=4, page_size=PAGE_SIZE, device=model.device, dtype=model.dtype)
    table, positions = page_table([cache.allocate(ROOM)], model.device), torch.tensor([[0]])
    return positions, lambda: cache.view(table, positions)


@needs_native
@pytest.mark.parametrize("kv", ["dense", "int8", "fp8", "int4"])
@pytest.mark.parametrize("scheme", ["int8", "int8-w8a8", "int4-g32", "int4-g32-w4a8"])
@torch.inference_mode()
def test_repeated_equals_plain(
    scheme: str, kv: str, tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Sequences of any lengths and pages, with one recording, bit for bit, in the cache as well."""
    model = packed_model(tmp_path, scheme, torch.bfloat16)
    config, decoder = model.config.decoder, model.decoder
    cache = KVCache(
        config,
        pages=3 * ROOM // PAGE_SIZE,
        page_size=PAGE_SIZE,
        device=model.device,
        dtype=QUANTIZED.get(kv, model.dtype),
    )
    for pool in cache.pools:
        pool.copy_(torch.rand(pool.shape) / 64 if pool.is_floating_point() else torch.randint(0, 128, pool.shape))
    table = torch.zeros(3, ROOM // PAGE_SIZE, dtype=torch.int32)
    layers, tokens = RepeatedCalls(decoder), torch.randint(0, 256, (6, 3, 1))
    pages = [cache.allocate(ROOM) for _ in range(3)]
    with caplog.at_level(logging.INFO, "afnext.engine"):
        for newest in tokens:
            positions = torch.randint(0, ROOM, (3, 1))
            table.copy_(page_table([pages[i] for i in torch.randperm(3).tolist()], model.device))
            before = [pool.clone() for pool in cache.pools]
            expected = decoder(decoder.embed(newest), positions, cache.view(table, positions)).clone()
            written = [pool.clone() for pool in cache.pools]
            for pool, earlier in zip(cache.pools, before, strict=True):
                pool.copy_(earlier)
            assert torch.equal(layers(decoder.embed(newest), positions, cache.view(table, positions)), expected)
            assert all(torch.equal(*pair) for pair in zip(cache.pools, written, strict=True))
    assert [record.message.split()[:2] for record in caplog.records] == [["decoding", "repeats"]]


@needs_native
@torch.inference_mode()
def test_another_number_of_threads_goes_the_usual_way(tmp_path: Path, seed: int, restored_threads: None) -> None:
    model = packed_model(tmp_path, "int8", torch.float32)
    positions, view = one_sequence(model)
    layers, decoder = RepeatedCalls(model.decoder), model.decoder
    torch.set_num_threads(1)
    out = [layers(decoder.embed(torch.tensor([[7]])), positions, view()) for _ in range(3)]
    assert out[1].data_ptr() == out[2].data_ptr()
    torch.set_num_threads(2)
    again = layers(decoder.embed(torch.tensor([[7]])), positions, view())
    assert again.data_ptr() != out[2].data_ptr()
    torch.testing.assert_close(again, out[2])


@needs_native
@torch.inference_mode()
def test_fewer_threads_repeat_the_same_calls(tmp_path: Path, seed: int, restored_threads: None) -> None:
    """Also if the calls were recorded while fewer were used: their scratch memory serves all."""
    model = packed_model(tmp_path, "int8", torch.bfloat16)
    positions, view = one_sequence(model)
    layers, x = RepeatedCalls(model.decoder), model.decoder.embed(torch.tensor([[7]]))
    torch.set_num_threads(4)
    found = []
    for most in (1, 2, 1, None, 3):
        with limited_threads(most):
            found.append(layers(x.clone(), positions, view()))
            assert torch.equal(found[-1], model.decoder(x, positions, view()))
    assert len({out.data_ptr() for out in found[1:]}) == 1


@needs_native
@torch.inference_mode()
def test_another_level_goes_the_usual_way(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded at the best level, then forced to the lowest: the result is that of plain calls there."""
    model = packed_model(tmp_path, "int8", torch.float32)
    positions, view = one_sequence(model)
    layers, decoder = RepeatedCalls(model.decoder), model.decoder
    x = decoder.embed(torch.tensor([[7]]))
    recorded = [layers(x.clone(), positions, view()) for _ in range(3)][-1]
    monkeypatch.setenv("AFNEXT_ISA", "portable")
    again = layers(x.clone(), positions, view())
    assert again.data_ptr() != recorded.data_ptr() or native.supported_levels() == ("portable",)
    assert torch.equal(again, decoder(x, positions, view()))


@needs_native
@torch.inference_mode()
def test_an_interrupted_recording_is_made_again(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = packed_model(tmp_path, "int8", torch.float32)
    positions, view = one_sequence(model)
    layers, x = RepeatedCalls(model.decoder), model.decoder.embed(torch.tensor([[7]]))
    expected = layers(x.clone(), positions, view()).clone()
    with monkeypatch.context() as patch:
        patch.setattr(type(model.decoder.layers[-1]), "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            layers(x.clone(), positions, view())
    with caplog.at_level(logging.INFO, "afnext.engine"):
        for _ in range(3):
            assert torch.equal(layers(x.clone(), positions, view()), expected)
    assert [record.message.split()[:2] for record in caplog.records] == [["decoding", "repeats"]]


def interrupted(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


@needs_native
@torch.inference_mode()
def test_dense_weights_are_not_recorded_and_the_log_says_why(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = packed_model(tmp_path, None, torch.float32)
    positions, view = one_sequence(model)
    layers, decoder = RepeatedCalls(model.decoder), model.decoder
    x = torch.randn(1, 1, model.config.decoder.hidden_size)
    with caplog.at_level(logging.INFO, "afnext.engine"):
        for _ in range(3):
            out = layers(x, positions, view())
            assert torch.equal(out, decoder(x, positions, view()))
    assert [record.message for record in caplog.records] == [
        "decoding is not recorded, as aten::linear is computed between the native calls"
    ]


def test_only_native_kernels_are_repeated() -> None:
    assert repeatable(torch.device("cpu")) == native.AVAILABLE
    assert not repeatable(torch.device("cuda"))
    assert repeatable(torch.device("cpu"), MOST_TOKENS) == native.AVAILABLE
    assert not repeatable(torch.device("cpu"), MOST_TOKENS + 1)
    with kernels.backend("torch"):
        assert not repeatable(torch.device("cpu"))
