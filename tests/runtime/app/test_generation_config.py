"""What generation_config.json recommends: honoured as transformers does, refused or warned about, never ignored."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

import afnext
from afnext.runtime.app.generation_config import GenerationDefaults, generation_defaults
from afnext.runtime.errors import ConfigError

VOCAB = 100


def sampling(**settings: Any) -> dict[str, Any]:
    return dict(generation_defaults(settings, VOCAB).sampling)


def test_what_is_unset_is_what_transformers_takes() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    assert sampling(do_sample=True) == {name: defaults[name] for name in ("temperature", "top_k")}
    assert sampling(do_sample=True, top_k=None) == sampling(do_sample=True)
    assert sampling(do_sample=True, top_k=0, temperature=0.5) == {"temperature": 0.5, "top_k": 0}
    assert sampling() == sampling(do_sample=False, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1) == {}


def test_what_is_honoured_comes_back_as_sampling_options() -> None:
    settings = {
        "max_new_tokens": 7,
        "repetition_penalty": 2,
        "min_new_tokens": 3,
        "no_repeat_ngram_size": 4,
        "suppress_tokens": [1, 2],
        "begin_suppress_tokens": [3],
        "bad_words_ids": [[4, 5], [6]],
        "sequence_bias": [[[7, 8], -1.5]],
    }
    assert sampling(**settings) == {
        **settings,
        "suppress_tokens": (1, 2),
        "begin_suppress_tokens": (3,),
        "bad_words_ids": ((4, 5), (6,)),
        "sequence_bias": (((7, 8), -1.5),),
    }
    assert generation_defaults({"stop_strings": "END", "min_length": 9}, VOCAB) == GenerationDefaults({}, ("END",), 9)
    assert generation_defaults({"stop_strings": ["a", "b"]}, VOCAB).stop == ("a", "b")


@pytest.mark.parametrize(
    "value", ["x", 1.5, -1, True, [], {}, [[]], [1.5], ["a"], {"a": 1}, 10**400, float("nan"), float("inf")], ids=repr
)
@pytest.mark.parametrize(
    "key",
    [
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "repetition_penalty"),
        *("min_new_tokens", "min_length", "max_length", "no_repeat_ngram_size", "suppress_tokens"),
        *("begin_suppress_tokens", "bad_words_ids", "sequence_bias", "stop_strings", "num_beams", "typical_p"),
        *("epsilon_cutoff", "guidance_scale", "remove_invalid_values"),
    ],
)
def test_a_value_that_does_not_fit_is_an_error_that_names_file_and_key(key: str, value: Any) -> None:
    """The other values are read: none ends in an error of another kind."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "do_sample": value is True,
        "remove_invalid_values": value is True,
        "stop_strings": value in ("x", [], ["a"]),
        "bad_words_ids": value == [],
        "sequence_bias": value == [],
        "suppress_tokens": value == [],
        "begin_suppress_tokens": value == [],
    }.get(key, number)
    try:
        generation_defaults({key: value}, VOCAB)
    except ConfigError as error:
        said = str(error)
    else:
        said = ""
    assert re.match(rf"generation_config.json: .*{key}", said) if said else fits


def test_tokens_are_checked_against_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"generation_config.json: sequence_bias has the token 100"):
        generation_defaults({"sequence_bias": [[[VOCAB], 1.0]]}, VOCAB)
    with pytest.raises(ConfigError, match="leave no token"):
        generation_defaults({"suppress_tokens": list(range(VOCAB))}, VOCAB)


def test_what_is_not_implemented_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        generation_defaults({"do_sample": True, "num_beams": 4, "typical_p": 0.9, "my_own": 1, "top_p": 0.9}, VOCAB)
    (record,) = caplog.records
    assert "sets num_beams, typical_p, my_own, which" in record.getMessage()


def test_neutral_values_and_what_changes_nothing_are_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """All that transformers itself writes, with its defaults, and typical_p where nothing is sampled."""
    defaults = GenerationConfig._get_default_generation_params()
    del defaults["max_length"]
    written = json.loads(GenerationConfig(**defaults).to_json_string(use_diff=False))
    with caplog.at_level(logging.WARNING):
        assert sampling(**written) == {"repetition_penalty": 1, "no_repeat_ngram_size": 0}
        generation_defaults({"typical_p": 0.5, "max_length": 20, "max_new_tokens": 4}, VOCAB)
        assert not caplog.records
        generation_defaults({"max_length": 20}, VOCAB)
    assert "max_length" in caplog.text


def with_settings(folder: Path, tmp_path: Path, **settings: Any) -> afnext.Model:
    """The model of `folder` with these settings in its generation_config.json."""
    copy = shutil.copytree(folder, tmp_path / "model")
    file = copy / "generation_config.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(kept | settings))
    return afnext.load(copy, dtype="float32", memory="1GB")


def test_an_answer_follows_the_file_with_drafts_in_batches_and_when_asked_otherwise(
    folder: Path, tmp_path: Path, model: afnext.Model
) -> None:
    plain = model.ask(None, "hello", max_new_tokens=12, ignore_eos=True)
    first = plain.token_ids[0]
    changed = with_settings(folder, tmp_path, begin_suppress_tokens=[first], no_repeat_ngram_size=2, max_new_tokens=12)
    answer = changed.ask(None, "hello", ignore_eos=True)
    assert answer.token_ids[0] != first
    assert len(answer.token_ids) == 12
    pairs = list(zip(answer.token_ids, answer.token_ids[1:], strict=False))
    assert len(set(pairs)) == len(pairs)
    together = changed.chat([[{"role": "user", "content": text}] for text in ("hello", "hallo")], ignore_eos=True)
    assert together[0].token_ids == answer.token_ids
    off: dict[str, Any] = {"begin_suppress_tokens": (), "no_repeat_ngram_size": 0}
    assert changed.ask(None, "hello", ignore_eos=True, **off).token_ids == plain.token_ids


def test_a_file_of_the_wrong_kind_stops_the_loading(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generation_config.json: temperature is '1'"):
        with_settings(folder, tmp_path, do_sample=True, temperature="1")
