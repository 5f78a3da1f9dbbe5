"""examples/serve_client.py against a running server."""

import runpy
import sys
from pathlib import Path

import pytest

from .conftest import Running

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_client.py"


def test_the_client_prints_the_answer(
    service: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, f"{service.url}/v1"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert capsys.readouterr().out.startswith("hello")
