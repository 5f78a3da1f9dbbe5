"""The model card of quantized folders: what the Hub reads, where the weights come from, and what the loss is."""

import hashlib
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.command_line import CommandLine

import afnext
from afnext.quant.recipe import Recipe, recipe
from afnext.runtime.app.model_card import write_card
from afnext.runtime.app.quantize import quantize
from afnext.runtime.checkpoint_folder import CheckpointFolder


def front_matter(card: str) -> dict[str, str]:
    _, front, _ = card.split("---\n", 2)
    return dict(line.split(": ", 1) for line in front.splitlines())


def test_a_quantized_folder_has_a_card(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(folder, tmp_path / "source"))
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: nvidia\ntags: [x]\n---\n# The source\n")
    (source / "LICENSE").write_text("terms")
    out = tmp_path / "af-next-int4"
    run = CommandLine(monkeypatch, capsys)
    assert (
        run("quantize", source, out, "--scheme", "int4-g32", "--measured", "WER 5.2 % instead of 5.1 %").returncode == 0
    )
    card = (out / "README.md").read_text()
    front = front_matter(card)
    assert front["library_name"] == "afnext"
    assert (front["license"], front["license_name"]) == ("other", "nvidia")
    assert "base_model" not in front
    assert "# source, int4-g32\n" in card
    assert "## Measured loss\n\nWER 5.2 % instead of 5.1 %\n" in card
    stored = load_file(out / "model.safetensors")
    layers = sum(
        tensor.nbytes for name, tensor in stored.items() if name.startswith(("decoder.layers", "decoder.norm"))
    )
    assert f"| decoder layers | int4-g32 | {layers:,} |" in card
    assert f"| all |  | {sum(tensor.nbytes for tensor in stored.values()):,} |" in card
    recorded = afnext.load(out).network.config.quantization
    assert recorded is not None
    assert recorded.source in card
    assert len(recorded.source) == len(hashlib.sha256().hexdigest())
    assert (out / "README-source.md").read_bytes() == (source / "README.md").read_bytes()
    assert (out / "LICENSE").read_text() == "terms"


def test_what_is_not_known_is_said(folder: Path, tmp_path: Path) -> None:
    quantize(folder, tmp_path / "out", recipe("int8"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not measured." in card
    assert "Look it up there." in card
    assert "license" not in front_matter(card)
    assert not (tmp_path / "out" / "README-source.md").exists()


@pytest.mark.parametrize(
    ("source", "base"),
    [
        ("next", "nvidia/audio-flamingo-next-hf"),
        ("org/name:a.gguf", "org/name"),
        ("x`: [evil](http://a)\n---", None),
    ],
)
def test_the_source_is_named(source: str, base: str | None, folder: Path, tmp_path: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", tmp_path / "model.safetensors")
    write_card(tmp_path, source, CheckpointFolder(folder), Recipe("int8", (), "ab" * 32))
    card = (tmp_path / "README.md").read_text()
    assert front_matter(card).get("base_model") == base
    if base is None:
        assert "`a) ---` with its weights packed" in card
    else:
        assert f"[{base}](https://huggingface.co/{base}) with its weights packed" in card
