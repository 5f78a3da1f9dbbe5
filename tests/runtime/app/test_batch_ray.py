"""Batches over several processes: which works on what, and what happens when they end. Ray is a stand-in here."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.audio import speech_like, wav_bytes

import afnext
from afnext.runtime.app.batch import Item, Question, Work, pending, plan_files, run_batch
from afnext.runtime.app.batch_ray import ray_runner
from afnext.runtime.app.batch_rows import open_rows
from afnext.runtime.errors import AfnextError, EngineDeadError, PromptError

ASK = Question("What do you hear?", options={"max_new_tokens": 3})


class Cluster:
    """Stands for the module `ray`: actors are objects of this process, whose calls `dies` may end."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.made: list[Any] = []
        self.killed: list[Any] = []
        self.calls: list[tuple[int, str]] = []  # number of the actor, and name of the item
        self.dies: Callable[[int, str], bool] = lambda number, name: False

    def remote(self, **options: Any) -> Any:
        self.options = options

        def declared(kind: type) -> Any:
            def make(*given: Any) -> Any:
                worker, number, alive = kind(*given), len(self.made), [True]

                async def row(item: Item) -> Any:
                    self.calls.append((number, Path(item.name).name))
                    alive[0] = alive[0] and not self.dies(number, Path(item.name).name)
                    done = await worker.row(item) if alive[0] else None
                    if not alive[0]:
                        raise RuntimeError("the actor died\nat length")
                    return done

                actor = SimpleNamespace(start=SimpleNamespace(remote=worker.start), row=SimpleNamespace(remote=row))
                self.made.append(actor)
                return actor

            return SimpleNamespace(remote=make)

        return declared

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """In place of Ray."""
    cluster = Cluster()
    monkeypatch.setitem(sys.modules, "ray", cluster)
    return cluster


@pytest.fixture
def items(tmp_path: Path, seed: int) -> list[Item]:
    """Eight recordings to ask about."""
    paths = [tmp_path / f"{number}.wav" for number in range(8)]
    for number, path in enumerate(paths):
        path.write_bytes(wav_bytes(speech_like(0.4, seed + number)))
    return plan_files(map(str, paths), ASK, {"name": "random"})


def ran(
    load: Callable[[], afnext.Model], items: list[Item], out: Path, works: tuple[Work, ...] = (ASK,), replicas: int = 2
) -> dict[str, dict[str, Any]]:
    """The rows by the names of their files."""
    with open_rows(out) as rows:
        run_batch(ray_runner(load, works, replicas=replicas, gpus=0.5, cpus=1, jobs=1), pending(items, rows), rows)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return {Path(row["path"]).name: row for row in lines}


def test_rows_are_those_of_one_process(
    cluster: Cluster, model: afnext.Model, items: list[Item], tmp_path: Path
) -> None:
    rows = ran(lambda: model, items, tmp_path / "out.jsonl")
    assert sorted(rows) == [f"{number}.wav" for number in range(8)]
    for row in rows.values():
        assert row["result"]["text"] == model.ask(row["path"], "What do you hear?", max_new_tokens=3).text
    assert {number for number, _ in cluster.calls} == {0, 1}
    assert cluster.options == {"num_cpus": 1, "num_gpus": 0.5, "max_concurrency": 4}
    assert cluster.killed == cluster.made


def test_a_process_that_ends_is_replaced_and_its_items_are_worked_on_again(
    cluster: Cluster, model: afnext.Model, items: list[Item], tmp_path: Path
) -> None:
    cluster.dies = lambda number, name: number == 0 and len(cluster.calls) > 3
    rows = ran(lambda: model, items, tmp_path / "out.jsonl")
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert len(rows) == 8
    assert len(cluster.made) == 3


def test_a_recording_that_ends_each_process_is_a_failed_row(
    cluster: Cluster, model: afnext.Model, items: list[Item], tmp_path: Path
) -> None:
    cluster.dies = lambda number, name: name == "3.wav"
    rows = ran(lambda: model, items[3:4], tmp_path / "out.jsonl", replicas=1)
    assert rows["3.wav"]["status"] == "failed"
    assert rows["3.wav"]["error"]["code"] == "WorkerLostError"
    assert "the actor died" in rows["3.wav"]["error"]["message"]
    assert "at length" not in rows["3.wav"]["error"]["message"]
    assert [name for _, name in cluster.calls] == ["3.wav"] * 3


def test_processes_that_keep_ending_end_the_run(
    cluster: Cluster, model: afnext.Model, items: list[Item], tmp_path: Path
) -> None:
    cluster.dies = lambda number, name: True
    with pytest.raises(EngineDeadError, match="keep ending: the actor died"):
        ran(lambda: model, items, tmp_path / "out.jsonl")


def test_what_cannot_be_loaded_or_done_ends_the_run(
    cluster: Cluster, model: afnext.Model, items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> afnext.Model:
        raise PromptError("there is no such checkpoint")

    with pytest.raises(AfnextError, match="no such checkpoint"):
        ran(broken, items, tmp_path / "out.jsonl")
    with pytest.raises(AfnextError, match="impossible"):
        ran(lambda: model, items, tmp_path / "out.jsonl", (Question(task="impossible"),))
    monkeypatch.setattr("os.getcwd", lambda: "/not/there")
    with pytest.raises(AfnextError, match=r"/not/there is not there on .* share"):
        ran(lambda: model, items, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").read_bytes()
