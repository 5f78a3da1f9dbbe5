"""Several servers with one folder of files and contexts."""

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette", reason="serving needs the extra `serve`")
from afnext.serve import app
from afnext.serve.context_store import ContextStore, new_id
from afnext.serve.errors import ApiError
from afnext.serve.store import FileStore


@dataclass
class Recording:
    source: str = "a.wav"
    warnings: tuple[str, ...] = ()
    truncated: bool = False
    seconds: float = 1.0


@dataclass
class Heard:
    """Stands for a context of the model."""

    recordings: tuple[Recording, ...] = (Recording(),)
    fingerprint: str = "f"
    seconds: float = 1.0
    tokens: int = 10

    def save(self, path: Path) -> None:
        path.write_bytes(b"keys and values")

    def close(self) -> None:
        """Nothing to give back."""


@dataclass
class Ears:
    """Hears nothing, and counts how often."""

    room: int = 1000
    token_bytes: int = 4
    heard: int = 0
    resumed: list[Path] = field(default_factory=list)

    async def hear(self, audio: Any, system: Any, progress: Callable[[int, int], None], *, key: str) -> Any:
        self.heard += 1
        return Heard()

    async def resume(self, path: Path) -> Any:
        self.resumed.append(path)
        return Heard()


async def decode(path: Path, name: str) -> Any:
    return path.read_bytes()


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    path = tmp_path / "upload"
    path.write_bytes(b"recording")
    return path


def stores(folder: Path) -> tuple[tuple[ContextStore, Ears], tuple[ContextStore, Ears]]:
    ears = Ears(), Ears()
    first, second = (ContextStore(folder, lambda each=each: each, decode) for each in ears)
    return (first, ears[0]), (second, ears[1])


async def added(store: ContextStore, upload: Path, ttl: int = 100) -> str:
    identifier = new_id("0123abcd")
    await store.add(identifier, "me", Heard(), [upload], None, ttl)  # type: ignore[arg-type]
    return identifier


def test_a_file_of_one_server_is_there_for_the_others(tmp_path: Path, upload: Path) -> None:
    one, two = FileStore(tmp_path / "files"), FileStore(tmp_path / "files")
    stored = asyncio.run(one.add(upload, "a.wav", purpose="user_data", key="me", route="0123abcd"))
    assert stored.id.endswith("0123abcd")
    path, name = two.path(stored.id, "me")
    assert (path.read_bytes(), name) == (b"recording", "a.wav")
    assert [file.id for file in two.of("me")] == [stored.id]
    with pytest.raises(ApiError, match="no such file"):
        two.get(stored.id, "you")
    two.delete(stored.id, "me")
    with pytest.raises(ApiError, match="no such file"):
        one.get(stored.id, "me")
    assert not list(one.of("me"))


def test_a_context_of_one_server_is_heard_again_or_resumed_by_the_others(tmp_path: Path, upload: Path) -> None:
    async def run() -> None:
        (one, _), (two, ears) = stores(tmp_path / "contexts")
        identifier = await added(one, upload)
        async with two.used(identifier, "me") as (_, reloaded):
            assert reloaded
        assert (ears.heard, ears.resumed) == (1, [])
        async with two.used(identifier, "me") as (_, reloaded):
            assert not reloaded
        saved = await added(one, upload)
        await one.close()  # which saves
        async with two.used(saved, "me") as (_, reloaded):
            assert reloaded
        assert [path.name for path in ears.resumed] == [f"{saved}.safetensors"]

    asyncio.run(run())


def test_a_context_that_one_server_deletes_is_gone_for_all(tmp_path: Path, upload: Path) -> None:
    async def run() -> None:
        (one, _), (two, _) = stores(tmp_path / "contexts")
        identifier = await added(one, upload)
        async with one.used(identifier, "me"):
            two.delete(identifier, "me")
            for store in (one, two):
                with pytest.raises(ApiError, match="no such context"):
                    store.get(identifier, "me")
                assert not store.of("me")
        await asyncio.sleep(0)
        assert not list((tmp_path / "contexts").iterdir())

    asyncio.run(run())


def test_a_context_that_any_server_uses_does_not_expire(tmp_path: Path, upload: Path) -> None:
    async def run() -> None:
        (one, _), (two, _) = stores(tmp_path / "contexts")
        identifier = await added(one, upload, ttl=100)
        two.get(identifier, "me")
        later = time.time() + 90
        os.utime(tmp_path / "contexts" / f"{identifier}.json", (later, later))  # another server's use
        for store in (one, two):
            store._entries[identifier].last_active -= 200
            assert store.get(identifier, "me").last_active == pytest.approx(later, abs=1)
        os.utime(tmp_path / "contexts" / f"{identifier}.json", (0, 0))
        two._entries[identifier].last_active -= 400
        with pytest.raises(ApiError, match="no such context"):
            two.get(identifier, "me")

    asyncio.run(run())


def test_what_is_heard_again_under_another_request_is_taken_by_the_context(tmp_path: Path, upload: Path) -> None:
    async def run() -> None:
        (one, _), (two, ears) = stores(tmp_path / "contexts")
        identifier = await added(one, upload)
        audio: Any = b""
        entry = await two.create("me", [(upload, audio)], None, 100, lambda done, total: None)
        assert entry.about.id == identifier
        async with two.used(identifier, "me") as (_, reloaded):
            assert not reloaded
        assert ears.heard == 1

    asyncio.run(run())


