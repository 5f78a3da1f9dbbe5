"""Tensor parallelism beside one process: the same question to models that are divided among different numbers of ranks.

The ranks of a CPU share its threads and its memory bandwidth, so that what is measured there is the cost of dividing.
Figures: time to the first token about a recording, and tokens a second after it, as medians over rounds in which the
models take turns. Outputs are compared before anything is reported.
"""

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from ...kernels.errors import AfnextError
from ...runtime.app.answer import Answer
from ...runtime.app.api import Model, load
from ..core.machine import machine
from ..core.random_checkpoint import write_random_checkpoint
from ..core.record import SCHEMES, Record, append, recipe_of

RATE = 16_000
WAYS = ("tp1", "tp2", "tp4", "sp2", "sp4")


def run_ranks(
    out: Path,
    *,
    shape: str,
    ways: Sequence[str],
    seconds: float,
    new_tokens: int = 32,
    repeats: int = 5,
    scheme: str = "bf16",
) -> list[Record]:
    """Measure a checkpoint of `shape` in each way; append to the file `out` and return the records.

    ways: of `WAYS`, the option of `load` and its number of ranks. seconds: of the recording; scheme: one of
    `record.SCHEMES`. Raises AfnextError if the answers differ in the first token.
    """
    where, records = machine(), []
    audio = (np.random.default_rng(0).normal(0, 0.1, round(seconds * RATE)).astype(np.float32), RATE)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        checkpoint = write_random_checkpoint(Path(folder), shape)
        models = {
            way: stack.enter_context(
                load(
                    checkpoint,
                    dtype=SCHEMES[scheme],
                    quant=recipe_of(scheme),
                    prefix_cache_bytes=0,
                    encoder_cache_bytes=0,
                    draft_tokens=0,
                    tp=int(way[2:]) if way.startswith("tp") else 1,
                    sp=int(way[2:]) if way.startswith("sp") else 1,
                )
            )
            for way in ways
        }
        rounds: dict[str, list[Answer]] = {way: [] for way in ways}
        for _ in range(repeats + 1):
            for way, model in models.items():
                rounds[way].append(_ask(model, audio, new_tokens))
        if len({answers[0].token_ids[0] for answers in rounds.values()}) > 1:
            raise AfnextError("the models answer differently; nothing is reported")
        for way, (_, *measured) in rounds.items():  # the first round compiles and allocates
            first = statistics.median(answer.timings.first_token for answer in measured)
            rate = statistics.median(answer.timings.tokens_per_second for answer in measured)
            values = {"first_s": first, "tokens_per_s": rate}
            case = {"shape": shape, "scheme": scheme, "way": way, "audio_s": seconds}
            case["threads"] = torch.get_num_threads()
            record = Record("ranks", "question", f"afnext {scheme} {way}", case, values, machine=where)
            append(out, record)
            records.append(record)
    return records


def _ask(model: Model, audio: tuple[np.ndarray, int], new_tokens: int) -> Answer:
    return model.ask(audio, "What?", max_new_tokens=new_tokens, ignore_eos=True, temperature=0.0)
