"""Brings pages and files from outside docs/ into the site, so that the links of README and docs hold in both places.

README.md becomes the first page. Every file outside docs/ that a page links to is copied into the site at its path in
the repository, and the link is rewritten to that place.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?P<path>(?!\w+:)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_homes: dict[str, Path] = {}  # the folder in the repository of each page that is not in docs/


def _outside(path: Path) -> set[Path]:
    """The existing files that a page links to and that are not in docs/, and those that they link to."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        page = waiting.pop()
        for link in LINK.finditer(page.read_text(encoding="utf-8")):
            target = (page.parent / link["path"]).resolve()
            if target.is_file() and target.is_relative_to(ROOT) and not target.is_relative_to(ROOT / "docs"):
                waiting += [target] if target.suffix == ".md" and target not in found else []
                found.add(target)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds README.md, and what it and the pages link to."""
    pages = [ROOT / "README.md", *Path(config.docs_dir).glob("*.md")]
    for path in {ROOT / "README.md"}.union(*map(_outside, pages)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
        _homes[name] = path.parent
    return files


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links between docs/ and the rest of the repository."""
    name = page.file.src_uri
    home = _homes.get(name, Path(config.docs_dir))
    up = "../" * name.count("/")

    def rewritten(link: re.Match[str]) -> str:
        target = (home / link["path"]).resolve()
        inside = target.is_relative_to(config.docs_dir)
        if not target.is_file() or not target.is_relative_to(ROOT):
            return link[0]
        place = target.relative_to(config.docs_dir if inside else ROOT).as_posix()
        return f"]({up}{place}{link['anchor'] or ''})"

    return LINK.sub(rewritten, markdown)
