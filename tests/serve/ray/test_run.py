"""What a fleet refuses before anything is started."""

import sys

import pytest

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


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(AfnextError, match=r"pip install '\.\[ray\]'"):
        run(parsed(["--ray"]))
