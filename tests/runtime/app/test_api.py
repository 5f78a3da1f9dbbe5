"""load, ask, stream and chat as a user sees them."""

import io
import json
import logging
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support.audio import speech_like, wav_bytes

import afnext
from afnext.runtime.errors import ContextLengthError, PromptError, SamplingError

RATE = 16_000


def test_every_kind_of_source_gives_the_same_answer(model: afnext.Model, tmp_path: Path, seed: int) -> None:
    data = wav_bytes(speech_like(1.5, seed))
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    array = np.frombuffer(data[44:], "<i2").astype(np.float32) / 32768
    sources = [path, str(path), data, io.BytesIO(data), (array, RATE), (torch.from_numpy(array.copy()), RATE)]
    answers = [model.ask(source, "What is it?", max_new_tokens=12) for source in sources]
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    assert {answer.usage.audio_seconds for answer in answers} == {1.5}


def test_usage_counts_what_was_consumed(model: afnext.Model, seed: int) -> None:
    answer = model.ask([(speech_like(31, seed), RATE), (speech_like(2, seed), RATE)], "Compare.", max_new_tokens=5)
    usage = answer.usage
    assert (usage.audio_seconds, usage.windows, usage.truncated) == (33.0, 3, False)
    assert usage.audio_tokens == 750 + 25 + 50
    assert usage.new_tokens == len(answer.token_ids) == 5
    text_only = model.ask(None, "Compare.", max_new_tokens=5).usage
    assert usage.text_tokens == text_only.text_tokens + 4, "two recordings add two pairs of enclosing tokens"


def test_the_pieces_of_a_stream_are_the_answer(model: afnext.Model, seed: int) -> None:
    audio = (speech_like(1, seed), RATE)
    options = {"max_new_tokens": 40, "temperature": 1.5, "seed": seed, "ignore_eos": True}
    stream = model.stream(audio, "What?", **options)
    assert stream.answer is None
    pieces = list(stream)
    answer = model.ask(audio, "What?", **options)
    assert stream.answer is not None
    assert stream.answer.token_ids == answer.token_ids
    assert "".join(piece for piece in pieces if not piece.thinking) == answer.text
    assert len(pieces) > 1


def test_a_closed_stream_stops_the_model(model: afnext.Model, seed: int) -> None:
    stream = model.stream(None, "Go on.", max_new_tokens=1000, ignore_eos=True)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.answer is None


def test_cancelling_from_another_thread(model: afnext.Model, seed: int) -> None:
    event = threading.Event()
    stream = model.stream(None, "Go on.", max_new_tokens=5000, ignore_eos=True, cancelled=event.is_set)
    next(stream)
    threading.Timer(0.05, event.set).start()
    for _ in stream:
        pass
    assert stream.answer is not None
    assert stream.answer.finish_reason == "cancelled"
    assert len(stream.answer.token_ids) < 5000


def test_a_stop_string_ends_the_answer_and_is_left_out(model: afnext.Model, seed: int) -> None:
    options = {"max_new_tokens": 200, "temperature": 0.3, "seed": seed, "ignore_eos": True}
    whole = model.ask(None, "Write.", **options).text
    stop = next(whole[i : i + 2] for i in range(5, len(whole)) if whole[i : i + 2].isprintable())
    answer = model.ask(None, "Write.", stop=[stop], **options)
    assert answer.text == whole[: whole.find(stop)].strip()
    assert answer.finish_reason == "stop"


