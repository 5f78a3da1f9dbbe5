"""The stages one after the other against the whole model, and the file of hidden states."""

from pathlib import Path

import pytest
import torch
from support.audio import speech_like
from support.checkpoints import relative_rms, save_checkpoint

from afnext.kernels.audio_format import WINDOW_SAMPLES
from afnext.quant.calibrate import InputStatistics
from afnext.runtime.engine.kv_cache import KVCache, page_table
from afnext.runtime.engine.layerwise import HiddenStates, PlacedPrompt, Stage, Stem, Window, decoder_inputs, stages
from afnext.runtime.model.audio_flamingo import AudioFlamingo
from afnext.runtime.model.encoder import token_count
from afnext.runtime.model.weights import fill


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo:
    folder = tmp_path_factory.mktemp("layerwise")
    save_checkpoint(folder, scale=2.0)
    return AudioFlamingo.from_folder(folder, device=torch.device("cpu"), dtype=lambda _: torch.float32)


def filled(stage: Stage, network: AudioFlamingo) -> Stage:
    names = [name for name, _ in stage.module.named_buffers()]
    fill(stage.module, [(name, network.get_buffer(stage.canonical(name))) for name in names])
    return stage


def through(path: Path, states: HiddenStates, following: list[Stage], network: AudioFlamingo) -> HiddenStates:
    for number, stage in enumerate(following):
        outputs = filled(stage, network).outputs(states)
        states = HiddenStates.write(path / f"{stage.name}-{number}", outputs, lambda *_: None, len(states))
    return states


@torch.inference_mode()
def test_stages_make_what_the_model_makes(tmp_path: Path, network: AudioFlamingo) -> None:
    # The second window of a recording, cut short; and a prompt longer than a chunk goes through a layer in pieces.
    waveforms = [torch.from_numpy(speech_like(seconds, 3)) for seconds in (30.0, 2.2)]
    assert waveforms[0].numel() == WINDOW_SAMPLES
    samples = [waveform.numel() for waveform in waveforms]
    on_windows, on_prompts = stages(network.config, tuple(map(Window, samples, (0, 1))))
    stem = Stem(network.config.encoder.mel_bins, torch.float32, network.get_buffer)
    heard = HiddenStates.write(tmp_path / "0", map(stem.run, waveforms), lambda *_: None, 2)
    audio = through(tmp_path, heard, on_windows, network)
    expected = network.encode(network.log_mel(waveforms), samples, [0, 1])
    for actual, whole in zip(audio, expected, strict=True):
        assert relative_rms(actual, whole) < 1e-5

    first = token_count(WINDOW_SAMPLES)
    ids = tuple(range(7)) + (9,) * (first + len(expected[1])) + tuple(range(200)) + tuple(range(100))
    prompts = [PlacedPrompt(ids, (7, 7 + first)), PlacedPrompt((5, 6, 7), ())]
    x = network.decoder.embed(torch.tensor(ids))
    x[7 : 7 + first + len(expected[1])] = torch.cat(expected)
    inputs = decoder_inputs(prompts, audio, network.decoder.embed)
    entering = HiddenStates.write(tmp_path / "1", inputs, lambda *_: None, 2)
    normed = list(through(tmp_path, entering, on_prompts, network))
    for actual, whole in zip(normed, (x, network.decoder.embed(torch.tensor([5, 6, 7]))), strict=True):
        cache = KVCache(network.config.decoder, pages=8, page_size=256, device=x.device, dtype=x.dtype)
        positions = torch.arange(len(whole))[None]
        view = cache.view(page_table([cache.allocate(len(whole))], x.device), positions)
        assert relative_rms(actual, network.decoder(whole[None], positions, view)[0]) < 1e-5


def test_every_parameter_that_a_stage_has_is_the_model_s(network: AudioFlamingo) -> None:
    on_windows, on_prompts = stages(network.config, ())
    names = [stage.canonical(name) for stage in on_windows + on_prompts for name, _ in stage.module.named_buffers()]
    assert len(names) == len(set(names))
    left = {name for name, _ in network.named_buffers()} - set(names)
    stem = {f"encoder.{name}" for name in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")}
    assert left == stem | {"encoder.embed_positions.weight", "decoder.embed_tokens.weight"}


@torch.inference_mode()
def test_statistics_are_those_of_what_comes_in(tmp_path: Path, network: AudioFlamingo, seed: int) -> None:
    stage = filled(stages(network.config, ())[1][0], network)
    states = HiddenStates.write(tmp_path / "x", [torch.randn(5, 64), torch.randn(4, 64)], lambda *_: None, 2)
    statistics = {
        fold.targets[0]: InputStatistics(len(fold_input(stage, fold.targets[0])), 9, 9) for fold in stage.folds
    }
    stage.gather(states, statistics, lambda *_: None)
    norm = stage.module.get_submodule("input_layernorm").weight
    entering = torch.cat([x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm for x in states])
    torch.testing.assert_close(statistics["self_attn.q_proj"].rows, entering[[0, 4]])
    entering[[0, 4]] = 0
    torch.testing.assert_close(statistics["self_attn.q_proj"].gram, entering.T @ entering, rtol=1e-4, atol=1e-4)
    assert all(part.gram.count_nonzero() for part in statistics.values())


def fold_input(stage: Stage, layer: str) -> torch.Tensor:
    return stage.module.get_submodule(layer).weight[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_come_back(tmp_path: Path, dtype: torch.dtype, seed: int) -> None:
    given = [torch.randn(length, 6).to(dtype) for length in (3, 1, 7)]
    seen: list[tuple[int, int]] = []
    states = HiddenStates.write(tmp_path / "x", given, lambda done, total: seen.append((done, total)), 3)
    again = HiddenStates(tmp_path / "x", states.lengths, states.width, states.dtype)
    for _ in range(2):
        assert [x.tolist() for x in again] == [x.tolist() for x in given]
    assert (states.lengths, states.width, states.dtype) == ((3, 1, 7), 6, dtype)
    assert seen == [(1, 3), (2, 3), (3, 3)]
