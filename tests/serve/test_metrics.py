"""What /metrics and /v1/status say of the work."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from .conftest import Running, eventually


def figures(service: Running) -> dict[str, float]:
    with service.http() as client:
        text = client.get("/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(afnext_\S+) (\S+)$", text, re.MULTILINE)}


def ask(service: Running) -> int:
    body = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 5}
    with service.http() as client:
        return client.post("/v1/chat/completions", json=body).status_code


def test_a_request_s_stages_and_the_engine_s_steps_are_counted(service: Running) -> None:
    before = figures(service)
    assert ask(service) == 200
    after = figures(service)
    for stage in ("upload", "queue", "encode", "prefill", "time_to_first_token", "inter_token", "request"):
        assert after[f"afnext_{stage}_seconds_count"] > before[f"afnext_{stage}_seconds_count"], stage
    assert after["afnext_step_seconds_count"] > before["afnext_step_seconds_count"]
    assert after["afnext_step_seconds_sum"] > before["afnext_step_seconds_sum"]
    assert after['afnext_step_seconds_bucket{le="+Inf"}'] == after["afnext_step_seconds_count"]
    buckets = [value for name, value in after.items() if name.startswith("afnext_step_seconds_bucket")]
    assert buckets == sorted(buckets)
    stats = service.model.engine.stats()
    held = stats.free_pages + stats.private_pages + stats.prefix_pages + stats.cached_pages
    tokens = [value for name, value in after.items() if name.startswith("afnext_kv_tokens")]
    assert sum(tokens) == held * service.model.options.page_size
    assert after["afnext_requests_running"] == 0


def test_status_lists_the_requests_in_progress(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, go = service.model.engine._steps, threading.Event()
    admit = steps._admit

    def wait() -> None:
        go.wait(200)
        admit()

    monkeypatch.setattr(steps, "_admit", wait)

    def listed() -> list[dict[str, object]]:
        with service.http() as client:
            found: list[dict[str, object]] = client.get("/v1/status").json()["engine"]["in_progress"]
        return found

    with ThreadPoolExecutor() as pool:
        try:
            answer = pool.submit(ask, service)
            assert eventually(lambda: len(listed()) == 1)
            (request,) = listed()
            assert (request["phase"], request["computed_tokens"], request["new_tokens"]) == ("waiting", 0, 0)
            assert set(request) == {"phase", "prompt_tokens", "computed_tokens", "new_tokens", "seconds"}
        finally:
            go.set()
        assert answer.result() == 200
    assert eventually(lambda: not listed())
