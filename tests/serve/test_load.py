"""The loader of `afnext bench http`, overload, and a long run that must leave nothing behind."""

import asyncio
import ctypes
import gc
import itertools
import json
import os
import random
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import afnext
from afnext import AfnextError
from afnext.bench.core.record import Record, read
from afnext.bench.model import serving_http
from afnext.bench.model.http_clients import Load
from afnext.bench.model.serving_http import beside_direct, run_http
from afnext.runtime.engine.prefix_cache import EncoderCache

from .conftest import SCENE, Running, running
from .test_disconnects import descriptors, forget_everything, leave, settled


def test_the_loader_records_what_it_sees(service: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.server, "settings", replace(service.server.settings, max_requests=2))
    monkeypatch.setattr(serving_http, "_UPLOAD_BYTES", 1 << 20)
    monkeypatch.setattr(serving_http, "_TRIAL", 1)
    out, files = tmp_path / "results.jsonl", service.openai().files.list().data
    records = run_http(out, url=service.url, model="afnext-tiny", clients=[1, 2], seconds=0.0)
    assert [record.name for record in records] == ["load", "load", "uploads", "overload"]
    for record in records[:2]:
        assert record.values["requests"] == record.case["clients"]
        assert record.values["tokens_per_s"] > 0
        assert 0 < record.values["first_token_p50_s"] <= record.values["first_token_p99_s"]
    uploads, overload = records[2].values, records[3].values
    assert uploads["uploaded_bytes_per_s"] > 0
    assert uploads["loop_lag_p50_at_most_s"] <= uploads["loop_lag_p99_at_most_s"]
    assert 0 < uploads["health_p50_s"] <= uploads["health_p99_s"]
    assert records[3].case["clients"] == 6
    assert overload["refused"] > 0 < overload["answered"]
    assert [record.key for record in read(out)] == [record.key for record in records]
    assert service.openai().files.list().data == files


def test_a_run_leaves_out_what_would_not_end_in_time(service: Running, tmp_path: Path) -> None:
    said: list[str] = []
    out, options = tmp_path / "results.jsonl", {"model": "afnext-tiny", "clients": [1, 2], "seconds": 3600.0}
    assert run_http(out, url=service.url, minutes=0.1, say=said.append, **options) == []  # type: ignore[arg-type]
    parts = ["load, clients 1", "load, clients 2", "uploads", "overload"]
    assert [line.partition(":")[0] for line in said if "left out" in line] == parts
    assert not out.exists()


def test_a_run_that_is_slower_than_expected_stops_in_time(
    service: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(*_: object) -> None:
        await asyncio.Event().wait()

    said: list[str] = []
    monkeypatch.setattr(serving_http.Http, "ask", slow)
    options = {"url": service.url, "model": "", "clients": [1], "seconds": 0.0, "minutes": 0.01}
    assert run_http(tmp_path / "r", say=said.append, **options) == []  # type: ignore[arg-type]
    assert "load, clients 1: stopped, the time is over; see --minutes" in said


def test_questions_that_the_server_refuses_are_not_compared() -> None:
    alone = Load(answers={1: "a", 2: "b", 3: "c", 4: "d"}, seconds=8.0)
    served = Load(answers={1: "a", 2: "x"}, refused=2, seconds=6.0)
    assert beside_direct(served, alone) == {"over_direct": 1.5, "same_answers": 0.5}
    assert beside_direct(Load(refused=4, seconds=1.0), alone) == {}


@pytest.mark.slow
def test_the_loader_compares_with_the_model_alone(tmp_path: Path) -> None:
    records = run_http(tmp_path / "r", url=None, model="afnext-tiny", clients=[1, 4], seconds=1.0)
    compared(records, "afnext-tiny")


@pytest.mark.slow
def test_the_loader_serves_random_weights(tmp_path: Path) -> None:
    records = run_http(tmp_path / "r", url=None, model="", clients=[1, 4], seconds=1.0, random="tiny", scheme="fp32")
    compared(records, "tiny fp32")


def test_random_weights_are_not_served_by_another_s_server(tmp_path: Path) -> None:
    with pytest.raises(AfnextError, match="leave out --random or --url"):
        run_http(tmp_path / "r", url="http://127.0.0.1:9", model="", clients=[1], seconds=0.0, random="tiny")


def compared(records: list[Record], label: str) -> None:
    loads = [record for record in records if record.name == "load"]
    assert [record.subject for record in loads] == [f"direct {label}", f"HTTP {label}"] * 2
    for direct, served in zip(loads[::2], loads[1::2], strict=True):
        assert served.values["requests"] == direct.values["requests"]
        assert served.values["same_answers"] == 1.0
        assert served.values["over_direct"] > 0


def test_the_loader_names_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AfnextError, match="afnext serve"):
        run_http(tmp_path / "r", url="http://127.0.0.1:9", model="x", clients=[1], seconds=0.0)


def test_overload_is_refused_before_anything_is_decoded(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def decode(*_: object, **__: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(service.server.pool, "decode", decode)
    monkeypatch.setattr(service.server, "_admitted", 10_000)
    with service.http() as client:
        chat = client.post("/v1/chat/completions", json={"messages": []})
        form = client.post("/v1/audio/transcriptions", files={"file": SCENE.read_bytes()})
        assert client.get("/health").status_code == 200
        metrics = client.get("/metrics").text
    for response in (chat, form):
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "server_overloaded"
        assert 1 <= int(response.headers["retry-after"]) <= 120
    assert 'afnext_rejected_total{reason="server_overloaded"}' in metrics


def resident() -> int:
    """Bytes of memory of this process, without what the C library keeps for later."""
    with suppress(AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def emptied(service: Running) -> dict[str, int]:
    """What a server holds at rest: no requests, files, contexts or cached results."""
    now = settled(service)
    assert not any(now.values()), now
    forget_everything(service)
    engine, steps = service.model.engine, service.model.engine._steps
    cached = steps.pages.prefix_cache

    def empty() -> None:
        cached.evict(len(cached.pages))
        steps._encoder_cache = EncoderCache(engine.options.encoder_cache_bytes)

    engine._between_steps(empty)
    engine.release_memory()
    gc.collect()
    return {"bytes": resident(), "descriptors": descriptors(), "kv_pages": steps.pages.cache.allocated_pages}


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_long_run_leaves_nothing_behind() -> None:
    """AFNEXT_SOAK_SECONDS of mixed requests and clients that leave, half an hour by default."""
    seconds = float(os.environ.get("AFNEXT_SOAK_SECONDS", "1800"))
    seed = random.randrange(1 << 32)
    print("seed", seed)
    done = itertools.count()
    with running(lambda: afnext.load("afnext-tiny")) as service:

        def load(until: float, chance: random.Random) -> None:
            while time.monotonic() < until:
                leave(service, chance)
                next(done)

        measured = []
        for part in range(5):
            until = time.monotonic() + seconds / 5
            clients = [
                threading.Thread(target=load, args=(until, random.Random(f"{seed} {part} {i}"))) for i in range(4)
            ]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            measured.append(emptied(service))
            print(json.dumps({"part": part, **measured[-1]}), flush=True)
    print("requests and sessions", next(done))
    memory = [rest["bytes"] for rest in measured]
    assert max(memory[-2:]) <= 1.05 * max(memory[:3])
    assert measured[-1]["descriptors"] <= measured[1]["descriptors"] + 8
    assert not any(rest["kv_pages"] for rest in measured)
