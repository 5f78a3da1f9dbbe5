"""The examples of docs/serving.md, run as they are against a server."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import SCENE, Running

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs/serving.md").read_text(), re.MULTILINE | re.DOTALL)


def code(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


@pytest.mark.parametrize("example", code("bash"))
def test_curl_examples_work(service: Running, example: str, tmp_path: Path) -> None:
    for tool in ("bash", "curl"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    shutil.copy(SCENE, tmp_path / "scene.flac")
    script = "set -euo pipefail\n" + example.replace("http://127.0.0.1:8000", service.url)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout
    assert '"error":{' not in done.stdout


def test_python_examples_work(service: Running, tmp_path: Path) -> None:
    """One after the other, as a reader would."""
    shutil.copy(SCENE, tmp_path / "scene.flac")
    script = "\n".join(code("python")).replace("http://127.0.0.1:8000", service.url)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert service.model.ask(str(SCENE), "Describe the audio with timestamps.").text in done.stdout


@pytest.mark.parametrize("example", code("javascript"))
def test_javascript_examples_work(service: Running, example: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or int(subprocess.check_output([node, "--version"], text=True)[1:].split(".")[0]) < 18:
        pytest.skip("node 18 or newer is not installed")
    shutil.copy(SCENE, tmp_path / "scene.flac")
    (tmp_path / "example.mjs").write_text(example.replace("http://127.0.0.1:8000", service.url))
    done = subprocess.run([node, "example.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == service.model.ask(str(SCENE), "Describe the audio with timestamps.").text


def test_every_endpoint_has_an_example() -> None:
    examples = "\n".join(text for _, text in BLOCKS)
    for path in ("chat/completions", "responses", "audio/transcriptions", "audio/translations", "files", "contexts"):
        assert f"/v1/{path}" in examples, path
    for path in ("/inference", "/v1/models", "/v1/status", "/metrics", "/health/ready", "/health/live"):
        assert path in examples, path
