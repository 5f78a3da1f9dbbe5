"""The life of a model: closed by hand or by a with block, never copied."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.audio import speech_like

import afnext
from afnext.runtime.errors import AfnextError, PromptError


def hello() -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hello?"}]


def test_a_closed_model_frees_its_weights_and_answers_nothing(folder: Path, seed: int) -> None:
    with afnext.load(folder, dtype="float32") as model:
        model.ask(None, "Hello?", max_new_tokens=3)
        context = model.listen((speech_like(1.0, seed), 16_000))
        live = model.listen()
        alive = weakref.ref(next(model.network.parameters(), None) or next(model.network.buffers()))
        network, cache = weakref.ref(model.network), weakref.ref(model.engine.cache)
    calls: list[Callable[[], object]] = [
        lambda: model.ask(None, "Hello?"),
        lambda: model.stream(None, "Hello?"),
        lambda: model.chat([hello()]),
        lambda: model.listen(),
        lambda: model.listen((speech_like(1.0, seed), 16_000)),
        lambda: model.transcribe((speech_like(1.0, seed), 16_000)),
        lambda: model.resume("nowhere"),
        lambda: context.ask("What?"),
        lambda: live.feed(speech_like(31.0, seed), 16_000),
        lambda: model.network,
        lambda: model.engine,
    ]
    for call in calls:
        with pytest.raises(AfnextError, match="the model has been closed"):
            call()
    model.close()
    gc.collect()
    assert (network(), alive(), cache()) == (None, None, None)  # though a context and a live recording are open


def test_an_answer_in_progress_goes_on_when_the_model_is_closed(folder: Path, model: afnext.Model) -> None:
    expected = model.ask(None, "Hello?", max_new_tokens=9)
    other = afnext.load(folder, dtype="float32")
    stream = other.stream(None, "Hello?", max_new_tokens=9)
    next(stream)
    other.close()
    for _ in stream:
        pass
    assert stream.answer is not None
    assert stream.answer.token_ids == expected.token_ids


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_models_and_what_they_heard_are_not_copied(
    duplicate: Callable[[Any], Any], model: afnext.Model, seed: int
) -> None:
    with model.listen((speech_like(1.0, seed), 16_000)) as context, model.listen() as live:
        for thing, advice in [(model, "load one in each process"), (context, "save"), (live, "save")]:
            for error in (AfnextError, TypeError):  # as pickle's own refusals are
                with pytest.raises(error, match=f"a {type(thing).__name__} cannot be pickled or copied.*{advice}"):
                    duplicate(thing)


def test_one_conversation_need_not_be_in_a_list(model: afnext.Model) -> None:
    (nested,) = model.chat([hello()], max_new_tokens=5)
    (plain,) = model.chat(hello(), max_new_tokens=5)
    assert plain.token_ids == nested.token_ids
    assert model.chat([], max_new_tokens=5) == []


@pytest.mark.parametrize(
    "conversations", [hello()[0], "Hello?", ["Hello?"], [hello(), hello()[0]], [hello()[0], hello()]]
)
def test_what_is_no_conversation_gets_an_example(conversations: Any, model: afnext.Model) -> None:
    with pytest.raises(PromptError, match=r"chat\(\[\[\{"):
        model.chat(conversations)
