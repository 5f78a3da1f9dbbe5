"""Several servers with one folder of files and contexts."""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

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
