"""A small random model for the tests of the API and the command line."""

from pathlib import Path

import pytest

import afnext
from afnext.bench.core.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint's folder."""
    return write_random_checkpoint(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="session")
def model(folder: Path) -> afnext.Model:
    """The model in it, in float32."""
    return afnext.load(folder, dtype="float32")
