"""docs/api.md names every public name of the package, and nothing that is not there."""

import importlib
import re
from pathlib import Path

import afnext

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_every_public_name_is_on_the_page() -> None:
    paths = re.findall(r"^::: (\S+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(afnext.__all__) <= {path.rpartition(".")[2] for path in paths}
    for path in paths:
        module, _, name = path.rpartition(".")
        documented = getattr(importlib.import_module(module), name)
        if name in afnext.__all__:
            assert documented is getattr(afnext, name), path
