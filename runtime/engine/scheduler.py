"""Continuous batching: requests come and go at any time, and every step serves all that are in progress.

A step decodes each answer in progress by a token, or by several where drafts of them are right, and prefills chunks of
the prompts in progress, `chunk_size` tokens together, the prompts taking turns. So a long prompt delays the answers of
others by a chunk, never by itself, and a short prompt waits for a chunk of each other one at most.

A request is admitted once there is room for its prompt and its longest answer, so that it never stops for want of pages
on the way. Who finds no room waits, in the order of arrival except for priorities, and may interrupt those that come
after it in that order: their pages go, their tokens stay, and what was computed is computed again.

The engine is synchronous: `step` does one step, under a lock, and whoever waits for a token does steps until it has
come. So several threads that wait share their steps, and none is needed beside them; `start` adds one for callers that
do not wait.
"""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from ...kernels.dispatch import forced_backend
from ...kernels.errors import AfnextError
from ..errors import ContextLengthError, OutOfPagesError
from ..model.audio_flamingo import AudioFlamingo
from .decode_graph import DecodeStep
from .kv_cache import KVCache, pages_for
from .options import EngineOptions
from .prefill import PromptEmbeddings, prefill_chunk
from .prefix import Prefix
from .prefix_cache import EncoderCache, PageKeys, PrefixCache
from .prefix_file import SavedPrefix, save_prefix
from .request import FinishReason, Request, Sequence
from .sampler import Sampler, choose
from .speculation import Drafter

OVERTAKEN = 32  # requests that one unit of priority lets a request go before
# Steps kept for different numbers of sequences, of tokens each, widths of their page table, and forced backends. On a
# CPU each keeps what its calls compute: together at most some 250 MB at full size, part of the memory plan's reserve.
_MOST_STEPS, _MOST_STEPS_ON_CPU = 16, 4
_MOST_DRAFTING = 8  # sequences decoded at once for which drafts are made
_log = logging.getLogger("afnext.engine")


