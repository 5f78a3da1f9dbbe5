"""Several processes beside one: the same questions to models that are divided among ranks, and to whole models.

The processes of a CPU share its threads and memory bandwidth, so a CPU measures the cost of dividing. Figures: time to
the first token about a recording, as the mean over simultaneous questions, and tokens per second of all questions after
it; both as medians over rounds in which the ways take turns. Outputs are compared before anything is reported.
"""

import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ...kernels.errors import AfnextError
from ...runtime.app.answer import Answer
from ...runtime.app.api import Model, load, question_messages
from ..core.machine import machine
from ..core.processes import end_with_parent
from ..core.random_checkpoint import write_random_checkpoint
from ..core.record import SCHEMES, Record, append, recipe_of

RATE = 16_000
WAYS = ("tp1", "tp2", "tp4", "sp2", "sp4", "copies2", "copies4")


class _Asked(Protocol):
    """Answers simultaneous questions about recordings."""

    def __call__(self, recordings: list[np.ndarray], new_tokens: int) -> list[Answer]: ...


def run_ranks(
    out: Path,
    *,
    shape: str,
    ways: Sequence[str],
    seconds: float,
    new_tokens: int = 32,
    repeats: int = 5,
    scheme: str = "bf16",
    requests: int = 1,
) -> list[Record]:
    """Measure a checkpoint of `shape` in each way; append to the file `out` and return the records.

    ways: of `WAYS`, an option of `load` and its number of ranks, or the number of whole models in separate processes,
    which share the threads and take the requests in turn. seconds: of each recording; scheme: one of `record.SCHEMES`;
    requests: simultaneous ones. Raises AfnextError if the answers differ in the first token.
    """
    where, records = machine(), []
    generator = np.random.default_rng(0)
    recordings = [generator.normal(0, 0.1, round(seconds * RATE)).astype(np.float32) for _ in range(requests)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        checkpoint = write_random_checkpoint(Path(folder), shape)
        models = {way: stack.enter_context(_loaded(way, checkpoint, scheme)) for way in ways}
        rounds: dict[str, list[list[Answer]]] = {way: [] for way in ways}
        for _ in range(repeats + 1):
            for way, asked in models.items():
                rounds[way].append(asked(recordings, new_tokens))
        if len({tuple(answer.token_ids[0] for answer in answers[0]) for answers in rounds.values()}) > 1:
            raise AfnextError("the models answer differently; nothing is reported")
        for way, (_, *measured) in rounds.items():  # the first round compiles and allocates
            first = statistics.median(statistics.mean(a.timings.first_token for a in answers) for answers in measured)
            rate = statistics.median(sum(a.timings.tokens_per_second for a in answers) for answers in measured)
            case = {"shape": shape, "scheme": scheme, "way": way, "audio_s": seconds, "requests": requests}
            case["threads"] = torch.get_num_threads()
            values = {"first_s": first, "tokens_per_s": rate}
            record = Record("ranks", "question", f"afnext {scheme} {way}", case, values, machine=where)
            append(out, record)
            records.append(record)
    return records


@contextmanager
def _loaded(way: str, checkpoint: Path, scheme: str) -> Iterator[_Asked]:
    """An object that answers in the given way, until the block ends."""
    options: dict[str, Any] = {
        "dtype": SCHEMES[scheme],
        "quant": recipe_of(scheme),
        "prefix_cache_bytes": 0,
        "encoder_cache_bytes": 0,
        "draft_tokens": 0,
    }
    if way.startswith("copies"):
        with _copies(int(way.removeprefix("copies")), checkpoint, options) as asked:
            yield asked
    else:
        options |= {"tp": 1, "sp": 1, way[:2]: int(way[2:])}
        with load(checkpoint, **options) as model:
            yield partial(_ask, model)


@contextmanager
def _copies(count: int, checkpoint: Path, options: dict[str, Any]) -> Iterator[_Asked]:
    """Whole models in `count` processes, which divide the threads and the questions."""
    threads = max(1, torch.get_num_threads() // count)
    with ExitStack() as stack:
        start = partial(
            ProcessPoolExecutor,
            1,
            multiprocessing.get_context("spawn"),
            _load_copy,
            (os.getpid(), threads, checkpoint, options),
        )
        copies = [stack.enter_context(start()) for _ in range(count)]

        def asked(recordings: list[np.ndarray], new_tokens: int) -> list[Answer]:
            tasks = [copy.submit(_ask_copy, recordings[index::count], new_tokens) for index, copy in enumerate(copies)]
            answers: list[Any] = [None] * len(recordings)
            for index, task in enumerate(tasks):
                answers[index::count] = task.result()
            return answers

        yield asked


_copy: Model


def _load_copy(parent: int, threads: int, checkpoint: Path, options: dict[str, Any]) -> None:
    """Load the model in this process, which exits with `parent`."""
    global _copy
    end_with_parent(parent)
    torch.set_num_threads(threads)
    _copy = load(checkpoint, **options)


def _ask_copy(recordings: list[np.ndarray], new_tokens: int) -> list[Answer]:
    return _ask(_copy, recordings, new_tokens)


def _ask(model: Model, recordings: list[np.ndarray], new_tokens: int) -> list[Answer]:
    if not recordings:
        return []
    conversations = [question_messages((samples, RATE), "What?", None) for samples in recordings]
    return model.chat(conversations, max_new_tokens=new_tokens, ignore_eos=True, temperature=0.0)
