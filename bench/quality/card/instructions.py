"""The rules of MMAU-Pro's instruction-following questions: whether an answer has the requested form.

A rule gets the answer and the row's values: N, N1 and N2 (counts), keyword, keywords and forbidden_words (separated by
", "), postscript_marker, section_splitter, start_phrase, end_phrase, and the question as `prompt`.

One difference from the benchmark's script: sentences end at . ! or ? before white space, while the script uses NLTK's
tokenizer, which recognizes abbreviations.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

Values = Mapping[str, Any]
Rule = Callable[[str, Values], bool]


def keeps(rule: str, answer: str, values: Values) -> bool:
    """Whether the answer follows the rule, a key of `RULES`."""
    return RULES[rule](answer, values)


def _words(answer: str) -> int:
    return len(answer.split())


def _sentences(answer: str) -> int:
    return len([part for part in re.split(r"(?<=[.!?])\s+", answer) if part.strip()])


def _paragraphs(answer: str) -> int:
    return len([part for part in answer.split("***") if part.strip()])


def _bullets(answer: str) -> int:
    return len(re.findall(r"^\s*\*\s+", answer, re.MULTILINE))


def _highlights(answer: str) -> int:
    return len(re.findall(r"\*[^*]+\*", answer))


def _placeholders(answer: str) -> int:
    return len(re.findall(r"\[[^\]]+\]", answer))


def _capitals(answer: str) -> int:
    return sum(word.isupper() for word in answer.split())


def _exactly(count: Callable[[str], int]) -> Rule:
    return lambda answer, values: count(answer) == values.get("N", 0)


def _at_least(count: Callable[[str], int]) -> Rule:
    return lambda answer, values: count(answer) >= values.get("N", 0)


def _at_most(count: Callable[[str], int]) -> Rule:
    return lambda answer, values: count(answer) <= values.get("N", 0)


def _between(count: Callable[[str], int]) -> Rule:
    return lambda answer, values: values.get("N1", 0) <= count(answer) <= values.get("N2", 999)


def _listed(values: Values, name: str) -> list[str]:
    return [word.lower() for word in str(values.get(name, "")).split(", ")]


def _has_keywords(answer: str, values: Values) -> bool:
    return all(word in answer.lower() for word in _listed(values, "keywords"))


def _has_no_forbidden_words(answer: str, values: Values) -> bool:
    return not any(word in answer.lower() for word in _listed(values, "forbidden_words"))


def _repeats_keyword(answer: str, values: Values) -> bool:
    keyword = re.escape(str(values.get("keyword", "")).lower())
    return len(re.findall(rf"\b{keyword}\b", answer.lower())) == values.get("N", 0)


def _letters(text: str, kept: str = "") -> str:
    return re.sub(rf"[^a-zA-Z{kept}]", "", text).lower()


def _has_postscript(answer: str, values: Values) -> bool:
    return _letters(str(values.get("postscript_marker", ""))) in _letters(answer)


def _starts(answer: str, values: Values) -> bool:
    return _letters(answer, " ").startswith(_letters(str(values.get("start_phrase", "")), " "))


def _ends(answer: str, values: Values) -> bool:
    return _letters(answer, " ").endswith(_letters(str(values.get("end_phrase", "")), " "))


def _has_sections(answer: str, values: Values) -> bool:
    splitter = str(values.get("section_splitter", ""))
    parts = answer.split(splitter) if splitter else [answer]
    return len([part for part in parts if part.strip()]) == values.get("N", 0)


def _repeats_prompt(answer: str, values: Values) -> bool:
    return answer.strip().lower().startswith(str(values.get("prompt", "")).strip().lower())


def _is_two_responses(answer: str, _values: Values) -> bool:
    parts = [part.strip().lower() for part in answer.split("******")]
    return len(parts) == 2 and parts[0] != parts[1]


def _is_quoted(answer: str, _values: Values) -> bool:
    return answer.strip().startswith('"') and answer.strip().endswith('"')


RULES: Mapping[str, Rule] = {
    "Include Keywords": _has_keywords,
    "Keyword Frequency": _repeats_keyword,
    "Forbidden Words": _has_no_forbidden_words,
    "Number Paragraphs": _exactly(_paragraphs),
    "Number Words (at least)": _at_least(_words),
    "Number Words (at most)": _at_most(_words),
    "Number Words (range)": _between(_words),
    "Number Sentences (at least)": _at_least(_sentences),
    "Number Sentences (at most)": _at_most(_sentences),
    "Number Sentences (range)": _between(_sentences),
    "Postscript": _has_postscript,
    "Number Placeholder": _at_least(_placeholders),
    "Number Bullets": _exactly(_bullets),
    "Title": lambda answer, _: re.search(r"<<[^>]+>>", answer) is not None,
    "Minimum Number Highlighted Section": _at_least(_highlights),
    "Multiple Sections": _has_sections,
    "Repeat Prompt": _repeats_prompt,
    "Two Responses": _is_two_responses,
    "All Uppercase": lambda answer, _: answer.isupper(),
    "All Lowercase": lambda answer, _: answer.islower(),
    "All-capital Words (at least)": _at_least(_capitals),
    "All-capital Words (at most)": _at_most(_capitals),
    "All-capital Words (range)": _between(_capitals),
    "Start Checker": _starts,
    "End Checker": _ends,
    "Quotation": _is_quoted,
    "No Commas": lambda answer, _: "," not in answer,
}
