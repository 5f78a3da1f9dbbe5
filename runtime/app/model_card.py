"""The model card of a quantized checkpoint: README.md with the front matter that the Hub reads."""

import re
from collections import Counter
from pathlib import Path

from ...quant.recipe import Recipe
from ...quant.scheme import PARTS as PACKED_PARTS
from ..checkpoint_folder import CheckpointFolder
from ..errors import CheckpointError, OutputError
from ..files import output_file
from ..model.checkpoint import Checkpoint
from ..model.hub import HUB_NAME, SHORT_NAMES
from ..model.parameters import PARTS, part_of

FILE = "README.md"
SOURCE_FILE = "README-source.md"
"""The file name of the source's card."""

_MAX_CARD_BYTES = 1 << 20
_LICENSE = re.compile(r"(license|license_name|license_link): *(\S[^\n]{0,200})")


def write_card(out: Path, source: str, files: CheckpointFolder, recipe: Recipe, measured: str | None = None) -> None:
    """Write the card of the weights in `out`, which must exist.

    source: the name given by the user; files: its texts; recipe: with the hash of its weights; measured: measured
    losses, in Markdown. Raises OutputError if it cannot be written.
    """
    text = _card(out, SHORT_NAMES.get(source, source), files, recipe, measured)
    with output_file(out / FILE, OutputError) as file:
        file.write(text.encode())


def _card(out: Path, source: str, files: CheckpointFolder, recipe: Recipe, measured: str | None) -> str:
    repository = source.partition(":")[0]
    is_known = bool(HUB_NAME.fullmatch(repository)) and not Path(source).exists()
    link = (
        f"[{repository}](https://huggingface.co/{repository})" if is_known else f"`{_code(source.rpartition('/')[2])}`"
    )
    stated = _license(files)
    front = [f"{key}: {value}" for key, value in stated.items()]
    terms = f"It is stated there as `{_code(stated['license'])}`." if "license" in stated else "Look it up there."
    lines = [
        "---",
        "library_name: afnext",
        *([f"base_model: {repository}"] if is_known else []),
        *front,
        "pipeline_tag: audio-text-to-text",
        "tags: [afnext, audio-flamingo, quantized]",
        "---",
        "",
        f"# {_code((repository if is_known else source).rstrip('/').rpartition('/')[2])}, {_code(recipe.name)}",
        "",
        f"{link} with its weights packed by afnext, recipe `{_code(recipe.name)}`.",
        "Everything that running it needs is in this folder:",
        "",
        "```console",
        '$ afnext ask talk.mp3 "What is it about?" -m FOLDER_OR_NAME',
        "```",
        "",
        *_parts(Checkpoint.open(out), recipe),
        "",
        f"SHA-256 of the source's weights: `{recipe.source}`",
        "",
        "## Measured loss",
        "",
        measured.strip() if measured else "Not measured. `afnext bench quantization` measures it.",
        "",
        "## Licence",
        "",
        f"The licence of the source holds for these weights. {terms}",
    ]
    if files.has(FILE):
        lines += ["", f"The card of the source is [{SOURCE_FILE}]({SOURCE_FILE})."]
    return "\n".join([*lines, ""])


def _parts(weights: Checkpoint, recipe: Recipe) -> list[str]:
    """A table of the parts of the model, their schemes and bytes."""
    sizes: Counter[str] = Counter()
    schemes: dict[str, set[str]] = {}
    for name in weights.names:
        layer, _, leaf = name.rpartition(".")
        sizes[part_of(name)] += weights.stored_bytes(name)
        if leaf == PACKED_PARTS[0]:
            schemes.setdefault(part_of(name), set()).add(str(recipe.scheme(layer)))
    rows = [(part, ", ".join(sorted(schemes.get(part, {"dense"}))), sizes[part]) for part in PARTS if sizes[part]]
    rows.append(("all", "", sum(sizes.values())))
    return ["| part | scheme | bytes |", "| --- | --- | ---: |", *(f"| {a} | {b} | {c:,} |" for a, b, c in rows)]


def _license(files: CheckpointFolder) -> dict[str, str]:
    """The licence fields in the front matter of the source's card."""
    try:
        text = files.text(FILE, _MAX_CARD_BYTES) or ""
    except CheckpointError:
        return {}
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    lines = found[1].splitlines() if found else ()
    return {match[1]: match[2] for line in lines if (match := _LICENSE.fullmatch(line.rstrip()))}


def _code(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
