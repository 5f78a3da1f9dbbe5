"""Every example runs on the bundled model, in this process. tests/serve/ runs the client."""

import json
import runpy
import sys
import types
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "ask.py": '"hello"',
    "stream.py": "hello",
    "listen_once.py": "Describe the audio with timestamps.\n[00:00.3]",
    "live.py": "all of it: [00:00.3]",
    "quantize.py": "int4: hello",
    "transcribe.py": "segments in scene.srt",
}


def test_all_examples_are_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, "serve_client.py"}


@pytest.mark.parametrize("name", SAYS)
def test_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


def test_the_notebook_says_what_it_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its code runs, and prints what is stored in it but for the times that stages took."""
    matplotlib = pytest.importorskip("matplotlib.pyplot", reason="the notebook draws with matplotlib")
    matplotlib.switch_backend("Agg")
    display = types.ModuleType("IPython.display")
    display.Audio = lambda samples, rate: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(version_info=(9,), get_ipython=lambda: None))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    names: dict[str, object] = {}
    cells = [
        cell for cell in json.loads((EXAMPLES / "listen.ipynb").read_text())["cells"] if cell["cell_type"] == "code"
    ]
    for cell in cells:
        exec("".join(cell["source"]), names)
        printed = capsys.readouterr().out
        stored = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
        if cell is not cells[-1]:
            assert printed == "".join(stored)
