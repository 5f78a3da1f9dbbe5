"""Scores replies: word error rate, right choices, followed instructions, ratings of a judge, BLEU.

A figure is the string in a row of results that scores one reply. A summary reads the figures of all rows and gives the
result with its 95 % interval.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from ....kernels.errors import AfnextError
from ....runtime.app.prompts import Prompts
from ..data import Item, choice_prompt, match_choice
from .instructions import keeps
from .judge import Judge
from .mmau_pro import InstructionItem

UNSCORED = ""
Figures = Sequence[str]
_DRAWS = 1000
_LOW, _HIGH = 0.025, 0.975
_JAPANESE, _CHINESE = "ja", "zh-CN"


@dataclass(frozen=True)
class Scoring:
    """The prompt and scoring of one dataset.

    metric: the name of the result among the values of a record, whose bounds are METRIC_low and METRIC_high; percent:
    the value of a result of 1 on the published scale; prompt, rule: both in words; ask: the text of a question; figure:
    of an item's reply, with the judge if there is one, or UNSCORED; summary: of all figures; check: raises AfnextError
    if a package is missing.
    """

    metric: str
    percent: float
    prompt: str
    rule: str
    ask: Callable[[Prompts, Item], str]
    figure: Callable[[Item, str, Judge | None], str]
    summary: Callable[[Figures], dict[str, Any]]
    check: Callable[[], object] = lambda: None


def transcripts() -> Scoring:
    """Word error rate after Whisper's normalizer."""
    return Scoring(
        "wer",
        100.0,
        "the checkpoint's transcription prompt",
        "word error rate, Whisper's English normalizer on both sides",
        lambda prompts, item: prompts.get("asr"),
        _errors,
        wer_with_bounds,
        partial(whisper_words, ""),
    )


def choices() -> Scoring:
    """MMAU's string match."""
    rule = (
        "MMAU's string match on the answer without its thinking: every word of the right choice, no word of another "
        "alone"
    )
    return Scoring("match", 100.0, _LETTERED, rule, _lettered, _matched, match_with_bounds)


def letters() -> Scoring:
    """The choice that a reply names by its letter, its text or both, as MMSU asks for."""
    rule = "the choice that the reply names, by letter, text or both; a reply that names none or several is wrong"
    return Scoring("match", 100.0, _LETTERED, rule, _lettered, _named, match_with_bounds)


def mixed() -> Scoring:
    """MMAU-Pro's three kinds, each reply from 0 to 1."""
    rule = (
        "the mean of: right choices by MMAU's string match (the benchmark's script: by the similarity of NV-Embed-v2); "
        "kept instructions by its rules; open answers by a judge's mean rating from 1 to 5, divided by 5 (the script: "
        "of Qwen2.5-7B-Instruct), unscored without --judge"
    )
    prompt = "the question; where it has choices, also 'Choose the correct option ...' and the lettered choices"
    return Scoring("score", 100.0, prompt, rule, _lettered, _mixed, mean_with_bounds)


def judged() -> Scoring:
    """Ratings of a judge."""
    rule = "a judge's mean rating from 1 to 5, divided by 5; unscored without --judge"
    return Scoring("score", 100.0, "the question", rule, _lettered, _judged, mean_with_bounds)


def translations(source: str, target: str, code: str) -> Scoring:
    """BLEU of translations between languages given by name. code: the target's, which selects the tokenizer."""
    tokenizer = {_JAPANESE: "char", _CHINESE: "zh"}.get(code, "13a")
    return Scoring(
        "bleu",
        1.0,
        f"the card's translation prompt, from {source} into {target}",
        f"corpus BLEU by sacreBLEU, tokenizer {tokenizer}, case-sensitive",
        lambda prompts, item: prompts.get("ast", source=source, to=target),
        lambda item, reply, judge: bleu_counts(item.text, reply, tokenizer),
        bleu_with_bounds,
        partial(_bleu, tokenizer),
    )


_LETTERED = "the question, 'Choose the correct option from the following options:', and lettered choices"


def _lettered(prompts: Prompts, item: Item) -> str:
    return choice_prompt(item.question, item.choices) if item.choices else item.question


def _errors(item: Item, reply: str, judge: Judge | None) -> str:
    reference, hypothesis = whisper_words(item.text), whisper_words(reply)
    return f"{edits(reference, hypothesis)}/{len(reference)}"


def _matched(item: Item, reply: str, judge: Judge | None) -> str:
    return str(int(string_match(item.text, reply, item.choices)))


def _named(item: Item, reply: str, judge: Judge | None) -> str:
    found = match_choice(reply, item.choices)
    return str(int(found is not None and item.choices[found] == item.text))


def _judged(item: Item, reply: str, judge: Judge | None) -> str:
    return UNSCORED if judge is None else f"{judge.score(item.question, item.text, reply):.4f}"


