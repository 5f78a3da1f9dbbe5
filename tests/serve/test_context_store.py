"""The disk space of contexts: recordings stay, saved keys and values give way, and nothing is left of what failed."""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="serving needs the extra `serve`")
from afnext.runtime.io.audio import Audio
from afnext.serve.context_store import ContextStore, Entry
from afnext.serve.errors import ApiError
from afnext.serve.store import FileStore

from .conftest import SCENE, Running

RECORDING, SAVED, TOKENS = 1000, 4000, 100  # bytes, bytes, and tokens of a context


class Heard:
    """A context whose saved keys and values have `SAVED` bytes."""

    def __init__(self, name: str):
        self.fingerprint, self.seconds, self.tokens, self.closed = name, 1.0, TOKENS, False
        self.recordings = (SimpleNamespace(source=name, warnings=(), truncated=False, seconds=1.0),)

    def save(self, path: Path) -> None:
        path.write_bytes(bytes(SAVED))

    def close(self) -> None:
        self.closed = True


class Ears:
    """Hears at once. Two contexts fit into half of the room."""

    room, token_bytes = 4 * TOKENS, SAVED // TOKENS

    def __init__(self) -> None:
        self.reheard: list[str] = []

    async def hear(self, audio: list[Audio], system: str | None, progress: Callable[[int, int], None], *, key: str):  # type: ignore[no-untyped-def]
        self.reheard.append(audio[0].source)
        return Heard(audio[0].source)

    async def resume(self, path: Path) -> Any:
        assert path.stat().st_size == SAVED
        return Heard("resumed")


def recording(name: str) -> Audio:
    return Audio(np.zeros(16, np.float32), 16_000, 1, name, False, ())


class Store:
    """A store of contexts with a limit, and what a test does with it."""

    def __init__(self, folder: Path, max_bytes: int):
        self.ears, self.folder, self.uploads = Ears(), folder / "contexts", folder

        async def decode(path: Path, name: str) -> Audio:
            return recording(name)

        self.store = ContextStore(self.folder, lambda: self.ears, decode, max_bytes)  # type: ignore[arg-type]

    def upload(self, name: str) -> tuple[Path, Audio]:
        path = self.uploads / name
        path.write_bytes(bytes(RECORDING))
        return path, recording(name)

    async def create(self, name: str) -> Entry:
        return await self.store.create("", [self.upload(name)], None, 3600, lambda done, total: None)

    async def ask(self, entry: Entry) -> bool:
        """Use a context; returns whether it had to be read or heard again."""
        async with self.store.used(entry.about.id, "") as (_, reloaded):
            return reloaded

    @property
    def on_disk(self) -> int:
        """Bytes of recordings and of keys and values."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.suffix != ".json")


def saved(*entries: Entry) -> list[bool]:
    return [entry.saved > 0 for entry in entries]


def test_saved_keys_and_values_give_way_the_oldest_first(tmp_path: Path) -> None:
    """Room for four recordings and two times keys and values; two contexts are in memory, others are saved."""

    async def run() -> None:
        store = Store(tmp_path, 4 * RECORDING + 2 * SAVED)
        first, second, third = [await store.create(name) for name in "abc"]
        assert saved(first, second, third) == [True, False, False]
        assert store.store.bytes == store.on_disk == 3 * RECORDING + SAVED
        fourth = await store.create("d")
        assert saved(first, second, third, fourth) == [True, True, False, False]
        assert await store.ask(first)  # brought back: another is saved, and the second is the oldest then
        assert saved(first, second, third, fourth) == [True, True, False, False]
        fifth = await store.create("e")  # its recording has room only without keys and values of the oldest
        assert saved(second)[0] is False
        assert store.store.bytes == store.on_disk <= 4 * RECORDING + 2 * SAVED
        assert [await store.ask(entry) for entry in (second, fifth)] == [True, False]
        assert store.ears.reheard == [*"abcde", "b"]

    asyncio.run(run())


def test_recordings_beyond_the_limit_are_refused_and_nothing_is_left_of_them(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(tmp_path, 2 * RECORDING + RECORDING // 2)
        entries = [await store.create(name) for name in "ab"]
        around: AbstractAsyncContextManager[None] = nullcontext()  # type: ignore[assignment]
        for refused in (store.create("c"), store.store.listen("", [store.upload("d")], None, 60, around)):
            with pytest.raises(ApiError, match="store of contexts is full") as error:
                await refused
            assert (error.value.status, error.value.code) == (413, "payload_too_large")
        assert store.ears.reheard == ["a", "b"]  # refused before anything is heard
        assert store.store.bytes == store.on_disk == 2 * RECORDING
        store.store.delete(entries[0].about.id, "")
        assert (await store.create("c")).stored == RECORDING

    asyncio.run(run())


def test_what_is_on_disk_counts_after_a_restart(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(tmp_path, 1 << 20)
        for name in "abc":
            await store.create(name)
        await store.store.close()
        assert store.on_disk == 3 * (RECORDING + SAVED)
        again = Store(tmp_path, 3 * (RECORDING + SAVED))
        assert again.store.bytes == again.on_disk
        await again.create("d")
        assert again.store.bytes == again.on_disk <= 3 * (RECORDING + SAVED)

    asyncio.run(run())


def test_a_recording_that_the_disk_does_not_take_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"some")
        raise OSError(28, "No space left on device")

    async def run() -> None:
        store = Store(tmp_path, 1 << 20)
        monkeypatch.setattr("shutil.copyfile", full)
        around: AbstractAsyncContextManager[None] = nullcontext()  # type: ignore[assignment]
        for failing in (store.create("a"), store.store.listen("", [store.upload("b")], None, 60, around)):
            with pytest.raises(OSError, match="No space"):
                await failing
        assert (store.store.bytes, list(store.folder.iterdir())) == (0, [])

    asyncio.run(run())


def test_what_a_killed_server_left_half_written_is_removed(tmp_path: Path) -> None:
    """Unless it is young: another server with the same folder may be writing it."""
    for folder, names in (
        ("contexts", ("ctx_1.0.bin", "ctx_1.safetensors", ".ctx_1.safetensors.ab.part")),
        ("files", ("file-1.bin", ".file-1.json.ab.part")),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in (*names, "notes.txt"):
            for age, path in ((7200, tmp_path / folder / name), (0, tmp_path / folder / name.replace("1", "2"))):
                path.touch()
                os.utime(path, (time.time() - age,) * 2)
        Store(tmp_path, 1 << 20)
        FileStore(tmp_path / "files")
        left = {path.name for path in (tmp_path / folder).iterdir()}
        assert left == {name.replace("1", "2") for name in (*names, "notes.txt")}


def test_a_full_store_is_an_error_of_the_request(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.server.contexts, "_max_bytes", service.server.contexts.bytes)
    monkeypatch.setattr(service.server.files, "_max_bytes", 10)
    with service.http() as client:
        for background in ("true", "false"):
            response = client.post(
                "/v1/contexts", content=SCENE.read_bytes(), params={"background": background, "system": "Full."}
            )
            assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")
        response = client.post("/v1/files", files={"file": SCENE.read_bytes()})
        assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")


def test_a_full_disk_is_an_error_of_the_server(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device: /secret")

    monkeypatch.setattr("shutil.move", full)
    with service.http() as client:
        response = client.post("/v1/files", files={"file": SCENE.read_bytes()})
    assert (response.status_code, response.json()["error"]["code"]) == (507, "insufficient_storage")
    assert "secret" not in response.text