def test_a_batch_equals_one_by_one(model: afnext.Model, seed: int) -> None:
    conversations = [
        [{"role": "user", "content": [{"type": "audio", "audio": (speech_like(2, seed), RATE)}, text("What?")]}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        [
            {"role": "user", "content": [{"type": "audio", "audio": (speech_like(31, seed), RATE)}, text("Who?")]},
            {"role": "assistant", "content": "A dog."},
            {"role": "user", "content": [text("When?"), {"type": "audio", "audio": (speech_like(1, seed), RATE)}]},
        ],
    ]
    for options in ({}, {"temperature": 1.0, "seed": seed}, {"repetition_penalty": 1.3}):
        together = model.chat(conversations, max_new_tokens=20, **options)
        alone = [model.chat([conversation], max_new_tokens=20, **options)[0] for conversation in conversations]
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def test_an_empty_batch_is_empty(model: afnext.Model) -> None:
    assert model.chat([]) == []


def test_truncation_is_asked_for_and_reported(folder: Path, tmp_path: Path, seed: int) -> None:
    short = tmp_path / "short"
    shutil.copytree(folder, short)
    (short / "processor_config.json").write_text(json.dumps({"max_audio_len": 60}))
    model = afnext.load(short, dtype="float32")
    audio = (speech_like(60.5, seed), RATE)
    with pytest.raises(afnext.AfnextError, match=r"60\.5.*60.*truncate"):
        model.ask(audio, "?", max_new_tokens=2)
    answer = model.ask(audio, "?", max_new_tokens=2, truncate=True)
    assert answer.usage.truncated
    assert (answer.usage.audio_seconds, answer.usage.windows) == (60.0, 2)
    assert answer.token_ids == model.ask((audio[0][: 60 * RATE], RATE), "?", max_new_tokens=2).token_ids


def test_errors_say_what_to_do(model: afnext.Model, tmp_path: Path) -> None:
    with pytest.raises(afnext.AfnextError, match=r"nowhere\.wav"):
        model.ask(tmp_path / "nowhere.wav", "?")
    with pytest.raises(PromptError, match="recording"):
        model.chat([[{"role": "user", "content": [{"type": "audio"}]}]])
    with pytest.raises(SamplingError, match="temperature is -1"):
        model.ask(None, "?", temperature=-1)
    with pytest.raises(ContextLengthError, match="context ends at 131072"):
        model.ask(None, "?", max_new_tokens=131_072)
    with pytest.raises(afnext.AfnextError, match=r"16\.0 ms|16 ms"):
        model.ask((np.zeros(256, dtype=np.float32), RATE), "?")


def test_an_unknown_option_is_refused(model: afnext.Model) -> None:
    with pytest.raises(TypeError, match="tempreature"):
        model.ask(None, "?", tempreature=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "abacus"}, "abacus"),
        ({"dtype": "float8"}, "float8"),
        ({"page_size": 0}, "page_size must be at least 1"),
    ],
)
def test_load_refuses_what_it_does_not_know(folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises((afnext.AfnextError, ValueError), match=message):
        afnext.load(folder, **arguments)


def test_a_tokenizer_of_another_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    config = json.loads((mixed / "config.json").read_text())
    config["audio_token_id"] += 1
    (mixed / "config.json").write_text(json.dumps(config))
    with pytest.raises(afnext.AfnextError, match="audio_token_id"):
        afnext.load(mixed)


def test_the_dtype_is_the_checkpoints_unless_told(folder: Path) -> None:
    assert afnext.load(folder).network.dtype == torch.bfloat16
    assert afnext.load(folder, dtype=torch.float32).network.dtype == torch.float32


def test_it_is_logged_once_which_implementation_runs(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from afnext.kernels import attention

    monkeypatch.setattr(attention._operation, "_logged", set())
    with caplog.at_level(logging.INFO, logger="afnext"):
        model = afnext.load(folder, dtype="float32")
        for _ in range(2):
            model.ask((speech_like(1, 0), RATE), "?", max_new_tokens=2)
    assert sum(message.startswith("attention on cpu runs on ") for message in caplog.messages) == 1


def test_the_reference_backend_gives_the_same_tokens(model: afnext.Model, seed: int) -> None:
    """Every operation by its specification, in float64, against the implementation that users run."""
    audio = (speech_like(0.6, seed), RATE)
    expected = model.ask(audio, "?", max_new_tokens=6).token_ids
    with afnext.backend("reference"):
        assert model.ask(audio, "?", max_new_tokens=6).token_ids == expected
