"""The engine: runs requests over one model and one KV cache, with continuous batching.

The life of a request:

1. `submit` checks it and puts a `SequenceState` into the inbox, or `sequence` makes one that `follow` puts there. Any
   thread may do that.
2. The engine's thread does one step after the other. At the start of a step it empties the inbox and ends the sequences
   that are cancelled or past their deadline. These keep their tokens.
3. The `Scheduler` picks the waiting sequences that fit. `PageManager` gives each its pages: shared ones for a beginning
   that was computed before, private ones for the rest.
4. The step computes a chunk of each prompt in progress, `chunk_size` tokens per step together (`prefill_chunk`), so a
   long prompt delays other requests by a chunk at a time.
5. `DecodeRunner` computes the next token of every sequence whose prompt is complete, or several tokens if speculative
   ones are right. Rows that were submitted under different forced backends are computed one backend after the other.
6. At a stop token or limit the sequence ends: its full pages stay in the prefix cache, the others are released.
7. After the step every listener of a sequence that changed is notified once: `follow`, and `Request.on_update`.

Only the engine's thread touches pages, queues and the model, so callers cannot interrupt a step. The thread starts when
a caller waits for a result, and ends with `stop`, when the engine is dropped, or when the interpreter exits. An
exception in computing or in a callback ends the sequences concerned. Any other error in a step ends all running
sequences, and the reference counts of the pages are rebuilt. An error that cannot be recovered from ends the engine.
"""

import contextvars
import itertools
import os
import queue
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch

from ...kernels.dispatch import backend_here
from ...kernels.errors import AfnextError
from ..errors import ContextLengthError, OutOfPagesError
from ..model.audio_flamingo import AudioFlamingo
from .executor import Executor, LocalExecutor
from .kv_cache import KVCache, pages_for
from .options import EngineOptions
from .prefix import Prefix
from .prefix_cache import PageKeys
from .prefix_file import SavedPrefix, write_prefix
from .request import FinishReason, Request, SequenceState
from .scheduler import OVERTAKEN
from .stats import EngineStats, RequestStats
from .steps import Steps
from .worker import Worker

_POLL_SECONDS = 1.0  # interval at which a waiting caller checks that the engine's thread is alive
_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()
T = TypeVar("T")


