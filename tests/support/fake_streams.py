"""The order of work in the streams of simulated GPUs (`fake_cuda.py`): finds memory that two streams use in no order.

Each stream counts what is queued in it. A stream knows of another's work up to a count: through events that it waited
for, or because the host waited before it queued the rest. Every use of memory is then one of these faults, or none:

- a stream uses what another stream has written, or may have, without knowing of it;
- memory is freed on the stream that allocated it, which may allocate it again, while another stream still uses it.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from torch.multiprocessing.reductions import StorageWeakRef

Stream = tuple[int, int]  # GPU, handle
Known = dict[Stream, int]


@dataclass
class _Memory:
    """home: the stream that allocated it; written: its count at the latest use there; read: the counts of others'
    latest uses; kept: streams given to `record_stream`."""

    home: Stream
    written: int
    read: Known = field(default_factory=dict)
    kept: set[Stream] = field(default_factory=set)


class StreamOrder:
    """What the streams know of each other. fault: called with a description of each fault."""

    def __init__(self, fault: Callable[[str], None]):
        self._fault = fault
        self._counts: Known = {}
        self._known: dict[Stream, Known] = {}
        self._host: Known = {}
        self._memory: dict[Hashable, _Memory] = {}
        self._shared: dict[StorageWeakRef, _Memory] = {}

    def until_now(self, stream: Stream) -> Known:
        """What is known after all work of a stream: an event."""
        return {**self._knowledge(stream), stream: self._counts.get(stream, 0)}

    def wait(self, stream: Stream, event: Known) -> None:
        """Later work of a stream waits for an event."""
        _merge(self._knowledge(stream), event)

    def host_waits(self, event: Known) -> None:
        """All that is queued later comes after an event."""
        _merge(self._host, event)

    def use(self, user: str, stream: Stream, storages: Iterable[StorageWeakRef]) -> None:
        """Work of a stream uses memory; whether it writes is unknown on the stream that allocated it."""
        count = self._counts[stream] = self._counts.get(stream, 0) + 1
        self._check_freed()
        for storage in storages:
            memory = self._memory.setdefault(storage, _Memory(stream, count))
            self._check_written(user, stream, memory)
            if stream == memory.home:
                memory.written = count
            else:
                memory.read[stream] = count
                self._shared[storage] = memory

    def allocate(self, stream: Stream, storage: StorageWeakRef) -> None:
        """Memory is written on the stream that allocates it. Parts of other memory are no new memory."""
        if storage not in self._memory:
            self.use("an allocation", stream, (storage,))

    def take(self, user: str, stream: Stream, pool: object) -> None:
        """Work of a stream uses all memory of a pool, of which nothing is kept."""
        count = self._counts[stream] = self._counts.get(stream, 0) + 1
        memory = self._memory.setdefault(("pool", pool), _Memory(stream, count))
        self._check_written(user, stream, memory)
        memory.home, memory.written = stream, count

    def keep(self, storage: StorageWeakRef, stream: Stream) -> None:
        """Freed memory is not allocated again before the work that a stream has queued until then is done."""
        if storage in self._memory:
            self._memory[storage].kept.add(stream)

    def _knowledge(self, stream: Stream) -> Known:
        known = self._known.setdefault(stream, {})
        _merge(known, self._host)
        return known

    def _check_written(self, user: str, stream: Stream, memory: _Memory) -> None:
        if stream != memory.home and self._knowledge(stream).get(memory.home, 0) < memory.written:
            self._fault(f"{user} on stream {stream} does not wait for stream {memory.home}, whose memory it uses")

    def _check_freed(self) -> None:
        for storage in [storage for storage in self._shared if storage.expired()]:
            memory = self._shared.pop(storage)
            known = self._knowledge(memory.home)
            for reader, count in memory.read.items():
                if reader not in memory.kept and known.get(reader, 0) < count:
                    self._fault(f"memory of stream {memory.home} is freed while stream {reader} uses it")


def _merge(known: Known, more: Known) -> None:
    for stream, count in more.items():
        known[stream] = max(count, known.get(stream, 0))
