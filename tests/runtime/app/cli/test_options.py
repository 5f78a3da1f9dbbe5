"""The options that commands share: none is ever lost, and their choices are those of the library."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from afnext.bench.cli import app as bench
from afnext.quant.recipe import RECIPES
from afnext.runtime.app.cli import app, listen, options, plan
from afnext.runtime.app.transcribe import FORMATS
from afnext.runtime.engine.kv_cache import KV_STORAGE
from afnext.runtime.engine.memory import SCHEMES
from afnext.runtime.io.live_source import RAW_FORMATS

RECORDED = Path(__file__).parent / "options.json"


def spellings(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, set[str]]]:
    """Each command below `command`, by its path, with every spelling of its options and its arguments in capitals."""
    for name, child in getattr(command, "commands", {}).items():
        yield from spellings(child, (*path, name))
    if not hasattr(command, "commands"):
        named = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        yield " ".join(path), {name if name.startswith("-") else name.upper() for name in named}


def test_commands_and_options_are_only_ever_added() -> None:
    present = dict(spellings(get_command(app))) | dict(spellings(get_command(bench), ("bench",)))
    recorded = json.loads(RECORDED.read_text())
    lost = {command: sorted(set(names) - present.get(command, set())) for command, names in recorded.items()}
    assert not {command: names for command, names in lost.items() if names}


def test_choices_are_those_of_the_library() -> None:
    assert options.RECIPES == RECIPES
    assert (plan.DENSE, *options.RECIPES) == SCHEMES
    assert {kind.value for kind in options.KV} == set(KV_STORAGE)
    assert {kind.value for kind in options.Format} == set(FORMATS)
    assert set(listen.RAW_FORMATS) == set(RAW_FORMATS)


def test_only_what_is_given_replaces_the_checkpoints_defaults() -> None:
    assert options.SamplingOptions(stop=[]).given() == {}
    zeros = options.SamplingOptions(temperature=0.0, top_k=0, seed=0, stop=["x"], stop_repetition=True)
    assert zeros.given() == {"temperature": 0.0, "top_k": 0, "seed": 0, "stop": ["x"], "stop_repetition": True}


@pytest.mark.parametrize(
    ("text", "name"),
    [("bf16", "bfloat16"), ("BF16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("auto", "auto")],
)
def test_dtypes_have_short_names(text: str, name: str) -> None:
    assert options.dtype_name(text) == name