class Engine:
    """Runs requests over one model and one KV cache. Any thread may call any method but `step`."""

    def __init__(self, model: AudioFlamingo, options: EngineOptions, executor: Executor | None = None):
        """executor: computes the operations; by default `model` in this process."""
        self.options = options
        self._model = model
        self._executor = executor or LocalExecutor(model, options)
        self._steps = Steps(self._executor, options)
        self._inbox = self._steps.inbox
        self._worker = Worker(self._inbox)
        self._numbers = itertools.count()
        _engines.add(self)
        weakref.finalize(self, self._executor.close)
        weakref.finalize(self, self._worker.end)  # called before the other

    @property
    def cache(self) -> KVCache:
        """The KV cache."""
        return self._steps.pages.cache

    @property
    def room(self) -> int:
        """Tokens that the KV cache can hold at its largest size."""
        return self._steps.pages.limit * self.options.page_size

    def sequence(self, request: Request) -> SequenceState:
        """The sequence of a request. `follow` queues it, so an interrupt before that leaves nothing behind.

        Raises what `check` does, and AfnextError for a prefix that is closed.
        """
        self.check(request)
        arrival = next(self._numbers)
        sequence = SequenceState(
            request,
            order=(arrival - OVERTAKEN * request.priority, arrival),
            backend=backend_here(),
            threads=torch.get_num_threads(),
            context=contextvars.copy_context(),
        )
        if request.on_update is not None:
            sequence.listeners.append(request.on_update)
        if request.prefix is not None:
            _ = request.prefix.pages  # raises once closed
        elif self.options.prefix_cache_bytes:
            sequence.keys = PageKeys(request.audio, self.options.page_size, request.salt)
            sequence.keys.of(request.token_ids)
        return sequence

    def submit(self, request: Request) -> SequenceState:
        """Queue a request and return its sequence, which the engine's thread fills. Raises what `sequence` does.

        The thread runs once `follow`, `listen` or `start` is called, or if the request has `on_update`.
        """
        sequence = self.sequence(request)
        self._inbox.submit(sequence)
        if request.on_update is not None:
            self.start()
        return sequence

    def check(self, request: Request) -> None:
        """Raise ContextLengthError if prompt and answer exceed the model's context, OutOfPagesError if they exceed the
        KV cache, ValueError if the prompt does not continue its prefix, and EngineDeadError after a fatal error."""
        self._steps.check_alive()
        limit, prompt = self._model.config.decoder.max_positions, len(request.token_ids)
        if request.budget > limit:
            raise ContextLengthError(
                f"the prompt has {prompt} tokens and up to {request.budget - prompt} are requested, "
                f"but the model's context ends at {limit}. Shorten the prompt or lower max_new_tokens."
            )
        if pages_for(request.budget, self.options.page_size) > self._steps.pages.limit:
            raise OutOfPagesError(
                f"prompt and answer take {request.budget:,} tokens of the KV cache, and the memory that was there at "
                f"loading has room for {self.room:,}. Give less audio, lower max_new_tokens, or load with "
                'kv="int8" or a smaller scheme; `afnext plan` shows what fits.'
            )
        if request.prefix is not None:
            length = len(request.prefix.token_ids)
            if length >= prompt or request.token_ids[:length] != request.prefix.token_ids:
                raise ValueError("the prompt must begin with its prefix and be longer")
        begun = [] if request.beginning is None else request.beginning.request.token_ids
        if request.token_ids[: len(begun)] != begun:
            raise ValueError("the prompt must continue its beginning")
        if request.expected is not None and (request.sampling is not None or prompt % self.options.page_size):
            raise ValueError("only the beginning of a prompt, of whole pages and without sampling, has `expected`")

    def listen(self, request: Request) -> Prefix:
        """Compute only the keys and values of a prompt (`sampling` is None). Raises AfnextError if it is cancelled."""
        sequence = self.sequence(request)
        for _ in self.follow([sequence]):
            pass
        if sequence.prefix is None:
            raise AfnextError("listening was cancelled before the end; listen again")
        return sequence.prefix

    def save(self, prefix: Prefix, file: BinaryIO, extra: Mapping[str, str]) -> None:
        """Write a prefix, and the metadata `extra`, to a file; see `prefix_file`. Other requests run meanwhile.

        Raises OSError if the file cannot be written, and AfnextError if the prefix is closed.
        """
        pages = self._steps.pages
        copy = self._between_steps(lambda: pages.copy_prefix(prefix))  # `prefix` may be closed meanwhile
        try:
            write_prefix(file, copy.token_ids, copy.pages, self._executor, extra, self._together)
        finally:
            copy.close()

    def saved(self, path: Path) -> SavedPrefix:
        """Open a file written by `save`, for `load`. Raises ContextFileError if it does not fit or is damaged."""
        return SavedPrefix(path, self._executor, self._together)

    def load(self, saved: SavedPrefix) -> Prefix:
        """Load a saved prefix into the cache. Other requests run while its file is read.

        Raises OutOfPagesError if there is no room for it, and ContextFileError if the file is damaged.
        """
        pages = self._steps.pages
        prefix = self._between_steps(lambda: pages.empty_prefix(saved.token_ids))

        def between_steps(copy: Callable[[], None]) -> None:
            self._between_steps(lambda: None if prefix.closed else copy())

        try:
            saved.load(prefix.pages, between_steps)
        except BaseException:
            prefix.close()
            raise
        return prefix

    def follow(self, sequences: list[SequenceState]) -> Generator[tuple[int, int], None, None]:
        """Queue the sequences that are not queued yet, and yield (index, token) as tokens are decoded, until all have
        ended.

        Closing the generator early cancels the sequences that have not ended. Raises the error of a sequence that
        failed, and AfnextError when called in a callback of a request, where it would wait for itself.
        """
        given = [0] * len(sequences)
        updates: queue.SimpleQueue[list[SequenceState]] = queue.SimpleQueue()
        try:
            self._refuse_in_callback()
            for sequence in sequences:
                sequence.listeners.append(updates.put)
                if not sequence.queued:
                    self._inbox.submit(sequence)
            self.start()
            ended = False
            while not ended:
                ended = all(sequence.finish_reason for sequence in sequences)  # read first: no token comes after it
                for index, sequence in enumerate(sequences):
                    for token in sequence.tokens[given[index] :]:
                        given[index] += 1
                        yield index, token
                    if sequence.error is not None and sequence.finish_reason is not None:
                        raise sequence.error
                if not ended:
                    self._wait(updates)
        finally:
            self.cancel(*sequences)
            _unsubscribe(sequences, updates.put)

    def cancel(self, *sequences: SequenceState, reason: FinishReason = "cancelled") -> None:
        """End sequences that have not ended. They keep their tokens; their pages are free on return.

        Waits for the end of the step in progress, except in a callback of a request.
        """
        updates: queue.SimpleQueue[list[SequenceState]] = queue.SimpleQueue()
        for sequence in sequences:
            sequence.listeners.append(updates.put)
        self.cancel_soon(*sequences, reason=reason)
        if self._steps.in_step_here:
            return
        if not self._worker.alive and not self._steps.in_step:
            self._steps.settle()
        while not all(sequence.finish_reason for sequence in sequences):
            self._wait(updates)
        _unsubscribe(sequences, updates.put)

    def cancel_soon(self, *sequences: SequenceState, reason: FinishReason = "cancelled") -> None:
        """End unfinished sequences before the next step, without waiting for it."""
        for sequence in sequences:
            if sequence.finish_reason is None:
                sequence.end_requested = reason
            if not sequence.queued:
                self._inbox.submit(sequence)
        self._inbox.wake.put(None)

    def release_memory(self) -> None:
        """Release KV memory that neither requests, contexts nor the prefix cache use. The engine does so by itself
        after half a minute without work."""
        self._between_steps(self._steps.pages.trim)

    def rehearse(self, progress: Callable[[str, int, int], None] = lambda stage, done, total: None) -> None:
        """Compile a GPU's kernels, several at a time, and do every kind of work once; see `rehearsal.py`.

        progress: called in the engine's thread with (stage, done, total). Raises what a step or the compiler raises.
        """
        self._between_steps(lambda: self._steps.rehearse(progress))

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Allocate the whole KV cache and record every decode step, where steps are recorded as CUDA graphs.

        The cache keeps its size from then on, so that no step has to be recorded again. progress: called in the
        engine's thread with (done, total) steps. Raises what a step raises.
        """
        self._between_steps(lambda: self._steps.warm_up(progress))

    @property
    def alive(self) -> bool:
        """False after an error that ended the engine."""
        return self._steps.alive

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that are not computed yet: one of the numbers of `stats`, which counts all pages besides."""
        return self._steps.queued_tokens

    def stats(self) -> EngineStats:
        """Statistics of the work so far. Does not wait."""
        return self._steps.stats()

    def requests(self) -> list[RequestStats]:
        """The requests in the engine. Does not wait."""
        return self._steps.requests()

    def start(self) -> None:
        """Start the engine's thread unless it runs."""
        self._worker.start(self._steps)

    def stop(self) -> None:
        """End the engine's thread after the step in progress. It starts again when a caller waits for a result."""
        self._refuse_in_callback()
        self._worker.stop()

    def step(self) -> bool:
        """Do one step in the calling thread, for tests. Returns whether there is more to do.

        Raises AfnextError while the engine's thread runs.
        """
        if self._worker.alive:
            raise AfnextError("the engine's thread does the steps; stop it before you call step")
        return contextvars.Context().run(self._steps.step)

    def _between_steps(self, function: Callable[[], T]) -> T:
        """Call a function in the engine's thread between two steps. Returns its result or raises its exception."""
        self._refuse_in_callback()
        self._steps.check_alive()
        future = self._inbox.call(function)
        while True:
            self.start()
            try:
                return future.result(_POLL_SECONDS)
            except FutureTimeoutError:
                if future.done():
                    raise

    def _together(self, function: Callable[[], T]) -> T:
        """Call a function that uses the executor; with several processes, between two steps, since all must take
        part."""
        return function() if self._executor.size == 1 else self._between_steps(function)

    def _wait(self, updates: "queue.SimpleQueue[list[SequenceState]]") -> None:
        """Wait for an update, and check that the engine's thread is alive.

        Raises EngineDeadError if a process of the executor has ended; the engine's thread may still be computing.
        """
        try:
            updates.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            if self._executor.failure is not None:
                raise self._executor.failure from None
            self.start()

    def _refuse_in_callback(self) -> None:
        if self._steps.in_step_here:
            raise AfnextError(
                "a callback of a request (progress, cancelled, on_update) may not wait for the engine that calls it; "
                "make the call from another thread, or after the callback has returned."
            )

    def _after_fork(self) -> None:
        self._steps.after_fork()
        self._worker = Worker(self._inbox)


def _unsubscribe(sequences: Iterable[SequenceState], listener: Callable[[list[SequenceState]], None]) -> None:
    """Remove a listener. Otherwise a queue with an update would keep a sequence, and its prefix, alive until the next
    garbage collection."""
    for sequence in sequences:
        sequence.listeners = [other for other in sequence.listeners if other != listener]  # the engine iterates the old


def _after_fork_in_child() -> None:
    for engine in list(_engines):
        engine._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
