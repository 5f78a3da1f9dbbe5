"""The life of requests: ends, cancellation, what is held in memory, errors."""

import pytest
import torch
from support.audio import speech_like

from afnext.bench.random_checkpoint import write_random_checkpoint
from afnext.runtime.engine.generate import EngineOptions, Generation, Request
from afnext.runtime.engine.prefill import AudioInput
from afnext.runtime.engine.sampler import Sampler, SamplingParams
from afnext.runtime.errors import ContextLengthError
from afnext.runtime.model.audio_flamingo import AudioFlamingo

OPTIONS = EngineOptions(page_size=16, chunk_size=64, encode_batch=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo:
    folder = write_random_checkpoint(tmp_path_factory.mktemp("random"))
    return AudioFlamingo.from_folder(folder, device=torch.device("cpu"), dtype=lambda stored: torch.float32)


def request(
    model: AudioFlamingo, new_tokens: int, seconds: float = 0.0, content: int = 0, **sampling: object
) -> Request:
    """Some text, and a recording where `seconds` is above 0."""
    text = torch.randint(0, 256, (9,), generator=torch.Generator().manual_seed(content)).tolist()
    params = SamplingParams(new_tokens, **sampling)  # type: ignore[arg-type]
    if not seconds:
        return Request(text, (), params)
    audio = torch.from_numpy(speech_like(seconds, content))
    windows = audio.split(480_000)
    tokens = [((((len(w) + 159) // 160 - 1) // 2 + 1) - 2) // 2 + 1 for w in windows]
    prompt = [*text[:4], *[model.config.audio_token_id] * sum(tokens), *text[4:]]
    return Request(prompt, (AudioInput(4, windows),), params)


def run(generation: Generation) -> list[list[int]]:
    for _ in generation:
        pass
    return [sequence.tokens for sequence in generation.sequences]


def test_all_pages_are_free_at_the_end(model: AudioFlamingo, seed: int) -> None:
    generation = Generation(model, [request(model, 5, 1.0, seed), request(model, 20, 0, seed)], OPTIONS)
    pool = generation._cache.pool
    assert pool.free == 0
    run(generation)
    assert pool.free == pool.pages
    assert [len(sequence.tokens) for sequence in generation.sequences] == [5, 20]
    assert {sequence.finish_reason for sequence in generation.sequences} == {"length"}


def test_a_stop_token_ends_a_request_and_is_kept(model: AudioFlamingo, seed: int) -> None:
    sampling = {"temperature": 2.0, "seed": seed}
    (free,) = run(Generation(model, [request(model, 30, 0, seed, **sampling)], OPTIONS))
    stop = free[10]
    generation = Generation(model, [request(model, 30, 0, seed, **sampling, stop_token_ids=(stop,))], OPTIONS)
    (tokens,) = run(generation)
    assert tokens == free[: free.index(stop) + 1]
    assert generation.sequences[0].finish_reason == "stop"


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_cancellation_keeps_what_there_is_and_frees_the_rest(model: AudioFlamingo, when: str, seed: int) -> None:
    state = {"cancelled": False}

    def progress(done: int, total: int) -> None:
        state["cancelled"] |= when == "prefill" and done >= 128

    generation = Generation(
        model,
        [request(model, 50, 20.0, seed), request(model, 50, 0, seed)],
        OPTIONS,
        progress=progress,
        cancelled=lambda: state["cancelled"],
    )
    for count, _ in enumerate(generation):
        state["cancelled"] |= when == "decode" and count == 10
    counts = [len(sequence.tokens) for sequence in generation.sequences]
    assert sum(counts) == (0 if when == "prefill" else 12)
    assert {sequence.finish_reason for sequence in generation.sequences} == {"cancelled"}
    assert generation._cache.pool.free == generation._cache.pool.pages


def test_one_of_a_batch_can_be_ended_without_disturbing_the_others(model: AudioFlamingo, seed: int) -> None:
    requests = [request(model, 12, 2.0, seed + i) for i in range(3)]
    expected = run(Generation(model, requests, OPTIONS))
    generation = Generation(model, requests, OPTIONS)
    for index, _ in generation:
        if index == 1 and len(generation.sequences[1].tokens) == 4:
            generation.finish(1, "cancelled")
    assert [sequence.tokens for sequence in generation.sequences] == [expected[0], expected[1][:4], expected[2]]
    assert [sequence.finish_reason for sequence in generation.sequences] == ["length", "cancelled", "length"]


def test_leaving_the_loop_frees_the_pages(model: AudioFlamingo, seed: int) -> None:
    generation = Generation(model, [request(model, 50, 0, seed)], OPTIONS)
    tokens = iter(generation)
    next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    assert generation._cache.pool.free == generation._cache.pool.pages


def test_windows_are_encoded_just_ahead_of_their_chunk(
    model: AudioFlamingo, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Never more than one batch of windows waits for the decoder, however long the audio."""
    encoded, seen = 0, []
    encode = model.encode

    def counting(mel: torch.Tensor, samples: list[int], windows: list[int]) -> list[torch.Tensor]:
        nonlocal encoded
        encoded += len(samples)
        assert len(samples) <= OPTIONS.encode_batch
        return encode(mel, samples, windows)

    monkeypatch.setattr(model, "encode", counting)
    generation = Generation(
        model, [request(model, 1, 300.0, seed)], OPTIONS, progress=lambda done, total: seen.append((done, encoded))
    )
    run(generation)
    assert encoded == 10
    for done, windows in seen:
        assert windows <= done // 750 + OPTIONS.encode_batch + 1, f"{windows} windows encoded for {done} tokens"


def test_progress_reaches_the_total(model: AudioFlamingo, seed: int) -> None:
    seen: list[tuple[int, int]] = []
    requests = [request(model, 2, 4.0, seed), request(model, 2, 0, seed)]
    run(Generation(model, requests, OPTIONS, progress=lambda done, total: seen.append((done, total))))
    total = sum(len(r.token_ids) for r in requests)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_a_prompt_beyond_the_context_is_refused(model: AudioFlamingo) -> None:
    limit = model.config.decoder.max_positions
    with pytest.raises(ContextLengthError, match=rf"9 tokens and up to {limit - 8} .* ends at {limit}"):
        Generation(model, [request(model, limit - 8)], OPTIONS)


@pytest.mark.parametrize("name", ["page_size", "chunk_size", "encode_batch"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        EngineOptions(**{name: 0})


def test_an_unknown_kv_storage_is_refused() -> None:
    with pytest.raises(ValueError, match="kv must be one of auto, int8, got 'int3'"):
        EngineOptions(kv="int3")


def test_int8_kv_follows_the_dense_scores(model: AudioFlamingo, seed: int) -> None:
    """Teacher-forced: the same 24 tokens decoded over both caches, after a prompt with audio in several chunks."""
    steps = torch.randint(0, 256, (24,)).tolist()
    dense, rounded = (scores(model, request(model, 25, 4.0, seed), steps, kv) for kv in ("auto", "int8"))
    assert not torch.equal(dense, rounded)
    errors = (rounded - dense).square().mean(-1).sqrt() / dense.std(-1)
    assert errors.max() < 0.02, f"relative errors of the scores {errors.tolist()}"


@torch.inference_mode()
def scores(model: AudioFlamingo, request: Request, steps: list[int], kv: str) -> torch.Tensor:
    """The scores after the prompt and after each of `steps`, whatever is likely: [1 + steps, vocab]."""
    rows = []

    class Forced(Sampler):
        def choose(self, logits: torch.Tensor, _: list[int]) -> list[int]:
            rows.append(logits[0].clone())
            return [steps[len(rows) - 1]] if len(rows) <= len(steps) else [0]

    options = EngineOptions(page_size=16, chunk_size=64, encode_batch=2, kv=kv)
    generation = Generation(model, [request], options)
    generation._sampler = Forced([request.sampling], [request.token_ids], model.config.decoder.vocab_size, model.device)
    run(generation)
    assert generation._cache.keys[0].dtype == (torch.int8 if kv == "int8" else torch.float32)
    return torch.stack(rows)


def test_timings_add_up(model: AudioFlamingo, seed: int) -> None:
    generation = Generation(model, [request(model, 8, 40.0, seed)], OPTIONS)
    run(generation)
    timings = generation.sequences[0].request.timings
    assert 0 < timings.log_mel + timings.encode + timings.prefill <= timings.first_token < timings.total
    assert timings.total == pytest.approx(timings.first_token + timings.generate)
    assert timings.tokens_per_second == pytest.approx(7 / timings.generate)
