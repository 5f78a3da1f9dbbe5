"""Listening once and asking often, as a user sees it."""

import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support.audio import speech_like

import afnext
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.runtime.errors import AudioTooLongError, ContextLengthError, PromptError

RATE = 16_000
GREEDY = {"max_new_tokens": 10, "ignore_eos": True}


@pytest.fixture
def model(folder: Path) -> afnext.Model:
    """A model of the test's own, so that what is held in its engine is the test's doing."""
    return afnext.load(folder, dtype="float32", page_size=32, prefix_cache_bytes=0)


@pytest.fixture(scope="module")
def listening(folder: Path) -> afnext.Context:
    """A context for tests that leave it as it is."""
    return afnext.load(folder, dtype="float32").listen((speech_like(1, 0), RATE))


def heard_tokens(model: afnext.Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of tokens of each pass through the decoder from now on."""
    counts: list[int] = []
    forward = model.network.decoder.forward

    def counting(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts.append(x.shape[0] * x.shape[1])
        return forward(x, *rest)

    monkeypatch.setattr(model.network.decoder, "forward", counting)
    return counts


@pytest.mark.parametrize("options", [{}, {"temperature": 1.1, "seed": 3}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_answers_are_those_of_ask(model: afnext.Model, system: str | None, options: dict, seed: int) -> None:
    audio = [(speech_like(3, seed), RATE), (speech_like(1, seed + 1), RATE)]
    with model.listen(audio, system=system) as context:
        assert context.seconds == 4.0
        for question in ("What?", "Who is speaking, and when does it end?"):
            answer = context.ask(question, **GREEDY, **options)
            expected = model.ask(audio, question, system=system, **GREEDY, **options)
            assert answer.token_ids == expected.token_ids
            assert answer.usage.audio_tokens == expected.usage.audio_tokens
            assert answer.usage.text_tokens == expected.usage.text_tokens
            assert (answer.usage.audio_seconds, answer.usage.windows) == (4.0, 2)
            assert answer.usage.cached_tokens == context.tokens


TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "What is that?"},
    {"role": "assistant", "content": "A dog <sound> that barks."},
    {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "then?"}]},
    {"role": "assistant", "content": "Silence."},
    {"role": "user", "content": "For how long?"},
]


@pytest.mark.parametrize(("turns", "system"), [(1, None), (3, "Be brief."), (4, None), (5, None)])
def test_a_conversation_is_answered_as_by_chat(
    model: afnext.Model, turns: int, system: str | None, seed: int, tmp_path: Path
) -> None:
    audio = [(speech_like(2, seed), RATE), (speech_like(1, seed + 1), RATE)]
    first = [*({"type": "audio", "audio": each} for each in audio), {"type": "text", "text": TURNS[0]["content"]}]
    whole = [{"role": "user", "content": first}, *TURNS[1:turns]]
    if system is not None:
        whole.insert(0, {"role": "system", "content": system})
    options = {**GREEDY, "temperature": 0.8, "seed": seed}
    expected = model.chat([whole], **options)[0]
    with model.listen(audio, system=system) as context:
        answer = context.chat(TURNS[:turns], **options)
        assert answer.token_ids == expected.token_ids
        assert answer.usage.text_tokens == expected.usage.text_tokens
        assert answer.usage.cached_tokens == context.tokens
        stream = context.stream_chat(TURNS[:turns], **options)
        assert "".join(stream) == (expected.thinking or "") + expected.text
        assert stream.answer is not None
        assert stream.answer.token_ids == expected.token_ids
        context.save(tmp_path / "context")
    with model.resume(tmp_path / "context") as resumed:
        assert resumed.chat(TURNS[:turns], **options).token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "first message about a recording is the user's"),
        ("What?", "a list of"),
        (["What?"], "a list of"),
        (TURNS[1:3], "first message about a recording is the user's"),
        ([{"role": "system", "content": "Be brief."}, TURNS[0]], "first message about a recording is the user's"),
        ([TURNS[0], {"role": "system", "content": "Be brief."}], "give it to listen"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "x.wav"}]}], "already in the context"),
        ([*TURNS[:2], {"role": "user", "content": [{"type": "audio", "audio": "x.wav"}]}], "already in the context"),
        ([{"role": "user", "content": []}], "has no content"),
        ([{"role": "user"}], "has no content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "has no text"),
        ([*TURNS[:2], {"role": "user", "content": None}], "has no content"),
        ([{"role": "user", "content": "What?", "name": "me"}], "besides role and content"),
    ],
)
def test_other_messages_are_refused(listening: afnext.Context, messages: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        listening.chat(messages)


def test_a_template_that_rewrites_the_first_turn_is_refused(tmp_path: Path, seed: int) -> None:
    folder = write_random_checkpoint(tmp_path)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if loop.first %}{{ messages | length }}<sound>"
        "{{ message['content'][-1]['text'] }}{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    with afnext.load(folder, dtype="float32").listen((speech_like(1, seed), RATE)) as context:
        assert context.ask("What?", **GREEDY).token_ids
        with pytest.raises(PromptError, match="changes the first turn"):
            context.chat(TURNS[:3])


def test_a_second_question_computes_its_own_tokens_alone(
    model: afnext.Model, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    with model.listen((speech_like(30, seed), RATE)) as context:
        passes = heard_tokens(model, monkeypatch)
        answer = context.ask("What?", max_new_tokens=1)
    question = answer.usage.audio_tokens + answer.usage.text_tokens - context.tokens
    assert passes == [question]
    assert question < 40
    assert answer.timings.encode == answer.timings.log_mel == 0


def test_a_stream_gives_the_pieces_of_the_answer(model: afnext.Model, seed: int) -> None:
    with model.listen((speech_like(1, seed), RATE)) as context:
        stream = context.stream("What?", **GREEDY)
        pieces = list(stream)
        assert stream.answer is not None
        assert "".join(pieces) == stream.answer.text
        assert stream.answer.token_ids == context.ask("What?", **GREEDY).token_ids


def test_questions_from_several_threads_share_the_prefix(model: afnext.Model, seed: int) -> None:
    questions = ["What?", "Who speaks first, and for how long?", "When?", "Why is that so?"]
    with model.listen((speech_like(2, seed), RATE)) as context:
        expected = [context.ask(question, **GREEDY).token_ids for question in questions]
        pages = len(context._prefix.pages)
        answers: dict[int, list[int]] = {}
        start = threading.Barrier(len(questions))

        def ask(index: int) -> None:
            start.wait()
            answers[index] = context.ask(questions[index], **GREEDY).token_ids

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(questions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert [answers[index] for index in range(len(questions))] == expected
        pool = model.engine.cache.pool
        assert pool.pages - pool.free == pages
        assert pool.pages < len(questions) * pages


def test_closing_gives_the_memory_back(model: afnext.Model, seed: int) -> None:
    context = model.listen((speech_like(2, seed), RATE))
    assert model.engine.cache.nbytes > 0
    stream = context.stream("What?", **GREEDY)
    next(stream)
    context.close()
    context.close()
    assert len(list(stream)) > 1, "an answer on its way goes on"
    model.engine.release_memory()
    assert model.engine.cache.nbytes == 0
    with pytest.raises(afnext.AfnextError, match="closed; listen again"):
        context.ask("What?")


def test_progress_and_cancellation(model: afnext.Model, seed: int) -> None:
    seen: list[tuple[str, float, float]] = []
    context = model.listen((speech_like(2, seed), RATE), progress=lambda *report: seen.append(report))
    assert seen[-1] == ("listening", context.tokens, context.tokens)
    context.close()
    with pytest.raises(afnext.AfnextError, match="cancelled"):
        model.listen((speech_like(2, seed), RATE), cancelled=lambda: True)
    model.engine.release_memory()
    assert model.engine.cache.nbytes == 0


def test_errors_say_what_to_do(model: afnext.Model, seed: int) -> None:
    with pytest.raises(AudioTooLongError, match="truncate"):
        model.listen((speech_like(1, seed).repeat(1801)[: 1801 * RATE], RATE))
    with pytest.raises(PromptError, match="nothing to listen to"):
        model.listen([])
    with model.listen((speech_like(1, seed), RATE)) as context:
        with pytest.raises(ContextLengthError, match="context ends at"):
            context.ask("What?", max_new_tokens=131_072)
        with pytest.raises(TypeError, match="truncate"):
            context.ask("What?", truncate=True)  # type: ignore[call-arg]


def test_a_template_that_asks_before_it_listens_is_refused(tmp_path: Path, seed: int) -> None:
    folder = write_random_checkpoint(tmp_path)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>user\n{{ message['content'][-1]['text'] }}<sound><|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    with pytest.raises(PromptError, match="puts the question before the audio"):
        afnext.load(folder, dtype="float32").listen((speech_like(1, seed), RATE))


def test_updates_that_nobody_read_keep_no_context(model: afnext.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """They refer to the sequence and its prefix, whose pages are free once the context is dropped."""
    monkeypatch.setattr(model.engine, "_wait", lambda updates: time.sleep(0.001))
    gc.collect()
    gc.disable()
    try:
        context = model.listen((speech_like(1, 0), RATE))
        context.ask("What?", max_new_tokens=2)
        dropped = weakref.ref(context._prefix)
        del context
        model.engine.release_memory()
        assert dropped() is None
    finally:
        gc.enable()
