"""Runs every kind of work once, on silence and zeros, so that no request waits for kernels to compile.

The kernel that an operation launches depends on its dtypes and number of rows, but not on the length of a recording or
prompt. So a few sizes of each kind of work launch every kernel. They run twice: first to collect the kernels, which are
then compiled in parallel (`kernels/compilation.py`), then to launch them. Triton caches compiled kernels on disk, by
chip, version and source: the next process only loads them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch

from ...kernels.audio_format import WINDOW_SAMPLES
from ...kernels.compilation import collecting
from ...kernels.device_state import runs_triton
from ...kernels.dispatch import forced_backend
from ...kernels.row_groups import row_invariant
from ...kernels.triton_language import AVAILABLE as TRITON_AVAILABLE
from ..model.encoder import token_count
from .decode_steps import MAX_SPECULATING
from .executor import Executor
from .options import EngineOptions
from .prefill import PlacedWindow
from .sampler import Sampler, SamplingParams, choose
from .timings import Timings

ROWS = (16, 32, 64, 128)  # limits up to which products with packed weights have separate configs
_SAMPLES_PER_POSITION = 320  # of the encoder


@torch.inference_mode()
def rehearse(
    executor: Executor, options: EngineOptions, pages: list[int], progress: Callable[[str, int, int], None]
) -> None:
    """Compile the kernels of each kind of work, and run it. pages: enough pages of the cache for a chunk, or all there
    are; they are overwritten. progress: called with (stage, done, total): kernels, then kinds of work."""
    works = list(_works(executor, options, pages))
    if _compiles_ahead(executor):
        with collecting() as kernels:
            for work in works:
                work()
        executor.compile(kernels, partial(progress, "compiling kernels"))
    for done, work in enumerate(works):
        progress("running kernels", done, len(works))
        work()
    progress("running kernels", len(works), len(works))


def _compiles_ahead(executor: Executor) -> bool:
    """Whether the work launches kernels that Triton compiles."""
    compiled = TRITON_AVAILABLE and os.environ.get("TRITON_INTERPRET") != "1" and forced_backend() in (None, "triton")
    return compiled and runs_triton(executor.model.device)


def _works(executor: Executor, options: EngineOptions, pages: list[int]) -> Iterator[Callable[[], object]]:
    for positions in ROWS:
        yield partial(_encode, executor, 1, positions * _SAMPLES_PER_POSITION)
    for windows in sorted({1, options.windows_at_once}):
        yield partial(_encode, executor, windows, WINDOW_SAMPLES)
    most = min(options.chunk_size, len(pages) * options.page_size)
    for tokens in sorted({min(rows, most) for rows in (*ROWS, most)}):
        yield partial(_prefill, executor, pages, tokens)
    if options.batch_invariant:
        shapes = {(1, 1)}  # every token is a separate row
    else:
        speculating = min(options.max_batch, MAX_SPECULATING)
        shapes = {(rows, 1) for rows in (1, *ROWS) if rows <= options.max_batch} | {(options.max_batch, 1)}
        shapes |= {(rows, 1 + options.draft_tokens) for rows in (1, 2, 4, 8) if rows <= speculating}
    for rows, time in sorted(shapes):
        yield partial(_decode, executor, options, pages, rows, time)


def _encode(executor: Executor, windows: int, samples: int) -> None:
    window = PlacedWindow(0, token_count(samples), torch.zeros(samples), 0)
    executor.encoder_stream.queue(partial(executor.encode, [window] * windows, Timings()))


def _prefill(executor: Executor, pages: list[int], tokens: int) -> None:
    x = executor.embed(torch.zeros(tokens, dtype=torch.int64, device=executor.model.device))
    executor.logits(executor.prefill(x[None], pages, 0)[:, -1])


def _decode(executor: Executor, options: EngineOptions, pages: list[int], rows: int, time: int) -> None:
    """Decode rows of one sequence. Each row writes what it reads, so their order does not matter."""
    vocabulary, device = executor.model.config.decoder.vocab_size, executor.model.device
    kinds = (SamplingParams(1), SamplingParams(1, temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=0))
    with row_invariant() if options.batch_invariant else nullcontext():
        scores = executor.decode([[0] * time] * rows, [0] * rows, [pages] * rows).flatten(0, 1)
        for params in kinds:
            choose(scores, [Sampler(params, [0], vocabulary, device)] * len(scores), [0] * len(scores))
