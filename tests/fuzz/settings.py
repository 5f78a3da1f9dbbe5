"""Sampling options and values of generation_config.json of every type and size.

The right outcome is an AfnextError (TypeError for an option that does not exist), or numbers of the declared types and
tokens of the vocabulary. One case in eight goes through an answer of the bundled model.
"""

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch

import afnext
from afnext.kernels.errors import AfnextError
from afnext.runtime.app.generation_config import generation_defaults
from afnext.runtime.engine.sampler import Sampler, SamplingParams, choose

SECONDS = 60.0  # of one that loads the bundled model
MEGABYTES = 2048
VOCAB = 40

PARAMETERS = [name for name in SamplingParams.__dataclass_fields__ if name != "stop_token_ids"]
OPTIONS = [*PARAMETERS, "max_answer_tokens", "stop", "ignore_eos", "priority", "deadline", "cancelled", "progress"]
KEYS = [
    *PARAMETERS, "do_sample", "stop_strings", "min_length", "max_length", "num_beams", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "guidance_scale", "watermarking_config", "remove_invalid_values", "dola_layers", "some_new_key",
]  # fmt: skip
NUMBERS = [
    "0", "1", "-1", "2", "3", "5", "50", "0.5", "0.7", "1.5", "0.9999999999", "1e-46", "1e-40", "1e-38", "1e38", "1e39",
    "1e300", "-0.0", "nan", "inf", "-inf", "2147483647", "2147483648", "9223372036854775807", "18446744073709551616",
]  # fmt: skip
BUILD: dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(float(text)),
    "huge": lambda text: 10 ** (400 + len(text)),
    "float": float,
    "fraction": lambda text: Fraction(text),
    "complex": complex,
    "text": str,
    "bytes": str.encode,
    "none": lambda text: None,
    "true": lambda text: True,
    "tensor": lambda text: torch.tensor(float(text)),
    "array": lambda text: np.array(float(text)),
    "function": lambda text: lambda *_: False,
    "json": json.loads,
    "float16": lambda text: np.float16(text),
    "float32": lambda text: np.float32(text),
    "float64": lambda text: np.float64(text),
    "int8": lambda text: np.int8(float(text)),
    "int64": lambda text: np.int64(float(text)),
    "uint64": lambda text: np.uint64(float(text)),
    "bool_": lambda text: np.bool_(float(text)),
}


def cases(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Settings as JSON: where they go, and for each name the kind of its value and a text of it."""
    while True:
        way = rng.choice(["params"] * 4 + ["file"] * 3 + ["answer"])
        names = KEYS if way == "file" else PARAMETERS if way == "params" else OPTIONS
        given = {name: value(name, way, rng) for name in rng.sample(names, rng.choice((1, 1, 2, 3, 6)))}
        how = ", ".join(f"{name}={kind}({text[:40]})" for name, (kind, text) in given.items())
        yield f"{way}: {how}", json.dumps({"way": way, "seed": rng.randrange(2**31), "given": given}).encode()


def value(name: str, way: str, rng: random.Random) -> tuple[str, str]:
    """The kind of a value and its text: of the kind that is meant in half of the cases."""
    if rng.random() < 0.5 and (name.endswith(("tokens_ids", "_ids", "_bias", "_tokens", "stop", "stop_strings"))):
        return "json", json.dumps(nested(rng))
    if way == "file":
        simple = [rng.choice(NUMBERS), "true", "null", '"x"', "[]", "{}", json.dumps(nested(rng))]
        return "json", rng.choice(simple).replace("nan", "NaN").replace("inf", "Infinity")
    kind = rng.choice(["int", "int", "float", "float", *(name for name in BUILD if name != "json")])
    return kind, rng.choice(NUMBERS)


def nested(rng: random.Random, depth: int = 0) -> Any:
    """Lists of token ids, of lists of them, with biases, and of what does not belong there."""
    leaf = rng.choice([0, 1, 5, 39, 40, -1, 10**9, 0.5, True, None, "END", ""])
    if depth == 3 or rng.random() < 0.2:
        return leaf
    if rng.random() < 0.3:
        return [rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 3, 45)))]
    return [nested(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 2, 3)))]


def check(data: bytes) -> None:
    """`data`: JSON as `cases` makes it."""
    case = json.loads(data)
    given = {}
    for name, (kind, text) in case["given"].items():
        try:
            with np.errstate(all="ignore"):
                given[name] = BUILD[kind](text)
        except (ValueError, OverflowError):
            return  # there is no such number of this kind
    torch.manual_seed(case["seed"])
    with contextlib.suppress(AfnextError):
        if case["way"] == "file":
            sampling = generation_defaults(given, VOCAB).sampling
            check_params(SamplingParams(**{"max_new_tokens": 4, **sampling}))
        elif case["way"] == "params":
            check_params(SamplingParams(**{"max_new_tokens": 4, **given}))
        else:
            answer = afnext.load().ask(None, "What do you hear?", **{"max_new_tokens": 4, **given})
            assert answer.finish_reason in ("stop", "length", "deadline", "cancelled", "repetition")


def check_params(params: SamplingParams) -> None:
    """Parameters that were accepted are plain numbers that choose tokens of the vocabulary."""
    for name, kind in (("temperature", float), ("top_k", int), ("top_p", float), ("min_p", float), ("seed", int)):
        number = getattr(params, name)
        assert number is None or type(number) is kind, f"{name} is a {type(number)}"
    sampler = Sampler(params, [1, 2, 3], VOCAB, torch.device("cpu"))
    for index in range(4):
        (token,) = choose(3 * torch.randn(1, VOCAB), [sampler], [index])
        assert token is not None, "a score left float32"
        assert 0 <= token < VOCAB
        assert token not in params.suppress_tokens
        sampler.accept(token)
