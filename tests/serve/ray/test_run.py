"""What a fleet refuses before anything is started."""

import socket
import sys

import pytest

pytest.importorskip("starlette", reason="serving needs the extra `serve`")

from afnext.kernels.errors import AfnextError
from afnext.runtime.errors import CheckpointError
from afnext.serve.cli import parsed
from afnext.serve.ray.run import run


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match="/not/there"):
        run(parsed(["--ray", "-m", "/not/there"]))


def test_a_cluster_of_others_needs_a_shared_folder() -> None:
    with pytest.raises(AfnextError, match="--state-dir"):
        run(parsed(["--ray", "--ray-address", "auto"]))


def test_a_port_that_is_taken() -> None:
    """Ray's proxy sets SO_REUSEPORT: two fleets on a port would share its connections."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(AfnextError, match=f"port {port} of 127.0.0.1 is in use; choose another one with --port."):
            run(parsed(["--ray", "--port", str(port)]))


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(AfnextError, match=r"pip install '\.\[ray\]'"):
        run(parsed(["--ray", "--port", "0"]))
