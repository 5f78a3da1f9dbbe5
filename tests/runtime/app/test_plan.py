"""Memory plans from the command line and in `load`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.command_line import CommandLine

import afnext
from afnext.runtime.engine.memory import CHANGES, MemoryPlan
from afnext.runtime.errors import ConfigError, MemoryPlanError, OutOfPagesError
from afnext.runtime.model.config import ModelConfig


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def test_thirty_minutes_on_eight_gigabytes(run: CommandLine) -> None:
    arguments = ("plan", "--gpu", "8GB", "--audio", 1800, "--scheme", "int4", "--kv", "int8")
    plan = json.loads(run(*arguments, "--json").stdout)
    assert plan["fits"]
    assert plan["projected"]
    assert plan["total"] == sum(part["nbytes"] for part in plan["parts"] if part["place"] != "host")
    assert plan["longest_audio"] == 1800
    shown = run(*arguments)
    assert shown.returncode == 0, shown.stderr
    for part in plan["parts"]:
        assert f"{part['nbytes']:,}" in shown.stdout
    assert "It fits" in shown.stdout
    assert "Projected" in shown.stdout


def test_settings_are_chosen_so_that_it_fits(run: CommandLine) -> None:
    plan = json.loads(run("plan", "--gpu", "6GB", "--audio", 1800, "--fit", "--json").stdout)
    assert plan["fits"]
    assert plan["total"] <= 6.0e9
    assert plan["changes"] == ["chunk_size=256, encode_batch=1", "kv=int4", "quant=small"]
    assert (plan["scheme"], plan["kv"], plan["release_encoder"]) == ("small", "int4", False)
    assert "Chosen so that it fits: chunk_size=256, encode_batch=1, kv=int4" in run(
        "plan", "--gpu", "6GB", "--fit"
    ).stdout.replace("\n", " ")
    refused = run("plan", "--gpu", "4GB", "--audio", 300, "--fit")
    assert refused.returncode != 0
    assert "300 s of audio do not fit into 4.00 GB with any settings" in refused.stderr
    suggested = run("plan", "--gpu", "4GiB", "--audio", 300, "--fit")
    assert suggested.returncode != 0
    assert "It fits with --quant int3 and --chunk-size 256" in " ".join(suggested.stderr.split())


def test_load_chooses_settings_that_fit(folder: Path) -> None:
    plan = MemoryPlan(
        ModelConfig.from_folder(folder), 10**12, gpu=False, dtype=torch.bfloat16, audio_seconds=60, mapped=True
    )
    roomy = afnext.load(folder, memory=plan.total, fit=60)
    assert (roomy.options.kv, roomy.options.chunk_size) == ("auto", 1024)
    tight = afnext.load(folder, memory=plan.changed(["kv=int8"]).total - 1, fit=60)
    assert tight.options.chunk_size == 256
    assert tight.options.encode_batch == 1
    assert tight.ask(None, "What?", max_new_tokens=2).token_ids
    with pytest.raises(MemoryPlanError, match="do not fit into"):
        afnext.load(folder, memory=plan.changed(CHANGES).total // 2, fit=60)
    with pytest.raises(ConfigError, match="one device"):
        afnext.load(folder, fit=True, tp=2)


def test_what_does_not_fit_comes_with_what_to_change(run: CommandLine) -> None:
    shown = run("plan", "--gpu", "rtx3060")
    assert shown.returncode == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    assert "RTX 3060 12GB" in text
    assert "It does not fit: 8.16 GB too much. It fits with " in text
    assert "quant=int4: 11.32 GB" in text
    lent = json.loads(run("plan", "--gpu", "8GB", "--release-encoder", "--json").stdout)
    assert [part["name"] for part in lent["parts"] if part["place"] == "host"] == ["encoder layers"]


def test_two_gpus_hold_what_one_does_not(run: CommandLine) -> None:
    one, two = (json.loads(run("plan", "--gpu", "rtx3060", "--tp", count, "--json").stdout) for count in (1, 2))
    assert (one["fits"], two["fits"]) == (False, True)
    parts = [{part["name"]: part["nbytes"] for part in plan["parts"]} for plan in (one, two)]
    for name, of_one, of_two in (("KV pages", 2, 1), ("lm_head", 2, 1), ("encoder layers", 1, 1)):
        assert parts[0][name] * of_two == parts[1][name] * of_one, name
    assert "RTX 3060 12GB, each of 2" in " ".join(run("plan", "--gpu", "rtx3060", "--tp", 2).stdout.split())


def test_a_plan_for_a_folder_a_config_and_this_machine(run: CommandLine, folder: Path) -> None:
    described = json.loads(run("info", folder, "--json").stdout)
    for model in (folder, folder / "config.json"):
        plan = json.loads(run("plan", "--gpu", "cpu", "-m", model, "--json").stdout)
        weights = {part["name"]: part["nbytes"] for part in plan["parts"] if part["place"] == "file"}
        assert sum(weights.values()) == described["bytes"]
        assert plan["page_bytes"] == plan["page_size"] * described["kv_bytes_per_token"]
        assert not plan["gpu"]


@pytest.mark.parametrize(
    ("name", "device"),
    [("4090", "RTX 4090"), ("NVIDIA GeForce RTX 3060", "RTX 3060 12GB"), ("rtx-5090", "RTX 5090"), ("l4", "L4")],
)
def test_known_gpus_by_the_names_that_people_use(run: CommandLine, name: str, device: str) -> None:
    assert json.loads(run("plan", "--gpu", name, "--json").stdout)["device"] == device


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_explained(run: CommandLine) -> None:
    done = run("plan", "--gpu", "cuda")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no GPU that torch can use; give an amount of memory" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "abacus"), "unknown device 'abacus'"),
        (("--gpu", "8 gallons"), "8 gallons"),
        (("--gpu", "8"), "write 8GB"),
        (("--gpu", "rtx4060ti"), "or give an amount of memory, such as 16GB"),
        (("--gpu", "4070"), "unknown device '4070'"),
        (("--gpu", "8GB", "--scheme", "int5"), "int5"),
        (("--gpu", "8GB", "--audio", 9999), "9999 s"),
        (("--gpu", "8GB", "-m", "nowhere"), "nowhere"),
        (("--gpu", "8GB", "--tp", 3), "3 processes cannot share this model's 28 attention heads"),
    ],
)
def test_impossible_wishes_are_explained(run: CommandLine, arguments: tuple[object, ...], message: str) -> None:
    done = run("plan", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in " ".join(done.stderr.split())


def test_load_refuses_what_cannot_fit_before_it_loads(folder: Path) -> None:
    stages = []
    with pytest.raises(MemoryPlanError, match=r"the model and a short question take .*GB|MB.*are there"):
        afnext.load(folder, memory=10**8, progress=lambda stage, done, total: stages.append(stage))
    assert stages == []
    with pytest.raises(MemoryPlanError, match="8GB"):
        afnext.load(folder, memory="much")


def test_a_request_beyond_the_memory_is_refused_and_a_smaller_one_answered(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    memory = MemoryPlan(config, 0, gpu=False, dtype=torch.float32, audio_seconds=61).total
    model = afnext.load(folder, dtype="float32", memory=memory)
    rng = np.random.default_rng(0)
    long, short = (rng.standard_normal(16_000 * seconds).astype(np.float32) * 0.01 for seconds in (1500, 1))
    with pytest.raises(OutOfPagesError, match=r"room for [\d,]+\. Give less audio"):
        model.ask((long, 16_000), "What?", max_new_tokens=100)
    assert model.ask((short, 16_000), "What?", max_new_tokens=3).usage.new_tokens == 3


def test_lending_changes_nothing_where_encoder_and_decoder_share_their_memory(
    folder: Path, model: afnext.Model
) -> None:
    clip = (np.random.default_rng(1).standard_normal(16_000).astype(np.float32) * 0.1, 16_000)
    lent = afnext.load(folder, dtype="float32", release_encoder=True)
    assert lent.ask(clip, "What?", max_new_tokens=5).token_ids == model.ask(clip, "What?", max_new_tokens=5).token_ids


@pytest.mark.gpu
def test_a_gpu_that_borrows_the_encoder_answers_alike(folder: Path) -> None:
    clip = (np.random.default_rng(1).standard_normal(16_000).astype(np.float32) * 0.1, 16_000)
    models = [afnext.load(folder, device="cuda", dtype="float32", release_encoder=lent) for lent in (False, True)]
    places = {model.network.encoder.layers[0].fc1.weight.device.type for model in models}
    assert places == {"cuda", "cpu"}
    answers = [model.ask(clip, "What?", max_new_tokens=5).token_ids for model in models]
    assert answers[0] == answers[1]
