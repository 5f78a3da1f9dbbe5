"""How the command line starts: quickly, because help and usage errors import no torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import afnext

# Runs the command line once per argument, each a JSON list, and prints what each run showed and imported so far.
RUNS = """
import contextlib, io, json, sys
from afnext.__main__ import main
for arguments in sys.argv[1:]:
    sys.argv, shown, code = ["afnext", *json.loads(arguments)], io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(shown): main()
    except SystemExit as end: code = end.code
    print(json.dumps([code, shown.getvalue(), sorted(sys.modules)]))
"""


def test_help_and_wrong_usage_import_no_torch() -> None:
    cases = [
        (["ask"], 2, ""),
        (["nosuch"], 2, ""),
        (["--help"], 0, "transcribe"),
        (["ask", "--help"], 0, "--max-new-tokens"),
    ]
    command = [sys.executable, "-c", RUNS, *(json.dumps(arguments) for arguments, _, _ in cases)]
    done = subprocess.run(command, capture_output=True, timeout=99, encoding="utf-8")
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    for (arguments, code, expected), (returned, shown, modules) in zip(cases, runs, strict=True):
        assert returned == code, arguments
        assert expected in shown
        roots = {name.partition(".")[0] for name in modules}
        assert "typer" in roots
        assert not roots & {"torch", "triton", "numpy", "transformers", "huggingface_hub", "rich"}, arguments


@pytest.mark.skipif(sys.platform == "win32", reason="this system sends no SIGINT to a process")
def test_ctrl_c_while_modules_are_imported_ends_quietly(tmp_path: Path) -> None:
    recording = tmp_path / "a.wav"
    soundfile.write(recording, np.zeros(1600), 16_000)
    code = (
        "import builtins, os, signal, sys\n"
        "from afnext.__main__ import main\n"
        "load, at = builtins.__import__, sys.argv[1]\n"
        "def imported(name, *rest):\n"
        "    if name == at: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return load(name, *rest)\n"
        "builtins.__import__ = imported\n"
        "sys.argv[1:] = ['ask', sys.argv[2], 'x', '--quiet']\n"
        "main()\n"
    )
    for module in ("typer", "torch"):
        done = subprocess.run([sys.executable, "-c", code, module, recording], capture_output=True, timeout=99)
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b""), module


def test_the_package_imports_what_is_used_when_it_is_used() -> None:
    code = "import sys, afnext; assert 'torch' not in sys.modules; afnext.load; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=99).returncode == 0


def test_every_public_name_can_be_imported() -> None:
    names: dict[str, object] = {}
    exec("from afnext import *", names)
    assert set(afnext.__all__) <= names.keys()
    assert set(afnext.__all__) <= set(dir(afnext))
    assert afnext.load.__module__ == "afnext.runtime.app.api"
    with pytest.raises(AttributeError, match="nosuch"):
        afnext.nosuch  # noqa: B018
