"""`afnext bench card`: the figures of the model card and article, from the published datasets.

Schemes are loaded one at a time; the engine answers questions in batches, greedily. Rows are written as they are
finished, to one CSV per dataset and scheme, so an interrupted run can continue. A figure is shown with its 95 %
confidence interval, the prompt, the scoring, and the published figure.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ....kernels.errors import AfnextError
from ....runtime.app.api import Model, load
from ...core.machine import machine
from ...core.record import SCHEMES, Record, recipe_of
from ..answers import Answered, score_items
from ..data import Item, Items
from .judge import Judge
from .published import DATASETS, NAMES, Dataset
from .scoring import UNSCORED, Scoring


@dataclass(frozen=True)
class Figure:
    """One row of the table: the result with its interval."""

    dataset: Dataset
    scheme: str
    record: Record

    @property
    def interval(self) -> tuple[float, float, float] | None:
        """The result and the bounds of its interval on the published scale; None if nothing was scored."""
        scoring, values = self.dataset.scoring, self.record.values
        found = [values.get(f"{scoring.metric}{bound}") for bound in ("", "_low", "_high")]
        if None in found:
            return None
        result, low, high = (scoring.percent * float(value) for value in found if value is not None)
        return result, low, high


def run_card(
    name: str,
    source: str | Path,
    out: Path,
    *,
    model: str,
    device: str = "auto",
    schemes: Sequence[str] = ("bf16",),
    batch: int = 8,
    limit: int | None = None,
    max_new_tokens: int = 512,
    judge: Judge | None = None,
    restart: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Figure]:
    """Score `model` on the dataset `name`, a key of `DATASETS`. source: a copy of it, or "hub" (see `Dataset.read`).

    out: folder for NAME-SCHEME.csv and .jsonl; schemes: of `record.SCHEMES`; batch: questions at once; limit: only the
    first items; judge: of open answers, which are unscored without it; restart: drop existing rows. Raises AfnextError
    for unknown names, ManifestError for an incomplete copy, ResultsError for rows of another model.
    """
    if name not in DATASETS:
        raise AfnextError(f"unknown dataset {name!r}; choose from {', '.join(NAMES)}")
    unknown = [scheme for scheme in schemes if scheme not in SCHEMES]
    if unknown:
        raise AfnextError(f"unknown scheme {', '.join(unknown)}; choose from {', '.join(SCHEMES)}")
    dataset = DATASETS[name]
    scoring = dataset.scoring
    scoring.check()  # a missing package should fail before the first answer
    items = _as_scored(dataset.read(source, out / f"{name}-audio"), scoring, judge)
    items = items if limit is None else replace(items, items=items.items[:limit])
    case = {"dataset": name, "prompt": scoring.prompt, "scoring": scoring.rule, "left_out": items.left_out}
    figures = []
    for scheme in schemes:
        with load(model, device=device, dtype=SCHEMES[scheme], quant=recipe_of(scheme)) as loaded:
            record = score_items(
                loaded,
                items,
                out / f"{name}-{scheme}.csv",
                partial(answered, scoring, judge),
                summary=partial(_summary, scoring),
                case={**case, "scheme": scheme, "judge": judge.model if judge else ""},
                batch=batch,
                max_new_tokens=max_new_tokens,
                restart=restart,
                machine=machine(),
                progress=progress,
            )
        figures.append(Figure(dataset, scheme, record))
    return figures


def _as_scored(items: Items, scoring: Scoring, judge: Judge | None) -> Items:
    """The items, with the scoring in their fingerprint, so that rows with another scoring are not continued."""
    how = f"{items.fingerprint} {scoring.prompt} {scoring.rule} {judge.model if judge else ''}"
    return replace(items, fingerprint=hashlib.sha256(how.encode()).hexdigest()[:16])


def answered(
    scoring: Scoring, judge: Judge | None, model: Model, items: Sequence[Item], max_new_tokens: int
) -> list[Answered]:
    """Replies to several questions at once, each with its figure."""
    conversations = [
        [{"role": "user", "content": [*_recordings(item), {"type": "text", "text": scoring.ask(model.prompts, item)}]}]
        for item in items
    ]
    replies = model.chat(conversations, temperature=0.0, max_new_tokens=max_new_tokens)
    return [
        {
            "figure": scoring.figure(item, answer.text, judge),
            "question": item.question,
            "reply": answer.text,
            "reference": item.text,
            "category": item.groups.get("category", ""),
            "finish_reason": answer.finish_reason,
        }
        for item, answer in zip(items, replies, strict=True)
    ]


def _recordings(item: Item) -> list[dict[str, Any]]:
    return [{"type": "audio", "audio": str(path)} for path in (item.audio, *item.more_audio) if path is not None]


def _summary(scoring: Scoring, figures: Sequence[str]) -> dict[str, Any]:
    scored = [figure for figure in figures if figure != UNSCORED]
    return {**scoring.summary(scored), "unscored": len(figures) - len(scored)}


def show(figures: Sequence[Figure], console: Console) -> None:
    """Print the table, then prompts and scoring."""
    columns = ("dataset", "scheme", "items", "failed", "unscored", "here", "95 % interval", "published")
    table = Table(*columns, box=None, pad_edge=False)
    for figure in figures:
        values, interval = figure.record.values, figure.interval
        here = "" if interval is None else f"{interval[0]:.2f}"
        bounds = "" if interval is None else f"{interval[1]:.2f} to {interval[2]:.2f}"
        counts = (str(values[name]) for name in ("items", "failed", "unscored"))
        table.add_row(figure.dataset.name, figure.scheme, *counts, here, bounds, figure.dataset.published)
    console.print(table)
    for figure in {figure.dataset.name: figure for figure in figures}.values():
        scoring, left_out = figure.dataset.scoring, figure.record.case["left_out"]
        console.print(
            f"\n{figure.dataset.name}. Prompt: {scoring.prompt}. Scoring: {scoring.rule}. Decoding is greedy."
        )
        if left_out:
            console.print(f"{left_out} rows without choices are left out, as by the benchmark's own script.")
