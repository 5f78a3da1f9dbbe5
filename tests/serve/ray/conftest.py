"""Skips where the server's packages are missing."""

import pytest

pytest.importorskip("starlette", reason="serving needs the extra `serve`")
