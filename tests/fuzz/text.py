"""Hostile texts through a checkpoint's tokenizer, and chat templates put together from fragments and mutated.

The right outcome is an AfnextError, or a prompt in which texts hold no control token and whose ids decode to the text.
"""

import contextlib
import json
import random
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from support.tokenizers import AFNEXT_ORDER, CHAT_TEMPLATE, unpack_shared, write_checkpoint_texts

from afnext.kernels.errors import AfnextError
from afnext.runtime.io import chat_template
from afnext.runtime.io.chat_template import PromptTemplate
from afnext.runtime.io.prompt import build_prompt
from afnext.runtime.io.tokenizer import Tokenizer

SECONDS = 60.0
chat_template.RENDER_SECONDS = 1.0
MEGABYTES = 1500

PIECES = [
    *AFNEXT_ORDER,
    *("<so", "und>", "<|im_", "end|>", "<think>", "</think>", "{{ 1 }}", "{% for %}", "\n", "\r\n", "  ", "\t", "\0"),
    *("\ufdfa", "e\u0301", "\u0340" * 8, "👩‍👩‍👧", "\U000f0000", "\ue000", "\ud800", "\u202e", "ﬁ", "İ", "ß", "1" * 30),
]
TEMPLATES = [
    CHAT_TEMPLATE,
    "{% macro f(m, n) %}{% if n %}{{ m.role }}{{ f(m, n - 1) }}{% endif %}{% endmacro %}{{ f(messages[0], 5) }}",
    "{% for m in messages recursive %}{{ m.role ~ '<sound>' }}{% if loop.first %}{{ loop(messages[1:]) }}{% endif %}"
    "{% endfor %}",
    "{% set n = namespace(v='a', l=[]) %}{% for i in range(20) %}{% set n.v = n.v ~ n.v %}{% set n.l = [n.l, n.l] %}"
    "{% endfor %}{{ n.v }}{{ n.l | tojson }}",
]
VALUES = [
    *(
        "messages",
        "messages[0]",
        "messages[0].content",
        "n.v",
        "n.l",
        "n",
        "loop",
        "m",
        "i",
        "''",
        "'<sound>'",
        "10 ** 6",
    ),
    *("-1", "2 ** 70", "1e308", "none", "[]", "{}", "[messages, messages]", "range(99999)", "'x' * 99999", "self", "f"),
]
FILTERS = [
    *(
        "tojson",
        "list",
        "join('x' * 999)",
        "replace('', 'y' * 999)",
        "indent(999)",
        "sort",
        "map('string')",
        "sum",
        "int",
    ),
    *(
        "dictsort",
        "unique | list",
        "reverse",
        "string",
        "upper",
        "selectattr('role')",
        "first",
        "last",
        "length",
        "min",
    ),
]
STATEMENTS = [
    *(
        "{{ V | F }}",
        "{{ V }}",
        "{{ V ~ V }}",
        "{{ V + V }}",
        "{{ V * V }}",
        "{{ V == V }}",
        "{{ V in V }}",
        "{{ V[1:] }}",
    ),
    *("{% for m in V %}S{% endfor %}", "{% for i in V recursive %}S{{ loop(V) }}{% endfor %}", "{% set n = V %}"),
    *("{% set n = namespace(v=V, l=V) %}", "{% set n.v = V %}", "{% set n.l = [n.l, V] %}", "{% if V %}S{% endif %}"),
    *("{% macro f(m) %}S{% endmacro %}", "{{ f(V) }}", "{% set n %}S{% endset %}", "{% filter F %}S{% endfilter %}"),
]


def check(data: bytes) -> None:
    """`data`: JSON with `messages`, `template` and `real`, which says whether to use the shared vocabulary."""
    case = json.loads(data)
    tokenizer = tokenizer_of(case["real"])
    with contextlib.suppress(AfnextError):
        template = PromptTemplate(case["template"])
        messages = case["messages"]
        parts = [part for message in messages for part in message["content"] if part["type"] == "audio"]
        prompt = build_prompt(messages, [3] * len(parts), tokenizer, template)
        assert prompt.token_ids.count(tokenizer.audio_token_id) == 3 * len(parts)
    for message in case["messages"]:
        for part in message["content"]:
            with contextlib.suppress(AfnextError):
                ids = tokenizer.encode(part.get("text", ""))
                assert not set(tokenizer.added_tokens.values()) & set(ids)


@cache
def tokenizer_of(real: bool) -> Tokenizer:
    shared = Path(__file__).parents[3] / "shared" / "data"
    with tempfile.TemporaryDirectory() as folder:
        if real and shared.exists():
            return Tokenizer.from_folder(unpack_shared(shared, "afnextA", Path(folder) / "real"))
        return Tokenizer.from_folder(write_checkpoint_texts(Path(folder)))


def cases(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    tokenizer_of(False)  # once for all the children
    while True:
        template, how = (CHAT_TEMPLATE, "text") if rng.random() < 0.4 else (hostile_template(rng), "template")
        messages = [
            {"role": rng.choice(("system", "user", "assistant")), "content": content(rng)}
            for _ in range(rng.choice((1, 1, 2, 5)))
        ]
        real = how == "text" and rng.random() < 0.1
        yield how, json.dumps({"messages": messages, "template": template, "real": real}).encode()


def content(rng: random.Random) -> list[dict[str, str]]:
    parts = [{"type": "text", "text": text(rng)} for _ in range(rng.choice((1, 1, 2, 8)))]
    return [{"type": "audio"}, *parts] if rng.random() < 0.5 else parts


def text(rng: random.Random) -> str:
    made = "".join(rng.choice(PIECES) for _ in range(rng.choice((1, 5, 40))))
    if rng.random() < 0.2:
        made += rng.choice(PIECES) * rng.choice((100, 1_000, 1_000, 10_000))
    if rng.random() < 0.005:
        made = rng.choice((" ", "a", "語", "1", "\n")) * rng.choice((1_000_000, 1_100_000))
    return made if rng.random() < 0.7 else "".join(chr(rng.randrange(0x110000)) for _ in range(rng.choice((3, 300))))


def hostile_template(rng: random.Random) -> str:
    if rng.random() < 0.5:
        source = "".join(statement(rng, 3) for _ in range(rng.choice((1, 3, 10))))
    else:
        source = rng.choice(TEMPLATES)
    for _ in range(rng.choice((0, 0, 1, 4))):
        start = rng.randrange(len(source) + 1)
        end = min(len(source), start + rng.choice((0, 1, 5, 40)))
        source = source[:start] + rng.choice(("", "", statement(rng, 1), source[start:end] * 50)) + source[end:]
    return source


def statement(rng: random.Random, depth: int) -> str:
    made = rng.choice(STATEMENTS)
    while "V" in made or "F" in made:
        made = made.replace("V", rng.choice(VALUES), 1).replace("F", rng.choice(FILTERS), 1)
    inner = "".join(statement(rng, depth - 1) for _ in range(2)) if depth else "x"
    return made.replace("S", inner)