class Calls:
    """Counts what this process asks of a folder's file system: listings, opened files, and files looked at."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.counts: Counter[str] = Counter()

    @contextmanager
    def counted(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
        """What happens in `folder` within the block."""
        stat = os.stat

        def noted(path: Any, *given: Any, **options: Any) -> Any:
            self.note("stat", path)
            return stat(path, *given, **options)

        self.folder, self.counts = folder, Counter()
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", noted)
            yield self.counts
        self.folder = None

    def note(self, event: str, path: Any) -> None:
        """An audit hook cannot be removed: it counts for the length of a block only."""
        if self.folder is not None and isinstance(path, str | Path) and self.folder in (Path(path), Path(path).parent):
            self.counts[event] += 1


@pytest.fixture(scope="session")
def calls() -> Calls:
    calls = Calls()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir"):
            calls.note(event, arguments[0])

    sys.addaudithook(hook)
    return calls


def test_a_question_costs_the_same_however_many_contexts_there_are(
    tmp_path: Path, upload: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def counted(number: int, folder: Path) -> list[Counter[str]]:
        (one, _), (two, _) = stores(folder)
        identifiers = [await added(one, upload) for _ in range(number)]
        with calls.counted(folder, monkeypatch) as first:  # `two` learns of it
            async with two.used(identifiers[1], "me"):
                pass
        with calls.counted(folder, monkeypatch) as second:
            async with two.used(identifiers[1], "me"):
                pass
            two.public(identifiers[0], "me")
        with calls.counted(folder, monkeypatch) as deleting:
            two.delete(identifiers[-1], "me")
        return [first, second, deleting]

    few, many = (asyncio.run(counted(number, tmp_path / str(number))) for number in (3, 40))
    assert few == many
    for counts in many:
        assert not counts["os.listdir"] + counts["os.scandir"]
    assert many[0]["open"] == 2  # its description and its recording
    assert many[0]["stat"] > 0


def test_finding_a_file_costs_the_same_however_many_there_are(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(number: int, folder: Path) -> Counter[str]:
        one, two = FileStore(folder), FileStore(folder)
        for index in range(number):
            upload = tmp_path / "upload"
            upload.write_bytes(b"recording")
            stored = asyncio.run(one.add(upload, f"{index}.wav", purpose="user_data", key="me"))
        with calls.counted(folder, monkeypatch) as counts:
            for store in (one, two, two):
                assert store.get(stored.id, "me").filename == f"{number - 1}.wav"
        return counts

    few, many = (counted(number, tmp_path / str(number)) for number in (3, 40))
    assert few == many
    assert not many["os.listdir"] + many["os.scandir"]


def test_a_context_that_another_server_saves_or_uses_is_seen(tmp_path: Path, upload: Path) -> None:
    async def run() -> None:
        (one, _), (two, ears) = stores(tmp_path / "contexts")
        identifier = await added(one, upload)
        before = two.get(identifier, "me")
        assert before.saved == 0
        await one.close()  # which saves
        assert two.get(identifier, "me").saved == len(b"keys and values")
        later = time.time() + 50
        os.utime(tmp_path / "contexts" / f"{identifier}.json", (later, later))
        assert two.get(identifier, "me").public()["last_active_at"] == pytest.approx(later, abs=1)
        async with two.used(identifier, "me"):
            pass
        assert (ears.heard, len(ears.resumed)) == (0, 1)

    asyncio.run(run())


def test_what_nobody_used_is_removed_without_a_request(tmp_path: Path, upload: Path) -> None:
    async def run() -> None:
        (one, _), (two, _) = stores(tmp_path / "contexts")
        identifier = await added(one, upload, ttl=100)
        kept = await added(one, upload, ttl=1000)
        for store in (one, two):
            store.expire()
            for name in (identifier, kept):
                os.utime(tmp_path / "contexts" / f"{name}.json", (time.time() - 200,) * 2)
                store._entries[name].last_active -= 200
        one.expire()
        two.expire()
        await asyncio.sleep(0)
        assert {path.name.partition(".")[0] for path in (tmp_path / "contexts").iterdir()} == {kept}

    asyncio.run(run())


def test_a_server_forgets_by_itself_and_outlives_a_folder_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_EXPIRE_SECONDS", 0.0)
    calls: list[str] = []
    enough = asyncio.Event()

    def contexts() -> None:
        calls.append("contexts")
        if calls == ["contexts"]:
            raise PermissionError("/contexts")

    def files() -> None:
        calls.append("files")
        enough.set()

    async def run() -> None:
        server: Any = SimpleNamespace(contexts=SimpleNamespace(expire=contexts), files=SimpleNamespace(expire=files))
        task = asyncio.create_task(app._expire(server))
        await asyncio.wait_for(enough.wait(), 60)
        task.cancel()

    asyncio.run(run())
    assert calls[:3] == ["contexts", "contexts", "files"]


@pytest.mark.parametrize("identifier", ["", "ctx_", "ctx_../x", "ctx_" + "a" * 300, "file-x", "ctx_A", None, 3])
def test_only_ids_are_looked_for(
    tmp_path: Path, identifier: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one, _), _ = stores(tmp_path / "contexts")
    files = FileStore(tmp_path / "contexts")
    with calls.counted(tmp_path / "contexts", monkeypatch) as counts:
        for store in (one, files):
            with pytest.raises(ApiError, match="no such"):
                store.get(identifier, "me")
    assert not counts
