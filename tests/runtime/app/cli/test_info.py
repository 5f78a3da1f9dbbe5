"""`afnext info` and `afnext tasks`."""

import json
from pathlib import Path

import pytest
from support.command_line import CommandLine

from afnext import prompts


def test_info_shows_the_shape_and_the_bytes(run: CommandLine, folder: Path) -> None:
    shown = run("info", folder)
    described = json.loads(run("info", folder, "--json").stdout)
    assert shown.returncode == 0, shown.stderr
    assert f"{described['parameters']:,}" in shown.stdout
    assert sum(described["bytes_by_part"].values()) == described["bytes"] == 2 * described["parameters"]
    assert described["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert described["context_tokens"] == 131_072


def test_info_tells_what_each_operation_runs_on(
    run: CommandLine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run("info", "--backend", "--device", "cpu")
    described = json.loads(run("info", "--backend", "--device", "cpu", "--json").stdout)
    assert shown.returncode == 0, shown.stderr
    assert {"rms_norm", "attention", "sample", "linear_int4"} <= described["operations"].keys()
    assert all(name in shown.stdout for name in described["operations"])
    if described["native"]:
        assert described["operations"]["rms_norm"] == ["native", "torch"]
        assert described["native"]["isa"] in described["native"]["levels"]
        assert described["native"]["compiler"] in shown.stdout
    assert f"{described['threads']} ({described['threads_reason']})" in shown.stdout
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    assert "OMP_PROC_BIND is set" in run("info", "--backend", "--device", "cpu").stdout or not described["native"]
    monkeypatch.setenv("OMP_DYNAMIC", "false")
    assert "OMP_DYNAMIC=false is set" in run("info", "--backend", "--device", "cpu").stdout or described["threads"] == 1
    monkeypatch.setenv("AFNEXT_BACKEND", "torch")
    forced = json.loads(run("info", "--backend", "--device", "cpu", "--json").stdout)
    assert forced["operations"]["rms_norm"] == ["torch"]
    if described["native"]:
        monkeypatch.setenv("AFNEXT_ISA", "mmx")
        assert "AFNEXT_ISA=mmx" in run("info", "--backend").stderr.replace("\n", " ")
    assert [run("info").returncode, run("info", folder, "--backend").returncode] == [2, 2]


def test_tasks_are_those_of_the_model_cards(run: CommandLine) -> None:
    shown = run("tasks").stdout
    described = json.loads(run("tasks", "--json").stdout)
    assert [task["name"] for task in described] == list(prompts.TASKS)
    for task in prompts.TASKS.values():
        [row] = [line for line in shown.splitlines() if line.split()[0] == task.name]
        assert ", ".join(task.variants) in row
        assert " ".join((task.prompt or task.example or "").split()) in row