class Engine:
    """Runs requests over one model and one KV cache. Every method may be called from any thread."""

    def __init__(self, model: AudioFlamingo, options: EngineOptions):
        self.options = options
        self._model = model
        most = model.config.decoder.max_positions * options.max_batch
        self._limit = max(1, min(options.max_kv_tokens or most, most) // options.page_size)
        self.cache = KVCache(
            model.config.decoder,
            pages=0,
            page_size=options.page_size,
            device=model.device,
            dtype=options.cache_dtype(model.dtype),
        )
        self._prefixes = PrefixCache(self.cache.pool, options.prefix_cache_bytes // self.cache.page_nbytes)
        self._encoder_cache = EncoderCache(options.encoder_cache_bytes)
        self._lock = threading.RLock()
        self._stepping = False
        self._arrivals = itertools.count()
        self._thread: threading.Thread | None = None
        self._news = threading.Event()
        self._inbox: deque[Sequence] = deque()
        self._released: deque[list[int]] = deque()
        self._waiting: list[Sequence] = []
        self._prefilling: deque[Sequence] = deque()
        self._decoding: list[Sequence] = []
        self._decode_steps: dict[tuple[int, int, int, str | None], DecodeStep] = {}

    @property
    def room(self) -> int:
        """Tokens that the KV cache can hold once it has grown."""
        return self._limit * self.options.page_size

    def submit(self, request: Request) -> Sequence:
        """Queue a request; steps will fill the sequence that is returned. Raises what `check` does, and
        AfnextError for a prefix that has been closed."""
        self.check(request)
        arrival = next(self._arrivals)
        sequence = Sequence(request, order=(arrival - OVERTAKEN * request.priority, arrival))
        if request.prefix is None and self.options.prefix_cache_bytes:
            sequence.keys = PageKeys(request.audio, self.options.page_size)
            sequence.keys.of(request.token_ids)
        if request.prefix is not None:
            with self._lock:  # whoever closes the prefix from now on, its pages stay until the sequence ends
                sequence.held = list(request.prefix.pages)
                self.cache.pool.share(sequence.held)
        self._inbox.append(sequence)
        self._news.set()
        return sequence

    def check(self, request: Request) -> None:
        """Raise ContextLengthError when prompt and answer cannot fit the model's context, OutOfPagesError when they
        cannot fit the KV cache, and ValueError when the request does not go on where its prefix ends."""
        limit, prompt = self._model.config.decoder.max_positions, len(request.token_ids)
        if request.budget > limit:
            raise ContextLengthError(
                f"the prompt has {prompt} tokens and up to {request.budget - prompt} are asked for, "
                f"but the model's context ends at {limit}. Shorten the prompt or lower max_new_tokens."
            )
        if pages_for(request.budget, self.options.page_size) > self._limit:
            raise OutOfPagesError(
                f"prompt and answer take {request.budget:,} tokens of the KV cache, and the memory that was there at "
                f"loading has room for {self.room:,}. Give less audio, lower max_new_tokens, or load with "
                'kv="int8" or a smaller scheme; `afnext plan` shows what fits.'
            )
        if request.prefix is not None:
            length = len(request.prefix.token_ids)
            if length >= prompt or request.token_ids[:length] != request.prefix.token_ids:
                raise ValueError("the prompt must begin with its prefix and go on after it")

    def listen(self, request: Request) -> Prefix:
        """Compute the keys and values of a prompt alone (`sampling` None). Raises AfnextError when cancelled."""
        sequence = self.submit(request)
        for _ in self.follow([sequence]):
            pass
        if sequence.prefix is None:
            raise AfnextError("listening was cancelled before the end; listen again")
        return sequence.prefix

    def save(self, prefix: Prefix, path: Path, extra: Mapping[str, str]) -> None:
        """Write a prefix, and `extra` beside it, to a file; see `prefix_file`. Raises ContextFileError."""
        with self._lock:  # the cache may not be replaced meanwhile
            save_prefix(path, prefix, self._model, self.cache, extra)

    def saved(self, path: Path) -> SavedPrefix:
        """What `save` wrote to a file, for `load`. Raises ContextFileError for one that does not fit or is damaged."""
        return SavedPrefix(path, self._model, self.cache)

    def load(self, saved: SavedPrefix) -> Prefix:
        """Bring a saved prefix into the cache. Raises OutOfPagesError when it has no room."""
        with self._lock:
            needed = pages_for(len(saved.token_ids), self.options.page_size)
            if needed > self.cache.pool.free:
                self._grow(needed - self.cache.pool.free)
            pages = self.cache.pool.allocate(needed)
            prefix = Prefix(saved.token_ids, pages, self._release)
            saved.load(pages)
            return prefix

    def follow(self, sequences: list[Sequence]) -> Iterator[tuple[int, int]]:
        """Yield (index of a sequence, token) as tokens come, running the engine meanwhile; end when all have ended.

        Leaving early cancels the sequences that go on. Raises the error of one that failed.
        """
        given = [0] * len(sequences)

        def news() -> bool:
            ended = all(sequence.finish_reason for sequence in sequences)
            return ended or any(len(s.tokens) > n or s.error for s, n in zip(sequences, given, strict=True))

        try:
            going = True
            while going:
                with self._lock:
                    if not news():
                        self.step()
                going = any(sequence.finish_reason is None for sequence in sequences)
                for index, sequence in enumerate(sequences):
                    for token in sequence.tokens[given[index] :]:
                        given[index] += 1
                        yield index, token
                    if sequence.error is not None:
                        raise sequence.error
        finally:
            self.cancel(*sequences)

    def cancel(self, *sequences: Sequence, reason: FinishReason = "cancelled") -> None:
        """End sequences that have not ended; their tokens so far stay, and their pages are free on return."""
        for sequence in sequences:
            sequence.to_end = reason
        with self._lock:
            if not self._stepping:
                for sequence in sequences:
                    self._end(sequence, reason)
                self._settle()

    def step(self) -> bool:
        """Do one step. Returns whether there is more to do."""
        with self._lock:
            self._stepping = True
            try:
                with torch.inference_mode():
                    self._settle()
                    self._admit()
                    self._prefill_some()
                    if self._decoding:
                        self._guarded(list(self._decoding), self._decode)
            finally:
                self._stepping = False
            self._settle()
            return bool(self._inbox or self._waiting or self._prefilling or self._decoding)

    def start(self) -> None:
        """Do steps in a thread of its own whenever there is something to do, until `stop`."""

        def work() -> None:
            while self._thread is not None:
                self._news.clear()
                if not self.step():
                    self._news.wait()

        if self._thread is None:
            self._thread = threading.Thread(target=work, name="afnext-engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread of `start`, after the step it is in. Requests that go on are served by who waits for them."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._news.set()
            thread.join()

    def _settle_between_steps(self) -> None:
        """`_settle`, unless a step is under way in this very thread, which a finalizer may interrupt anywhere."""
        if not self._stepping:
            self._settle()

    def _settle(self) -> None:
        """Take in what came from other threads: requests, cancellations, pages given back. End what is overdue."""
        while self._inbox:
            sequence = self._inbox.popleft()
            if sequence.finish_reason is None:
                self._waiting.append(sequence)
        self._waiting.sort(key=lambda sequence: sequence.order)
        for sequence in [*self._waiting, *self._prefilling, *self._decoding]:
            self._guarded([sequence], self._end_if_due)
        while self._released:
            self.cache.pool.release(self._released.popleft())
        idle = not (self._waiting or self._prefilling or self._decoding)
        if idle and self.cache.pool.pages > 2 * self.cache.pool.end:
            self._resize(self.cache.pool.end)

    def _end_if_due(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if (reason := sequence.ending) is not None:
                self._end(sequence, reason)

    def _guarded(self, sequences: list[Sequence], work: Callable[[list[Sequence]], None]) -> None:
        """Do some work for sequences; an error ends these and nobody else."""
        try:
            work(sequences)
        except Exception as error:
            for sequence in sequences:
                sequence.error = sequence.error or error
                self._end(sequence, "error")

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.finish_reason is None:
            if sequence.keys is not None and reason in ("stop", "length"):
                self._keep(sequence.keys, sequence)
            self._withdraw(sequence)
            self._let_go(sequence)
            sequence.finish_reason = reason

    def _keep(self, keys: PageKeys, sequence: Sequence) -> None:
        """Let the prefix cache have the pages that a sequence has filled."""
        filled = keys.of((sequence.request.token_ids + sequence.tokens)[: sequence.computed])
        self._prefixes.insert(filled, sequence.pages[: len(filled)])

    def _let_go(self, sequence: Sequence) -> None:
        self.cache.pool.release(sequence.held)
        sequence.held = []

    def _withdraw(self, sequence: Sequence) -> None:
        """Take a sequence out of the engine and release the pages that it does not share."""
        for place in (self._waiting, self._prefilling, self._decoding):
            if sequence in place:
                place.remove(sequence)
        self.cache.pool.release(sequence.own)
        sequence.own, sequence.computed, sequence.embeddings = [], 0, None
        if sequence.request.prefix is None:
            self._let_go(sequence)

    def _admit(self) -> None:
        while len(self._prefilling) + len(self._decoding) < self.options.max_batch:
            sequence = self._next()
            if sequence is None:
                break
            if sequence.keys is not None:  # all but the last token, whose scores are needed
                sequence.held = self._prefixes.match(sequence.keys.of(sequence.request.token_ids[:-1]))
            if not self._make_room(sequence):
                if sequence.request.prefix is None:
                    self._let_go(sequence)
                if self._prefilling or self._decoding:
                    break
                sequence.error = OutOfPagesError(
                    f"{self._pages_needed(sequence)} KV pages are needed, and contexts leave "
                    f"{self._limit - self.cache.pool.pages + self.cache.pool.free} of {self._limit}. Close some."
                )
                self._end(sequence, "error")
            else:
                self._guarded([sequence], self._begin)

    def _next(self) -> Sequence | None:
        """The next request to admit. Who begins as a prompt in progress does waits for its pages."""
        begun = {first for sequence in self._prefilling if (first := self._first_key(sequence)) is not None}
        return next((sequence for sequence in self._waiting if self._first_key(sequence) not in begun), None)

    def _first_key(self, sequence: Sequence) -> bytes | None:
        keys = [] if sequence.keys is None else sequence.keys.of(sequence.request.token_ids)
        return keys[0] if keys else None

    def _pages_needed(self, sequence: Sequence) -> int:
        """Pages that a sequence needs of its own."""
        return pages_for(sequence.request.budget, self.options.page_size) - self._shared(sequence)

    def _shared(self, sequence: Sequence) -> int:
        """Full pages of its prefix, which a sequence uses as they are."""
        prefix = sequence.request.prefix
        return len(sequence.held) if prefix is None else len(prefix.token_ids) // self.options.page_size

    def _make_room(self, sequence: Sequence) -> bool:
        """See that the pages for a sequence are free: let the cache grow or, at its limit, interrupt who comes later in
        the order. Returns whether they are."""
        pool, needed = self.cache.pool, self._pages_needed(sequence)
        if needed > pool.free:
            waiting = self._waiting[: self.options.max_batch]
            self._grow(sum(self._pages_needed(other) for other in waiting) - pool.free)
            self._prefixes.evict(needed - pool.free)
        later = [other for other in (*self._prefilling, *self._decoding) if other.order > sequence.order]
        if pool.free + sum(len(other.own) for other in later) < needed:
            return False
        for other in sorted(later, key=lambda other: other.order, reverse=True):
            if pool.free < needed:
                self._withdraw(other)
                self._waiting.append(other)
        self._waiting.sort(key=lambda sequence: sequence.order)
        return pool.free >= needed  # what others share of the interrupted ones stays in use

    def _grow(self, pages: int) -> None:
        """Add pages up to the limit, and at least an eighth of what is there, so that growing is rare. Without memory
        what is there becomes the limit."""
        pool = self.cache.pool
        wanted = min(self._limit, pool.pages + max(pages, pool.pages // 8))
        if wanted == pool.pages:
            return
        try:
            self._resize(wanted)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            self._limit = pool.pages
            _log.warning("no memory for more than %d KV pages (%s); requests wait for free ones", pool.pages, error)

    def _resize(self, pages: int) -> None:
        self._decode_steps.clear()  # they hold the addresses of what is replaced
        self.cache.resize(pages)

    def _begin(self, sequences: list[Sequence]) -> None:
        """Give an admitted sequence its pages: those of its prefix, the partly filled last one copied, and its own."""
        for sequence in sequences:
            request, shared = sequence.request, self._shared(sequence)
            sequence.own = self.cache.pool.allocate(self._pages_needed(sequence))
            sequence.computed = shared * self.options.page_size
            if shared < len(sequence.held):
                self.cache.copy_page(sequence.held[shared], sequence.own[0])
            if request.prefix is not None:
                sequence.computed = len(request.prefix.token_ids)
            if not sequence.tokens:
                sequence.cached = sequence.computed
            sequence.pages = sequence.held[:shared] + sequence.own
            if sequence.sampler is None and request.sampling is not None:
                if self.options.draft_tokens:
                    audio = self._model.config.audio_token_id
                    sequence.drafter = Drafter([token for token in request.token_ids if token != audio])
                vocabulary = self._model.config.decoder.vocab_size
                sequence.sampler = Sampler(request.sampling, request.token_ids, vocabulary, self._model.device)
            sequence.embeddings = PromptEmbeddings(
                self._model,
                request.token_ids + sequence.tokens[:-1],
                request.audio,
                encode_batch=self.options.encode_batch,
                timings=request.timings,
                start=sequence.computed,
                encode=self._encoder_cache.encode if self.options.encoder_cache_bytes else None,
            )
            self._waiting.remove(sequence)
            self._prefilling.append(sequence)

    def _prefill_some(self) -> None:
        """Prefill what this step has left after one token for each answer, prompt after prompt in turn."""
        budget = max(1, self.options.chunk_size - len(self._decoding))
        for sequence in list(self._prefilling):
            if budget > 0:
                before = sequence.computed
                count = min(budget, sequence.to_prefill - before)
                self._guarded([sequence], partial(self._prefill, count))
                budget -= count

    def _prefill(self, count: int, sequences: list[Sequence]) -> None:
        (sequence,) = sequences
        request, stop = sequence.request, sequence.computed + count
        assert sequence.embeddings is not None
        hidden = prefill_chunk(
            self._model, self.cache, sequence.pages, sequence.embeddings, sequence.computed, stop, request.timings
        )
        sequence.computed = stop
        self._prefilling.remove(sequence)
        if stop < sequence.to_prefill:
            self._prefilling.append(sequence)
        elif sequence.sampler is None:
            sequence.prefix = Prefix(request.token_ids, sequence.pages, self._release)
            self.cache.pool.share(sequence.pages)
            self._end(sequence, "stop")
        else:
            sequence.embeddings = None
            self._decoding.append(sequence)
            if sequence.keys is not None:
                self._keep(sequence.keys, sequence)
            if not sequence.tokens:
                logits = self._model.decoder.logits(hidden[:, -1])
                self._accept(sequence, choose(logits, [sequence.sampler], [0])[0])
        request.progress(min(stop, len(request.token_ids)), len(request.token_ids))

    def _decode(self, sequences: list[Sequence]) -> None:
        drafts = self._drafts(sequences)
        time = 1 + max(map(len, drafts))
        pages = [sequence.pages for sequence in sequences]
        width = 1 << (max(map(len, pages)) - 1).bit_length()
        # What fills up shorter drafts is computed and thrown away; the next tokens take its place in the pages.
        tokens = [
            [s.tokens[-1], *draft, *[0] * (time - 1 - len(draft))] for s, draft in zip(sequences, drafts, strict=True)
        ]
        logits = self._decode_step(len(sequences), time, width)(tokens, [s.computed for s in sequences], pages)
        rows = [(row, at) for row, draft in enumerate(drafts) for at in range(1 + len(draft))]
        samplers = [sampler for row, _ in rows if (sampler := sequences[row].sampler) is not None]
        chosen = iter(
            choose(
                logits[[row for row, _ in rows], [at for _, at in rows]],
                samplers,
                [len(sequences[row].tokens) + at for row, at in rows],
                [drafts[row][:at] for row, at in rows],
            )
        )
        for sequence, draft in zip(sequences, drafts, strict=True):
            self._take(sequence, draft, [next(chosen) for _ in range(1 + len(draft))])

    def _drafts(self, sequences: list[Sequence]) -> list[list[int]]:
        """Guesses for each sequence, none where many are decoded at once: a step then has rows enough."""
        most = self.options.draft_tokens
        for sequence in sequences:  # fillers need a place in the pages, too
            most = min(most, len(sequence.pages) * self.options.page_size - sequence.computed - 1)
        if most < 1 or len(sequences) > _MOST_DRAFTING:
            return [[] for _ in sequences]
        drafts = []
        for sequence in sequences:
            assert sequence.request.sampling is not None
            room = sequence.request.sampling.max_new_tokens - len(sequence.tokens) - 1
            drafts.append([] if sequence.drafter is None else sequence.drafter.draft(min(most, room)))
        return drafts

    def _take(self, sequence: Sequence, draft: list[int], chosen: list[int]) -> None:
        """Accept the tokens chosen after a draft, as far as it was right, and the one that it had wrong."""
        right = 0
        for at, token in enumerate(chosen):
            sequence.computed += 1
            self._accept(sequence, token)
            if sequence.finish_reason is not None or at == len(draft) or draft[at] != token:
                break
            right += 1
        if sequence.drafter is not None:
            sequence.drafter.record(len(draft), right)

    def _decode_step(self, rows: int, time: int, width: int) -> DecodeStep:
        key = (rows, time, width, forced_backend())
        step = self._decode_steps.pop(key, None)
        if step is None:
            most = _MOST_STEPS_ON_CPU if self._model.device.type == "cpu" else _MOST_STEPS
            if len(self._decode_steps) == most:
                del self._decode_steps[next(iter(self._decode_steps))]
            step = DecodeStep(
                self._model, self.cache, rows=rows, width=width, time=time, cuda_graph=self.options.cuda_graphs
            )
        self._decode_steps[key] = step
        return step

    def _accept(self, sequence: Sequence, token: int) -> None:
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

    def _release(self, pages: list[int]) -> None:
        """Take back the pages of a prefix, at once or with the step that another thread is in."""
        self._released.append(pages)
        if self._lock.acquire(blocking=False):
            try:
                self._settle_between_steps()
            finally:
                self._lock.release()
