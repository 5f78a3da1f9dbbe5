"""`afnext quantize`: what it writes loads as what `load(quant=...)` makes, and bad input has errors that name it."""

import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.audio import wav_bytes
from support.command_line import CommandLine
from support.layouts import write_components
from support.logits import last_logits, question

import afnext
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.quant.recipe import recipe
from afnext.quant.scheme import SchemeError
from afnext.runtime.app import output_folder
from afnext.runtime.app.quantize import quantize
from afnext.runtime.errors import AfnextError, CheckpointError, ConfigError, OutputError


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="module")
def four(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint in int4 with zero points."""
    out = tmp_path_factory.mktemp("quantized") / "four"
    quantize(folder, out, recipe("int4-g32-zeros"))
    return out


def state(model: afnext.Model) -> dict[str, torch.Tensor]:
    return model.network.state_dict()


@pytest.mark.parametrize("shard_bytes", [10**9, 300_000])
@pytest.mark.parametrize("name", ["int8", "int8-w8a8", "fp8", "nvfp4", "mxfp4", "int4-g32", "int4-g32-zeros"])
def test_what_is_written_is_what_load_makes(
    folder: Path, tmp_path: Path, name: str, shard_bytes: int, seed: int
) -> None:
    done = quantize(folder, tmp_path / "out", recipe(name), shard_bytes=shard_bytes)
    assert (len(done["files"]) > 1) == (shard_bytes < 10**9)
    written, made = afnext.load(tmp_path / "out"), afnext.load(folder, quant=name)
    assert state(written).keys() == state(made).keys()
    for key, tensor in state(written).items():
        assert tensor.dtype == state(made)[key].dtype
        assert torch.equal(tensor.view(torch.uint8), state(made)[key].view(torch.uint8)), key
    assert sum(tensor.nbytes for tensor in state(written).values()) == done["bytes"]
    messages = question(np.random.randn(9000).astype(np.float32), "What?")
    assert torch.equal(last_logits(written, messages), last_logits(made, messages))


def test_nf4_is_written_and_read(folder: Path, tmp_path: Path) -> None:
    quantize(folder, tmp_path / "out", recipe("nf4", rules=[("*.mlp.down_proj", "nf4"), ("decoder.layers.*", "dense")]))
    model = afnext.load(tmp_path / "out")
    assert str(model.network.decoder.layers[0].mlp.down_proj.scheme) == "nf4"
    assert model.ask(None, "What?", max_new_tokens=3).token_ids


def test_the_command_line(run: CommandLine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "eight"
    arguments = ("quantize", folder, out, "--scheme", "int4", "--group-size", "32", "--zeros")
    done = json.loads(run(*arguments, "--rule", "decoder.layers.0.*=dense", "--json").stdout)
    assert done["recipe"] == "int4-g32-zeros"
    described = json.loads(run("info", out, "--json").stdout)
    assert described["bytes"] == done["bytes"] < done["bytes_before"]
    assert described["bytes_by_part"] == done["bytes_by_part"]
    assert described["schemes_by_part"]["decoder layers"] == ["int4-g32-zeros"]
    assert described["schemes_by_part"]["lm_head"] == ["int8"]
    assert described["quantization"] == {"recipe": "int4-g32-zeros", "source": done["source_hash"]}
    assert described["parameters"] == json.loads(run("info", folder, "--json").stdout)["parameters"]
    assert "int4-g32-zeros" in run("info", out).stdout
    assert json.loads(run("ask", "-m", out, "--json", "--max-new-tokens", 2, *_clip(tmp_path), "What?").stdout)["text"]
    plan = json.loads(run("plan", "--gpu", "cpu", "-m", out, "--json").stdout)
    assert sum(part["nbytes"] for part in plan["parts"] if part["place"] == "file") >= done["bytes"] - 4096
    shown = run("quantize", folder, tmp_path / "other", "--scheme", "int8")
    assert shown.returncode == 0
    assert "int8, in" in shown.stderr


def _clip(tmp_path: Path) -> list[Path]:
    path = tmp_path / "clip.wav"
    path.write_bytes(wav_bytes(np.random.randn(8000).astype(np.float32) / 10))
    return [path]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--scheme", "int5"), 1, "unknown recipe 'int5'; choose from int8"),
        (("--scheme", "int4"), 1, "decoder.layers.0.self_attn.q_proj cannot be int4-g64: 96 inputs are not divisible"),
        (("--scheme", "int4", "--group-size", "48"), 1, "not 48"),
        (("--scheme", "int8", "--zeros"), 1, "only int4 and int4-w4a8 do"),
        (("--rule", "encoder"), 2, "LAYERS=SCHEME"),
        (("--rule", "encoder.*=int9"), 1, "unknown scheme 'int9'"),
    ],
)
def test_wrong_arguments(
    run: CommandLine, folder: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = run("quantize", folder, tmp_path / "out", *arguments)
    assert done.returncode == code
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(folder: Path, four: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds README"):
        quantize(folder, four, recipe("int8"))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        quantize(folder, tmp_path / "file", recipe("int8"))


def test_a_second_run_into_the_same_folder_is_refused_and_harms_nothing(folder: Path, tmp_path: Path) -> None:
    out, refused = tmp_path / "out", []

    def progress(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(OutputError, match="another run is writing into") as caught:
                quantize(folder, out, recipe("int4-g32"))
            refused.append(caught)
        assert not (out / "config.json").exists()  # which marks the folder complete

    quantize(folder, out, recipe("int8"), progress=progress)
    assert refused
    quantize(folder, tmp_path / "alone", recipe("int8"))
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes()
    assert len(list(out.iterdir())) == len(list((tmp_path / "alone").iterdir()))


def test_without_locks_the_run_that_ends_last_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_folder, "fcntl", None)
    out, names = tmp_path / "out", []

    def progress(done: int, total: int) -> None:
        if not names:
            quantize(folder, out, recipe("int8"), progress=lambda done, total: names.append(done))

    with pytest.raises(OutputError, match="exists"):
        quantize(folder, out, recipe("int4-g32"), progress=progress)
    assert afnext.load(out).network.config.quantization == recipe("int8")


def test_a_run_that_fails_leaves_nothing_and_remains_of_a_crash_are_removed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quantize(folder, out, recipe("int8"), progress=fail)
    assert not out.exists()
    out.mkdir()
    (out / "model.safetensors.0123.part").write_bytes(b"from a crash")
    quantize(folder, out, recipe("int8"))
    assert not list(out.glob("*.part"))
    afnext.load(out)


def test_disks_that_are_full_or_read_only_are_errors_with_advice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            quantize(folder, tmp_path / "out", recipe("int8"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="cannot be written"):
        quantize(folder, "/proc/afnext", recipe("int8"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="room for 1,000 bytes"):
        quantize(folder, tmp_path / "out", recipe("int8"))


def test_links_out_of_the_checkpoint_are_not_copied(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    source = Path(shutil.copytree(folder, tmp_path / "source"))
    (source / "inner.txt").symlink_to(source / "chat_template.jinja")
    quantize(source, tmp_path / "inside", recipe("int8"))
    (source / "README.md").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"README\.md leads out of the checkpoint"):
        quantize(source, tmp_path / "out", recipe("int8"))
    (source / "README.md").unlink()
    os.mkfifo(source / "README.md")
    with pytest.raises(CheckpointError, match="not a regular file"):
        quantize(source, tmp_path / "out", recipe("int8"))
    assert not (tmp_path / "out").exists()


def test_the_links_of_the_hubs_cache_are_copied(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    quantize(snapshot, tmp_path / "out", recipe("int8"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


def test_quantized_weights_are_not_quantized_again(four: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantized already \(int4-g32-zeros\)"):
        quantize(four, tmp_path / "out", recipe("int8"))
    with pytest.raises(ConfigError, match="quantized already"):
        afnext.load(four, quant="int8")
    afnext.load(four, quant="int4-g32-zeros")


def test_the_source_hash_tells_weights_apart(folder: Path, four: Path, tmp_path: Path) -> None:
    again = quantize(folder, tmp_path / "again", recipe("int8"))
    stated = json.loads((four / "config.json").read_text())["quantization_config"]
    assert stated["source"] == again["source_hash"]
    other = write_random_checkpoint(tmp_path / "other", seed=1)
    assert quantize(other, tmp_path / "out", recipe("int8"))["source_hash"] != again["source_hash"]


def test_a_component_layout_is_quantized(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "model.safetensors").unlink()
    (source / "config.json").unlink()
    write_components(source, load_file(folder / "model.safetensors"), shards=1)
    config = json.loads((folder / "config.json").read_text())
    (source / "llm" / "config.json").write_text(json.dumps(config["text_config"]))
    (source / "sound_tower" / "config.json").write_text(json.dumps(config["audio_config"]))
    for path in folder.glob("tokenizer*.json"):
        shutil.copyfile(path, source / "llm" / path.name)
    quantize(source, tmp_path / "out", recipe("int8"))
    written, made = state(afnext.load(tmp_path / "out")), state(afnext.load(folder, quant="int8"))
    assert written.keys() == made.keys()
    assert all(torch.equal(tensor, made[key]) for key, tensor in written.items())


def damaged(four: Path, tmp_path: Path, change: Any) -> Path:
    """A copy of the quantized checkpoint with its tensors changed."""
    out = tmp_path / "damaged"
    shutil.copytree(four, out)
    tensors = load_file(out / "model.safetensors")
    metadata = json.loads((four / "config.json").read_text())["quantization_config"]
    change(tensors)
    (out / "model.safetensors").unlink()
    save_file(tensors, out / "model.safetensors", {"afnext.quantization": json.dumps(metadata)})
    return out


UP = "decoder.layers.0.mlp.up_proj"


def _poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.weight_scales"][3, 1] = torch.nan


def _cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.weight_scales"] = tensors[f"{UP}.weight_scales"][:, :1].contiguous()


def _enlarge(tensors: dict[str, torch.Tensor]) -> None:
    scales = tensors[f"{UP}.weight_scales"].float()
    scales[5, 1] = -1e36
    tensors[f"{UP}.weight_scales"] = scales


def _wrong_type(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.weight_codes"] = tensors[f"{UP}.weight_codes"].float()


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{UP}.weight_zeros"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_poison, r"up_proj\.weight_scales'? has 1 of 576 values that are not finite"),
        (_cut, r"1 misshapen .*up_proj\.weight_scales.* \[192, 1\] instead of \[192, 3\]"),
        (_enlarge, r"up_proj\.weight_scales'? stands for weights up to"),
        (_wrong_type, r"1 in a dtype other than U8 \(.*up_proj\.weight_codes.* F32"),
        (_drop, r"1 missing \(decoder\.layers\.0\.mlp\.up_proj\.weight_zeros\)"),
    ],
)
def test_damaged_tensors_are_errors_that_name_them(four: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        afnext.load(damaged(four, tmp_path, change))


def test_another_models_config_is_an_error(folder: Path, four: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense-config"
    shutil.copytree(four, dense)
    shutil.copyfile(folder / "config.json", dense / "config.json")
    with pytest.raises(CheckpointError, match=r"quantized by int4-g32-zeros .*config\.json describes dense"):
        afnext.load(dense)
    wider = tmp_path / "wider"
    shutil.copytree(four, wider)
    config = json.loads((four / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 256
    (wider / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"misshapen .*gate_proj.*\[192, 48\] instead of \[256, 48\]"):
        afnext.load(wider)
    other = tmp_path / "other-source"
    shutil.copytree(four, other)
    config["text_config"]["intermediate_size"] = 192
    config["quantization_config"]["source"] = "f" * 64
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(AfnextError, match=r"from [0-9a-f]{12}, but its config.json describes .* from ffffffffffff"):
        afnext.load(other)


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g32-zeros"])
def test_random_packed_checkpoints_load_and_answer(tmp_path: Path, name: str) -> None:
    model = afnext.load(write_random_checkpoint(tmp_path, quant=recipe(name)))
    answer = model.ask(None, "What?", max_new_tokens=8)
    assert len(answer.token_ids) == 8
    assert answer.text.isprintable()


@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "nf4"])
@pytest.mark.parametrize(("dtype", "weight", "accepted"), [("float16", 7e4, False), ("float32", 7e4, True)])
def test_scales_of_weights_beyond_the_dtype_are_refused(
    folder: Path, tmp_path: Path, scheme: str, dtype: str, weight: float, accepted: bool
) -> None:
    layers = "decoder.layers.*.mlp.down_proj"
    quantize(folder, tmp_path / "packed", recipe("int8", rules=[(layers, scheme)]))
    name = "decoder.layers.1.mlp.down_proj.weight_scales"

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        steps = {"int8": 128, "int4-g32": 8, "nf4": 1}[scheme]
        tensors[name] = tensors[name].float()
        tensors[name].view(-1)[7] = weight / steps

    changed = damaged(tmp_path / "packed", tmp_path, enlarge)
    if accepted:
        afnext.load(changed, dtype=dtype)
    else:
        with pytest.raises(CheckpointError, match=rf"{name}'? stands for weights up to 7e\+04, .* in {dtype}"):
            afnext.load(changed, dtype=dtype)


def test_a_rule_that_matches_no_layer_is_an_error_that_lists_the_layers(folder: Path, tmp_path: Path) -> None:
    rules = [("decoder.layers.0.*", "dense"), ("nosuch.*", "dense")]
    with pytest.raises(SchemeError, match=r"'nosuch\.\*' matches no layer .*decoder\.layers\.\*\.mlp\.up_proj"):
        quantize(folder, tmp_path / "out", recipe("int8", rules=rules))
    with pytest.raises(SchemeError, match="matches no layer"):
        afnext.load(folder, quant=recipe("int8", rules=rules))
    assert not (tmp_path / "out").exists()
