"""The reference count of every KV page is right, whatever is submitted, cancelled or dropped, in any order."""

import dataclasses
import weakref
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.simple_path import request

from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.kernels.errors import AfnextError
from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.prefix import Prefix
from afnext.runtime.engine.request import SequenceState
from afnext.runtime.model.audio_flamingo import AudioFlamingo

with TemporaryDirectory() as scratch:
    NETWORK = AudioFlamingo.from_folder(
        write_random_checkpoint(Path(scratch)), device=torch.device("cpu"), dtype=lambda stored: torch.float32
    )


class EngineMachine(RuleBasedStateMachine):
    """Requests of all kinds and ends, against a count of who should hold what."""

    @initialize(
        room=st.sampled_from([None, 45, 90]),  # in whole pages still 40: a request takes up to 37
        page_size=st.integers(1, 9),
        max_batch=st.integers(1, 4),
        cached=st.sampled_from([0, 20_000, 1 << 30]),
    )
    def begin(self, room: int | None, page_size: int, max_batch: int, cached: int) -> None:
        options = EngineOptions(
            page_size=page_size, chunk_size=13, max_batch=max_batch, max_kv_tokens=room, prefix_cache_bytes=cached
        )
        self.engine = Engine(NETWORK, options)
        self.sequences: list[SequenceState] = []
        self.parts: list[SequenceState] = []  # of prompts, whose prefixes stay in the sequences
        self.prefixes: list[Prefix] = []
        self.alive: weakref.WeakSet[Prefix] = weakref.WeakSet()  # dropped ones too, which requests may still name

    @rule(
        new_tokens=st.integers(1, 9),
        audio=st.booleans(),
        content=st.integers(0, 3),
        priority=st.integers(-1, 1),
        deadline=st.sampled_from([None, None, None, 0.0, 0.01]),
        fails=st.sampled_from([False, False, False, True]),
    )
    def submit(
        self, new_tokens: int, audio: bool, content: int, priority: int, deadline: float | None, fails: bool
    ) -> None:
        def progress(done: int, total: int) -> None:
            if fails:
                raise RuntimeError("a callback that fails")

        asked = request(NETWORK, new_tokens, 0.4 if audio else 0.0, content)
        how = {"priority": priority, "deadline": deadline, "progress": progress}
        self.sequences.append(self.engine.submit(dataclasses.replace(asked, **how)))

    @rule(content=st.integers(0, 3))
    def listen(self, content: int) -> None:
        self.sequences.append(
            self.engine.submit(dataclasses.replace(request(NETWORK, 1, 0.4, content), sampling=None, priority=1))
        )

    @rule(content=st.integers(0, 3), pages=st.lists(st.integers(1, 2), min_size=1, max_size=3), ends=st.booleans())
    def begin_early(self, content: int, pages: list[int], ends: bool) -> None:
        """A prompt in parts, one after the other or all submitted at once, with or without its end."""
        asked, part, stop = request(NETWORK, 5, 0.4, content), None, 0
        for count in pages:
            stop += count * self.engine.options.page_size
            ids = asked.token_ids[:stop]
            if len(ids) < stop:
                break
            how = {"token_ids": ids, "sampling": None, "expected": len(asked.token_ids) + 5, "beginning": part}
            part = self.engine.submit(dataclasses.replace(asked, **how))
            self.parts.append(part)
        if ends:
            self.sequences.append(self.engine.submit(dataclasses.replace(asked, beginning=part)))

    @precondition(lambda self: self.prefixes)
    @rule(data=st.data(), new_tokens=st.integers(1, 9))
    def ask_about_a_prefix(self, data: st.DataObject, new_tokens: int) -> None:
        prefix = data.draw(st.sampled_from(self.prefixes))
        asked = request(NETWORK, new_tokens)
        asked = dataclasses.replace(asked, token_ids=[*prefix.token_ids, *asked.token_ids], prefix=prefix)
        if prefix.closed:
            with pytest.raises(AfnextError, match="closed"):
                self.engine.submit(asked)
        else:
            self.sequences.append(self.engine.submit(asked))

    @precondition(lambda self: self.prefixes)
    @rule(data=st.data(), drop=st.booleans())
    def close(self, data: st.DataObject, drop: bool) -> None:
        index = data.draw(st.integers(0, len(self.prefixes) - 1))
        if drop:
            del self.prefixes[index]
        else:
            self.prefixes[index].close()

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
        for sequence in self.sequences:
            if sequence.prefix is not None:
                self.prefixes.append(sequence.prefix)
                self.alive.add(sequence.prefix)
                sequence.prefix = None

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.engine.cancel(data.draw(st.sampled_from(self.sequences + self.parts)))

    @invariant()
    def every_page_has_its_users(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine._steps.settle()
        users: Counter[int] = Counter(self.engine._steps.pages.prefix_cache.pages)
        for sequence in self.sequences + self.parts:
            users.update(sequence.private_pages)
            users.update(sequence.shared_pages)
            assert sequence.finish_reason is None or not (sequence.private_pages or sequence.shared_pages)
            if sequence.prefix is not None and not sequence.prefix.closed:
                users.update(sequence.prefix.pages)
        for prefix in self.alive:
            users.update([] if prefix.closed else prefix.pages)
        assert users == self.engine.cache.pool._ref_counts

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for prefix in self.alive:
            prefix.close()
        for _ in range(2000):
            if not self.engine.step():
                break
        ended = self.sequences + self.parts
        assert all(sequence.finish_reason is not None for sequence in ended), "a request never ended"
        for sequence in ended:
            if sequence.prefix is not None:
                sequence.prefix.close()
        self.engine._steps.settle()
        self.engine._steps.pages.prefix_cache.evict(self.engine.cache.pool.pages)
        assert self.engine.cache.pool.free == self.engine.cache.pool.pages
        assert not self.engine.cache.pool._ref_counts


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=25, stateful_step_count=25)
