"""What a reply is worth: word errors, choices, instructions, ratings of a judge, BLEU, and the intervals of each."""

import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jiwer
import pytest

from afnext.bench.quality.card import scoring
from afnext.bench.quality.card.instructions import RULES, keeps
from afnext.bench.quality.card.judge import Judge, JudgeError
from afnext.bench.quality.card.mmau_pro import InstructionItem
from afnext.bench.quality.card.scoring import (
    bleu_counts,
    bleu_with_bounds,
    edits,
    match_with_bounds,
    mean_with_bounds,
    string_match,
    wer_with_bounds,
    whisper_words,
)
from afnext.bench.quality.data import Item


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("(A) a red car", True),
        ("The sound is of a RED car!", True),
        ("a red car or a blue car", False),
        ("car", False),
        ("blue", False),
        ("", False),
        ("red", False),
    ],
)
def test_mmaus_string_match(prediction: str, right: bool) -> None:
    assert string_match("a red car", prediction, ("a red car", "a blue car", "a horse")) is right


@pytest.mark.parametrize(
    ("reply", "figure"),
    [("D", "1"), ("(D) American", "1"), ("The answer is D.", "1"), ("American", "1"), ("A", "0"), ("A or D", "0")],
)
def test_mmsu_takes_the_choice_that_is_named(reply: str, figure: str) -> None:
    item = Item(1, "", None, "", "American", "Which accent?", ("Irish", "Scottish", "Canadian", "American"))
    assert scoring.letters().figure(item, reply, None) == figure


