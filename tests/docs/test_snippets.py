"""Python in README and docs: all of it compiles, and what needs no other model than afnext-tiny runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXTERNAL = re.compile(  # a model that is not bundled, or a server
    r"nvidia/|load\(\s*\"(?!afnext-tiny\"|tiny\")|localhost|127\.0\.0\.1|base_url"
)
ELSEWHERE = {"contributing-a-kernel.md", "serving.md"}  # run in tests of their own: Triton's interpreter, a server


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order, in one namespace, in a folder that has the bundled recordings."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "data").symlink_to(ROOT / "bench" / "data")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, source in blocks(page):
        code = compile("\n" * (line - 1) + source, str(page), "exec")
        if not EXTERNAL.search(source) and page.name not in ELSEWHERE:
            exec(code, namespace)


def test_most_pages_have_a_block_that_runs() -> None:
    """Guards the rule above: a pattern that matched everything would run nothing."""
    run = {page.name for page in PAGES for _, source in blocks(page) if not EXTERNAL.search(source)}
    assert {"python.md", "long-audio.md"} <= run