def _mixed(item: Item, reply: str, judge: Judge | None) -> str:
    if isinstance(item, InstructionItem):
        return str(int(keeps(item.rule, reply, item.values)))
    return _matched(item, reply, judge) if item.choices else _judged(item, reply, judge)


def string_match(answer: str, prediction: str, choices: Sequence[str]) -> bool:
    """Whether the prediction has every word of the answer, and no word that only other choices have.

    Words are runs of letters, digits and underscores in lower case, as in MMAU's evaluation.
    """
    said, right = _words(prediction), _words(answer)
    others: set[str] = set()
    for choice in choices:
        others |= _words(choice) - right
    return bool(said) and right <= said and not others & said


def _words(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))


def whisper_words(text: str) -> list[str]:
    """The words of an English text after Whisper's normalizer. Raises AfnextError if it is not installed."""
    return str(_normalizer()(text)).split()


@cache
def _normalizer() -> Callable[[str], str]:
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise AfnextError(
            "the card's word error rates need Whisper's normalizer: pip install whisper-normalizer"
        ) from None
    normalizer: Callable[[str], str] = EnglishTextNormalizer()
    return normalizer


def edits(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Substitutions, deletions and insertions from the reference to the hypothesis (Levenshtein 1966)."""
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(hypothesis, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def bleu_counts(reference: str, reply: str, tokenizer: str = "13a") -> str:
    """BLEU's counts for one reply: matching and all n-grams of 1 to 4 words, words of the reply and the reference.

    tokenizer: one of sacreBLEU's. Raises AfnextError if sacreBLEU is not installed.
    """
    score = _bleu(tokenizer).sentence_score(reply, [reference])
    return " ".join(str(int(count)) for count in (*score.counts, *score.totals, score.sys_len, score.ref_len))


@cache
def _bleu(tokenizer: str) -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise AfnextError("BLEU needs sacreBLEU: run `pip install '.[card]'` in a checkout of afnext") from None
    return BLEU(tokenize=tokenizer, effective_order=True)


def wer_with_bounds(figures: Figures) -> dict[str, Any]:
    """Word error rate over all words, with an interval by bootstrap over utterances."""
    counts = [(int(errors), int(words)) for errors, _, words in (figure.partition("/") for figure in figures)]
    total = sum(words for _, words in counts)
    if not total:
        return {"wer": None}
    generator = random.Random(0)
    drawn = sorted(_rate(generator.choices(counts, k=len(counts))) for _ in range(_DRAWS))
    return {"wer": _rate(counts), **_bounds("wer", drawn), "words": total}


def _rate(counts: Sequence[tuple[int, int]]) -> float:
    words = sum(words for _, words in counts)
    return sum(errors for errors, _ in counts) / words if words else 0.0


def _bounds(metric: str, drawn: Sequence[float]) -> dict[str, float]:
    """The interval of a result, from its values in sorted draws."""
    last = len(drawn) - 1
    return {f"{metric}_low": drawn[round(_LOW * last)], f"{metric}_high": drawn[round(_HIGH * last)]}


def match_with_bounds(figures: Figures) -> dict[str, Any]:
    """Share of right answers, with its interval (Wilson 1927)."""
    total, right, z = len(figures), figures.count("1"), 1.96
    if not total:
        return {"match": None}
    share = right / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    reach = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return {"match": share, "match_low": centre - reach, "match_high": centre + reach, "right": right}


def mean_with_bounds(figures: Figures) -> dict[str, Any]:
    """Mean of scores from 0 to 1, with an interval by bootstrap over answers."""
    if not figures:
        return {"score": None}
    scores = np.array(figures, dtype=np.float64)
    generator = np.random.default_rng(0)
    drawn = sorted(float(generator.choice(scores, len(scores)).mean()) for _ in range(_DRAWS))
    return {"score": float(scores.mean()), **_bounds("score", drawn)}


def bleu_with_bounds(figures: Figures) -> dict[str, Any]:
    """BLEU of the corpus, 0 to 100, with an interval by bootstrap over utterances."""
    if not figures:
        return {"bleu": None}
    counts = np.array([figure.split() for figure in figures], dtype=np.int64)
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(_DRAWS):
        times = np.bincount(generator.integers(len(counts), size=len(counts)), minlength=len(counts))
        drawn.append(_corpus_bleu(times @ counts))
    return {"bleu": _corpus_bleu(counts.sum(0)), **_bounds("bleu", sorted(drawn))}


def _corpus_bleu(counts: "np.ndarray[Any, np.dtype[np.int64]]") -> float:
    found, totals, (said, wanted) = counts[:4].tolist(), counts[4:8].tolist(), counts[8:].tolist()
    return float(_bleu("13a").compute_bleu(found, totals, sys_len=said, ref_len=wanted, smooth_method="exp").score)