def test_edits_are_those_of_another_implementation(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(30):
        reference, hypothesis = (generator.choices("abcd", k=generator.randint(1, 9)) for _ in range(2))
        output = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
        assert edits(reference, hypothesis) == output.substitutions + output.deletions + output.insertions


def test_whispers_normalizer_decides_what_counts_as_an_error() -> None:
    assert whisper_words("Mr. Brown, uh, twenty-one colours!") == ["mister", "brown", "21", "colors"]


def test_bleu_is_sacrebleus_over_the_corpus(seed: int) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    generator = random.Random(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", ",", "while", "it", "rained", "."]
    references = [" ".join(generator.choices(words, k=12)) for _ in range(20)]
    replies = [" ".join(w for w in line.split() if generator.random() < 0.8) for line in references]
    found = bleu_with_bounds([bleu_counts(a, b) for a, b in zip(references, replies, strict=True)])
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(replies, [references]).score)
    assert found["bleu_low"] < found["bleu"] < found["bleu_high"]


def test_bleu_cuts_chinese_and_japanese_into_characters() -> None:
    pytest.importorskip("sacrebleu")
    for code in ("zh-CN", "ja"):
        item = Item(1, "", None, "", "今天下雨了吗")
        figure = scoring.translations("English", "Chinese", code).figure(item, "今天下雪了吗", None)
        assert figure.split()[0] == "5", "of six characters"


def test_intervals_hold_the_figure_and_narrow_with_more_items() -> None:
    few, many = wer_with_bounds(["1/10", "0/10"] * 5), wer_with_bounds(["1/10", "0/10"] * 500)
    assert few["wer"] == many["wer"] == 0.05
    assert few["wer_low"] <= 0.05 <= few["wer_high"]
    assert many["wer_high"] - many["wer_low"] < few["wer_high"] - few["wer_low"]
    share = match_with_bounds(["1", "1", "0", "1"])
    assert share["match"] == 0.75
    assert 0 < share["match_low"] < 0.75 < share["match_high"] < 1
    mean = mean_with_bounds(["1", "0.5", "0", "0.7"])
    assert mean["score"] == pytest.approx(0.55)
    assert 0 <= mean["score_low"] < 0.55 < mean["score_high"] <= 1
    assert wer_with_bounds([]) == {"wer": None}
    assert match_with_bounds([]) == {"match": None}
    assert mean_with_bounds([]) == {"score": None}
    assert bleu_with_bounds([]) == {"bleu": None}


KEPT: dict[str, tuple[dict[str, Any], str, str]] = {  # rule: values, an answer that keeps it, one that does not
    "Include Keywords": ({"keywords": "rain, wind"}, "Wind and rain.", "Only rain."),
    "Keyword Frequency": ({"keyword": "rain", "N": 2}, "Rain, rain; brain.", "Rain."),
    "Forbidden Words": ({"forbidden_words": "rain, wind"}, "Snow.", "Windy."),
    "Number Paragraphs": ({"N": 2}, "One. *** Two.", "One. ***"),
    "Number Words (at least)": ({"N": 3}, "one two three", "one two"),
    "Number Words (at most)": ({"N": 2}, "one two", "one two three"),
    "Number Words (range)": ({"N1": 2, "N2": 3}, "one two", "one two three four"),
    "Number Sentences (at least)": ({"N": 2}, "It rains. It pours!", "It rains."),
    "Number Sentences (at most)": ({"N": 1}, "It rains at 3.5 degrees.", "It rains. It pours."),
    "Number Sentences (range)": ({"N1": 2, "N2": 2}, "One? Two.", "One."),
    "Postscript": ({"postscript_marker": "P.S."}, "Rain. P.S. wind", "Rain and wind"),
    "Number Placeholder": ({"N": 2}, "Dear [name] of [place]", "Dear [name]"),
    "Number Bullets": ({"N": 2}, "* rain\n* wind", "* rain\n* wind\n* snow"),
    "Title": ({}, "<<Rain>> falls", "Rain falls"),
    "Minimum Number Highlighted Section": ({"N": 1}, "some *rain* fell", "some rain fell"),
    "Multiple Sections": ({"N": 2, "section_splitter": "Part"}, "Part 1: a Part 2: b", "Part 1: a"),
    "Repeat Prompt": ({"prompt": "What falls?"}, "what falls? Rain.", "Rain."),
    "Two Responses": ({}, "Rain.******Snow.", "Rain.******rain. "),
    "All Uppercase": ({}, "RAIN 3", "Rain"),
    "All Lowercase": ({}, "rain 3", "Rain"),
    "All-capital Words (at least)": ({"N": 1}, "RAIN falls", "Rain falls"),
    "All-capital Words (at most)": ({"N": 1}, "RAIN falls", "RAIN FALLS"),
    "All-capital Words (range)": ({"N1": 1, "N2": 1}, "RAIN falls", "rain falls"),
    "Start Checker": ({"start_phrase": "I hear:"}, "i hear rain", "Rain, I hear"),
    "End Checker": ({"end_phrase": "That is all."}, "Rain. That is all", "That is all. Rain"),
    "Quotation": ({}, ' "Rain." ', '"Rain."!'),
    "No Commas": ({}, "rain and wind", "rain, wind"),
}


@pytest.mark.parametrize("rule", RULES)
def test_an_instruction_is_kept_or_not(rule: str) -> None:
    values, kept, broken = KEPT[rule]
    assert keeps(rule, kept, values)
    assert not keeps(rule, broken, values)


@pytest.fixture
def judge() -> Iterator[Judge]:
    """A judge that gives what the reply says, as ratings."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = json.loads(asked["messages"][0]["content"].splitlines()[-1])["reply"]
            body = json.dumps({"choices": [{"message": {"content": f"```json\n{reply}\n```"}}]}).encode()
            self.send_response(200 if asked["model"] == "strict" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield Judge(f"http://127.0.0.1:{server.server_port}/v1", "strict")
        server.shutdown()
        thread.join()


def test_a_judges_ratings_are_averaged(judge: Judge) -> None:
    ratings = {"correctness": 5, "relevance": 4, "completeness": 2, "clarity": 5}
    assert judge.score("What?", "Rain.", json.dumps(ratings)) == 0.8
    for wrong in ({**ratings, "clarity": 6}, {"correctness": 5}, "fine"):
        with pytest.raises(JudgeError, match="gave no ratings"):
            judge.score("What?", "Rain.", json.dumps(wrong))
    with pytest.raises(JudgeError, match="did not answer: HTTP Error 404"):
        Judge(judge.url, "another").score("What?", "Rain.", "")
    with pytest.raises(JudgeError, match="no http"):
        Judge("file:///etc", "strict").score("What?", "Rain.", "")


def test_each_kind_of_mmau_pro_has_its_own_scoring(judge: Judge) -> None:
    figure, audio = scoring.mixed().figure, Path("a.wav")
    choice = Item(1, "", audio, "", "a man", "Who?", ("a man", "a child"))
    unbound = Item(2, "", audio, "", "Rain.", "What falls?")
    rule = InstructionItem(3, "", audio, "", "", "Be brief.", rule="Number Words (at most)", values={"N": 2})
    ratings = json.dumps(dict.fromkeys(("correctness", "relevance", "completeness", "clarity"), 4))
    assert (figure(choice, "A man.", None), figure(choice, "A child.", None)) == ("1", "0")
    assert (figure(rule, "It rains", None), figure(rule, "It rains a lot", None)) == ("1", "0")
    assert (figure(unbound, "Rain.", None), figure(unbound, ratings, judge)) == (scoring.UNSCORED, "0.8000")
