"""The engine's steps: each serves all requests in progress.

Only one thread at a time may call the methods of `Steps`. Other threads put their calls into its `Inbox`.
"""

import logging
import queue
import threading
import time
import traceback
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ...kernels.decode_attention import MAX_NEW_TOKENS
from ...kernels.dispatch import backend
from ...kernels.errors import AfnextError
from ..errors import EngineDeadError, EngineError, NonFiniteError
from .decode_runner import Decoded, DecodeRunner
from .executor import Executor
from .kv_cache import pages_for
from .options import EngineOptions
from .page_manager import PageManager
from .prefill import Encode, PromptEmbeddings
from .prefix_cache import EncoderCache
from .rehearsal import rehearse
from .request import FinishReason, OnUpdate, SequenceState
from .sampler import Sampler
from .scheduler import Scheduler
from .speculation import Drafter
from .stats import STEP_SECONDS, EngineStats, Phase, RequestStats
from .step_errors import NOT_FINITE, explained, step_error

_log = logging.getLogger("afnext.engine")
T = TypeVar("T")


class Inbox:
    """Calls from other threads, handled before the engine's next step. The methods take no lock, so a finalizer or a
    signal handler may also call them."""

    def __init__(self) -> None:
        self.arrivals: deque[SequenceState] = deque()
        self.calls: deque[tuple[Future[object], Callable[[], object]]] = deque()
        self.wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def submit(self, sequence: SequenceState) -> None:
        """Queue a new sequence. Calling it twice, after an interrupt, is safe."""
        sequence.request.timings.submitted()
        self.arrivals.append(sequence)
        sequence.queued = True
        self.wake.put(None)

    def rouse(self) -> None:
        """Make the engine do a step, even if only to notice changes."""
        self.wake.put(None)

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Call a function between two steps."""
        future: Future[T] = Future()
        self.calls.append((future, function))  # type: ignore[arg-type]
        self.wake.put(None)
        return future


class Steps:
    """Does steps, and keeps queues, pages and notifications consistent whatever happens in one.

    An exception in computing or in a callback ends the sequences concerned. Any other error in a step ends all running
    sequences, and the users of all pages are recounted. An error that leaves the device unusable, or in that recovery,
    ends the engine: `dead` is set.
    """

    def __init__(self, executor: Executor, options: EngineOptions):
        self.executor = executor
        self.device = executor.model.device
        self.inbox = Inbox()
        self.dead: EngineDeadError | None = None
        self._model = executor.model
        self._options = options
        self._decode_runner = DecodeRunner(executor, options)
        self.pages = PageManager(self._model.config.decoder, options, executor, wake=self.inbox.rouse)
        self.scheduler = Scheduler(self.pages, options.max_batch)
        self._encoder_cache = EncoderCache(options.encoder_cache_bytes)
        self._changed: dict[SequenceState, None] = {}
        self._stepping_in: int | None = None
        self._counts = [0] * (len(STEP_SECONDS) + 1)
        self._seconds, self._last_seconds = 0.0, 0.0
        self._last_end = time.monotonic()
        self._speculative, self._accepted = 0, 0

    @property
    def in_step(self) -> bool:
        """Whether a step is in progress, or its thread died in one."""
        return self._stepping_in is not None

    @property
    def in_step_here(self) -> bool:
        """Whether the calling thread is in a step, that is in a callback."""
        return self._stepping_in == threading.get_ident()

    def step(self) -> bool:
        """Do one step. Returns whether there is more to do."""
        start = time.monotonic()
        self._run(self._take_in, self._admit, self._prefill, self._decode)
        self._last_end = time.monotonic()
        self._last_seconds = self._last_end - start
        self._counts[bisect_left(STEP_SECONDS, self._last_seconds)] += 1
        self._seconds += self._last_seconds
        return bool(self.inbox.arrivals or self.scheduler.unfinished)

    def settle(self) -> None:
        """Handle the inbox without a step."""
        self._run(self._take_in)

    def trim(self) -> None:
        """Release KV memory that nothing uses."""
        self._run(self.pages.trim)

    def rehearse(self, progress: Callable[[str, int, int], None]) -> None:
        """See `Engine.rehearse`. Called between two steps."""
        count = min(self.pages.limit, pages_for(self._options.chunk_size, self._options.page_size))
        if not self.pages.make_free(count, count, retry=True):
            _log.warning("kernels are not compiled ahead, as there is no memory for %d KV pages", count)
            return
        pages = self.pages.cache.pool.allocate(count)
        try:
            rehearse(self.executor, self._options, pages, progress)
        finally:
            self.pages.cache.pool.release(pages)

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """See `Engine.warm_up`. Called between two steps."""
        if self.executor.recordable:
            self.pages.preallocate()
            self.executor.warm_up(progress)
        else:
            _log.info("decode steps are not recorded ahead on %s", self.device)

    def _run(self, *parts: Callable[[], None]) -> None:
        """Do the parts of a step and notify listeners. Reference counts of pages are consistent afterwards, also after
        an error."""
        try:
            if self.dead is None and self.executor.failure is not None:
                self._die(self.executor.failure)
            if self.dead is not None:
                self._fail_all(self.dead)
                return
            if self._stepping_in is not None:
                self._recover(EngineError("the engine's thread ended unexpectedly; send the request again"))
            self._stepping_in = threading.get_ident()
            with torch.inference_mode():
                for part in parts:
                    part()
            self._notify()
        except BaseException as error:
            self._recover(error)
        self._stepping_in = None

    def _take_in(self) -> None:
        """Handle new requests, closed prefixes and calls, and end the sequences that are due.

        An entry leaves its queue after it is handled; handling it twice changes nothing.
        """
        while self.inbox.arrivals:
            sequence, scheduler = self.inbox.arrivals[0], self.scheduler
            new = not (sequence.ended or sequence in scheduler.prefilling or sequence in scheduler.decoding)
            if new:
                self._set_threads(sequence)
                self._guarded([sequence], partial(self.pages.share_prefix, sequence))
            if new and not sequence.ended:
                scheduler.add(sequence)
            self.inbox.arrivals.popleft()
        self.pages.drop_closed_prefixes()
        for sequence in list(self.scheduler.unfinished):
            reason = self._guarded([sequence], sequence.due_reason)
            if reason is not None and not sequence.ended:
                self._end(sequence, reason)
        while self.inbox.calls:
            _run_call(*self.inbox.calls[0])
            self.inbox.calls.popleft()

    def _set_threads(self, sequence: SequenceState) -> None:
        """Use the submitter's `torch.set_num_threads`, which torch keeps per thread."""
        if sequence.threads is not None:
            self.executor.set_threads(sequence.threads)

    def _admit(self) -> None:
        while (sequence := self.scheduler.next_admissible()) is not None:
            if sequence.error is None:
                self._guarded([sequence], partial(self._begin, sequence))
            if sequence.error is None:
                self.scheduler.start(sequence)
            elif not sequence.ended:
                self._end(sequence, "error")

    def _begin(self, sequence: SequenceState) -> None:
        """Give an admitted sequence its pages and the state to compute it."""
        request = sequence.request
        self.pages.reserve(sequence)
        request.timings.admitted()
        if sequence.sampler is None and request.sampling is not None:
            if self._options.draft_tokens:
                audio = self._model.config.audio_token_id
                sequence.drafter = Drafter([token for token in request.token_ids if token != audio])
            vocabulary = self._model.config.decoder.vocab_size
            sequence.sampler = Sampler(request.sampling, request.token_ids, vocabulary, self._model.device)
        encode: Encode = self.executor.encode
        if self._options.encoder_cache_bytes:
            encode = partial(self._encoder_cache.encode, encode, self.device, salt=request.salt)
        sequence.embeddings = PromptEmbeddings(
            self._model,
            request.token_ids + sequence.tokens[:-1],
            request.audio,
            encode_batch=self._options.windows_at_once,
            timings=request.timings,
            start=sequence.computed,
            encode=encode,
            embed=self.executor.embed,
            stream=self.executor.encoder_stream,
        )

    def _prefill(self) -> None:
        """Compute chunks of the prompts in progress, in turn, `chunk_size` tokens including those of the answers."""
        whole = budget = max(1, self._options.chunk_size - len(self.scheduler.decoding))
        for sequence in list(self.scheduler.prefilling):
            if self._options.batch_invariant:
                count = self._fixed_chunk(sequence)
                fits = count <= budget or budget == whole
            else:
                count = min(budget, sequence.to_prefill - sequence.computed)
                fits = budget > 0
            if fits:
                self._prefill_chunk(sequence, count)
                budget -= count
        if self.executor.encoder_stream.apart and self.scheduler.prefilling:
            following = self.scheduler.prefilling[0]
            self._guarded([following], partial(self._encode_ahead, following))

    def _encode_ahead(self, sequence: SequenceState) -> None:
        """Queue the encoding of the next step's first chunk, beside the chunks that this step has queued."""
        assert sequence.embeddings is not None
        with _forcing(sequence.backend):
            sequence.embeddings.encode_until(sequence.computed + self._options.chunk_size)

    def _fixed_chunk(self, sequence: SequenceState) -> int:
        """Tokens of the next chunk, independent of other requests: for a prompt up to the next multiple of
        `chunk_size`, for a preempted answer as many as are decoded together."""
        start, prompt = sequence.computed, len(sequence.request.token_ids)
        if start < prompt:
            return min(self._options.chunk_size - start % self._options.chunk_size, prompt - start)
        return min(MAX_NEW_TOKENS, sequence.to_prefill - start)

    def _prefill_chunk(self, sequence: SequenceState, count: int) -> None:
        request, stop = sequence.request, sequence.computed + count
        decoded = self._guarded([sequence], partial(self._compute_chunk, sequence, stop))
        if sequence.ended:
            return
        sequence.computed = stop
        self._changed[sequence] = None
        if not self._report_progress(sequence):
            return
        if stop < sequence.to_prefill:
            self.scheduler.rotate(sequence)
        elif request.sampling is None:
            cached = None if request.expected is None else sequence.cached
            sequence.prefix = self.pages.new_prefix(request.token_ids, sequence.pages, cached)
            self._end(sequence, "stop")
        else:
            sequence.embeddings = None
            self.scheduler.finish_prefill(sequence)
            self.pages.insert(sequence)
            if decoded is not None:
                self._accept(sequence, decoded)

    def _compute_chunk(self, sequence: SequenceState, stop: int) -> Decoded | None:
        """Compute a prompt up to `stop`, and choose the first token after its end unless there are tokens already.

        Not a closure: `traceback.clear_frames` does not clear a closure's variables.
        """
        request = sequence.request
        assert sequence.embeddings is not None
        if stop == sequence.computed:  # another request computed the whole prompt
            return None
        with _forcing(sequence.backend):
            if self._options.batch_invariant and sequence.computed >= len(request.token_ids):
                self._decode_runner.replay(sequence, stop - sequence.computed)
                return None
            x = sequence.embeddings.piece(sequence.computed, stop)
            with request.timings.measure("prefill", self.device):
                hidden: Tensor = self.executor.prefill(x, sequence.pages, sequence.computed)
            first = stop == sequence.to_prefill and request.sampling is not None and not sequence.tokens
            return self._decode_runner.first(sequence, hidden) if first else None

    def _report_progress(self, sequence: SequenceState) -> bool:
        """Call the request's `progress`. Returns whether the sequence goes on."""
        self._guarded([sequence], sequence.report_progress)
        return not sequence.ended

    def _decode(self) -> None:
        groups: dict[str | None, list[SequenceState]] = {}
        for sequence in self.scheduler.decoding:
            groups.setdefault(sequence.backend, []).append(sequence)
        for forced, sequences in groups.items():
            decoded = self._guarded(sequences, partial(self._decode_group, forced, sequences))
            for sequence, one in zip(sequences, decoded or (), strict=False):
                sequence.computed += 1
                self._accept(sequence, one)

    def _decode_group(self, forced: str | None, sequences: list[SequenceState]) -> list[Decoded]:
        with _forcing(forced):
            return self._decode_runner.decode(sequences)

    def _accept(self, sequence: SequenceState, decoded: Decoded) -> None:
        """Add the first chosen token, and those chosen after accepted speculative tokens."""
        self._changed[sequence] = None
        right = 0
        for at in range(decoded.accepted + 1):
            sequence.computed += at > 0
            token = decoded.tokens[at]
            if token is None:
                self._fail([sequence], NonFiniteError(NOT_FINITE))
                return
            if sequence.request.logprobs:
                sequence.logprob_sum += decoded.logprobs[at]
            self._append(sequence, token)
            if sequence.ended:
                break
            right = min(at + 1, decoded.accepted)
        self._speculative += len(decoded.speculative)
        self._accepted += right
        if sequence.drafter is not None:
            sequence.drafter.record(len(decoded.speculative), right)

    def _append(self, sequence: SequenceState, token: int) -> None:
        sampling, sampler = sequence.request.sampling, sequence.sampler
        assert sampling is not None
        assert sampler is not None
        sampler.accept(token)
        if sequence.drafter is not None:
            sequence.drafter.push(token)
        sequence.tokens.append(token)
        sequence.request.timings.token(len(sequence.tokens))
        repeats = sequence.guard.push(token)
        if token in sampling.stop_token_ids:
            self._end(sequence, "stop")
        elif len(sequence.tokens) == sampling.max_new_tokens:
            self._end(sequence, "length")
        elif repeats and sampling.stop_repetition:
            self._end(sequence, "repetition")

    def _end(self, sequence: SequenceState, reason: FinishReason) -> None:
        """End a sequence and release its pages, except those that the prefix cache keeps."""
        if reason in ("stop", "length") and sequence.pages:
            self.pages.insert(sequence)
        beginning = sequence.request.beginning
        if beginning is not None and beginning.queued and not beginning.ended:
            self._end(beginning, "cancelled")
        self.scheduler.remove(sequence)
        self.pages.release(sequence)
        sequence.embeddings = None
        if reason != "error":  # after an error the device may not respond
            sequence.request.timings.settle()
        self._changed[sequence] = None
        sequence.finish_reason = reason
        self.scheduler.unfinished.pop(sequence, None)

    def _guarded(self, sequences: list[SequenceState], work: Callable[[], T]) -> T | None:
        """Call `work`, which computes or calls back for `sequences`. An exception ends only these sequences.

        `work` must leave queues and reference counts consistent wherever it raises.
        """
        try:
            return work()
        except Exception as error:
            self._fail(sequences, error)
            return None

    def _fail(self, sequences: list[SequenceState], error: Exception) -> None:
        """End sequences with an error. Raises it if it left the device unusable."""
        error = explained(error)
        for sequence in sequences:
            if not sequence.ended:
                sequence.error = sequence.error or error
                self._end(sequence, "error")
        traceback.clear_frames(error.__traceback__)  # the frames hold tensors
        if not self._device_works():
            raise error

    @property
    def alive(self) -> bool:
        """See `Engine.alive`."""
        return self.dead is None and self.executor.failure is None

    @property
    def queued_tokens(self) -> int:
        """See `Engine.queued_tokens`."""
        queued = (self.inbox.arrivals, self.scheduler.waiting, self.scheduler.prefilling)
        return sum(max(0, s.to_prefill - s.computed) for sequences in queued for s in sequences.copy())

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        waiting, pool = [*self.inbox.arrivals.copy(), *self.scheduler.waiting], self.pages.cache.pool
        prefilling, decoding = self.scheduler.prefilling.copy(), self.scheduler.decoding.copy()
        in_prefixes = {page for pages in self.pages.prefixes.copy().values() for page in pages}
        private = {page for sequence in (*prefilling, *decoding) for page in sequence.private_pages}
        return EngineStats(
            alive=self.alive,
            waiting=len(waiting),
            prefilling=len(prefilling),
            decoding=len(decoding),
            queued_tokens=self.queued_tokens,
            free_pages=pool.free,
            private_pages=len(private),
            prefix_pages=len(in_prefixes),
            cached_pages=len(set(self.pages.prefix_cache.pages) - in_prefixes - private),
            max_pages=self.pages.limit,
            steps=sum(self._counts),
            step_counts=tuple(self._counts),
            step_seconds=self._seconds,
            last_step_seconds=self._last_seconds,
            idle_seconds=time.monotonic() - self._last_end,
            speculative_tokens=self._speculative,
            accepted_tokens=self._accepted,
            preemptions=self.scheduler.preemptions,
            resizes=self.pages.cache.resizes,
            decode_steps=self.executor.recordings,
        )

    def requests(self) -> list[RequestStats]:
        """See `Engine.requests`."""
        phases: dict[Phase, list[SequenceState]] = {
            "waiting": [*self.inbox.arrivals.copy(), *self.scheduler.waiting],
            "prefilling": [*self.scheduler.prefilling.copy()],
            "decoding": self.scheduler.decoding.copy(),
        }

        def numbers(phase: Phase, sequence: SequenceState) -> RequestStats:
            prompt = len(sequence.request.token_ids)
            computed = min(sequence.computed, prompt)
            return RequestStats(phase, prompt, computed, len(sequence.tokens), sequence.request.timings.elapsed)

        return [numbers(phase, sequence) for phase, sequences in phases.items() for sequence in sequences]

    def after_fork(self) -> None:
        """In a forked child: refuse requests, or reset if neither threads nor a GPU are involved."""
        self.inbox.wake = queue.SimpleQueue()
        if torch.get_num_threads() > 1 or self._model.device.type != "cpu" or self.executor.size > 1:
            self.dead = EngineDeadError(
                "this process was forked after the model was loaded, and neither the threads of the kernels nor a GPU "
                'survive that. Load the model in the child, start it with multiprocessing\'s "spawn" method, or set '
                "torch.set_num_threads(1) before you fork."
            )
        for sequence in [*self.inbox.arrivals, *self.scheduler.unfinished]:  # they belong to the parent
            sequence.end_requested = "cancelled"

    def _device_works(self) -> bool:
        """Whether the device still computes: some CUDA errors leave it unusable for the whole process."""
        if self.executor.failure is not None:
            return False
        try:
            if self._model.device.type == "cuda":
                torch.cuda.synchronize(self._model.device)
        except RuntimeError:
            return False
        return True

    def _recover(self, error: BaseException) -> None:
        """Make the engine consistent after an error at an unknown point of a step.

        All running sequences fail. Waiting ones and prefixes stay, because nothing writes into the pages of a prefix.
        The caches and the recorded steps are dropped, and the users of all pages are recounted.
        """
        try:
            if not isinstance(error, AfnextError):
                _log.error("a step of the engine failed", exc_info=error)
            if not self._device_works():
                self._die(error)
                return
            scheduler = self.scheduler
            waiting = [*scheduler.waiting, *self.inbox.arrivals]
            running = [
                s for s in scheduler.unfinished if s not in waiting or s in scheduler.prefilling or s.private_pages
            ]
            failure = step_error(error)
            for sequence in running:
                scheduler.remove(sequence)
                scheduler.unfinished.pop(sequence, None)
                if sequence in self.inbox.arrivals:
                    self.inbox.arrivals.remove(sequence)
                if not sequence.ended:
                    sequence.error = sequence.error or failure
                sequence.private_pages, sequence.shared_pages, sequence.pages = [], [], []
                sequence.embeddings, sequence.prefix = None, sequence.prefix if sequence.finish_reason else None
                sequence.finish_reason = sequence.finish_reason or "error"
                self._changed[sequence] = None
            for sequence in waiting:
                sequence.pages, sequence.private_pages = [], []
                if sequence.request.prefix is None or sequence.ended:
                    sequence.shared_pages = []
            self.pages.rebuild(dict.fromkeys(waiting))
            self._encoder_cache = EncoderCache(self._options.encoder_cache_bytes)
            traceback.clear_frames(error.__traceback__)
            self._notify()
        except Exception as second:
            self._die(second)

    def _die(self, error: BaseException) -> None:
        """Fail every sequence and refuse new ones."""
        dead = self.executor.failure  # logged already
        if dead is None:
            _log.critical("the engine cannot continue", exc_info=error)
            dead = EngineDeadError(
                f"the engine failed and cannot continue in this process ({type(error).__name__}: {error}). Restart it."
            )
            dead.__cause__ = error
        self.dead = dead
        self._fail_all(dead)

    def _fail_all(self, dead: EngineDeadError) -> None:
        for sequence in [*self.inbox.arrivals, *self.scheduler.unfinished]:
            sequence.error = sequence.error or dead
            sequence.finish_reason = sequence.finish_reason or "error"
            self._changed[sequence] = None
        self.inbox.arrivals.clear()
        self.scheduler.unfinished.clear()
        self.scheduler.waiting.clear()
        self.scheduler.prefilling.clear()
        self.scheduler.decoding.clear()
        while self.inbox.calls:
            _run_call(self.inbox.calls[0][0], self.check_alive)
            self.inbox.calls.popleft()
        self._notify()

    def check_alive(self) -> None:
        """Raise EngineDeadError after a fatal error."""
        if (dead := self.dead or self.executor.failure) is not None:
            raise dead

    def _notify(self) -> None:
        """Call every listener of the sequences that changed, once."""
        updates: dict[OnUpdate, list[SequenceState]] = {}
        for sequence in self._changed:
            for listener in sequence.listeners:
                updates.setdefault(listener, []).append(sequence)
        for listener, sequences in updates.items():
            try:
                listener(sequences)
            except Exception:
                _log.exception("on_update failed; the requests that it belongs to are cancelled")
                for sequence in sequences:
                    sequence.end_requested = "cancelled"
                self.inbox.wake.put(None)
        self._changed.clear()


def _forcing(forced: str | None) -> AbstractContextManager[None]:
    return backend(forced) if forced else nullcontext()


def _run_call(future: "Future[object]", function: Callable[[], object]) -> None:
    if future.done():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
