"""Recipes: the scheme of each layer, as an ordered list of patterns.

A rule is a pattern of layer names, in which * stands for any characters, and a scheme. The first rule that matches a
layer applies, and a layer without a matching rule stays dense. Layer names are those of the runtime:
`encoder.layers.0.fc1`, `adaptor.linear_1`, `decoder.embed_tokens`, `decoder.layers.0.mlp.down_proj`, `decoder.lm_head`.

    recipe     decoder layers   lm_head, embeddings   adaptor   encoder layers
    int8       int8             int8                  int8      int8
    int8-w8a8  int8-w8a8        int8                  int8      int8-w8a8
    fp8        fp8              int8                  int8      fp8
    int4       int4, groups     int8                  int8      int8
    int4-w4a8  int4-w4a8        int8                  int8      int8-w8a8
    nf4        nf4              int8                  int8      int8
    nvfp4      nvfp4            int8                  int8      int8
    mxfp4      mxfp4            int8                  int8      int8
    small      int4-g64         int4-g64              int8      int4-g64; attention int8
    int3       int3-g64; attention int4-g64; the rest as in small

Convolutions, norms, biases and the encoder's positions are always dense: together they are 0.2 % of the weights. The
lm_head and the embeddings keep 8 bits, except in small and int3: a row serves a single token, so no other row
compensates for its error. Only the embedding rows that are looked up are read, so fewer bits save memory but no time.
int4 in the encoder's attention costs afnext-tiny ten points of word error rate in noise; in the encoder's MLP it costs
none.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from .scheme import Int3, Int4, Scheme, SchemeError, parse_scheme

FORMAT_VERSION = 1
MAX_RULES = 1024
MAX_PATTERN = 200
SMALL = "small"
"""The recipe with the fewest bytes without int3."""
RECIPES = ("int8", "int8-w8a8", "fp8", "int4", "int4-w4a8", "nf4", "nvfp4", "mxfp4", SMALL, "int3")
_TOKENS = ("decoder.lm_head", "decoder.embed_tokens")
_ADAPTOR, _ENCODER, _DECODER = "adaptor.*", "encoder.layers.*", "decoder.layers.*"
_ENCODER_ATTENTION, _DECODER_ATTENTION = "encoder.layers.*.self_attn.*", "decoder.layers.*.self_attn.*"
_DEFAULT_PATTERNS = {*_TOKENS, _ADAPTOR, _ENCODER_ATTENTION, _ENCODER, _DECODER_ATTENTION, _DECODER}


@dataclass(frozen=True)
class Recipe:
    """Rules, first match first.

    name: for display; source: a hash of the dense weights that the recipe was applied to, empty if it has not been
    applied yet. Recipes with the same rules are equal.
    """

    name: str = field(compare=False)
    rules: tuple[tuple[str, Scheme | None], ...]
    source: str = field(default="", compare=False)

    def scheme(self, layer: str) -> Scheme | None:
        """The scheme of a layer, such as "decoder.layers.0.mlp.up_proj"; None if the layer stays dense."""
        return next((scheme for pattern, scheme in self.rules if fnmatchcase(layer, pattern)), None)

    def extends(self, stored: "Recipe") -> bool:
        """Whether this recipe keeps every layer that `stored` packs, because it begins with the same rules."""
        return self.rules[: len(stored.rules)] == stored.rules

    def extended(self, rest: "Recipe", layers: Iterable[str]) -> "Recipe":
        """This recipe, with `rest` for the layers that this recipe leaves dense.

        layers: names of all layers. Raises SchemeError if a rule that `rest` adds to the default ones gives a packed
        layer another scheme, which would round its weights a second time.
        """
        for layer in layers:
            packed, asked = self.scheme(layer), Recipe("", rest._added_rules)
            if packed is not None and any(fnmatchcase(layer, pattern) for pattern, _ in asked.rules):
                scheme = asked.scheme(layer)
                if scheme != packed:
                    raise SchemeError(
                        f"{layer} is {packed} already, and {_spelled(scheme)} would round its weights a second time; "
                        "leave that rule out, or quantize the dense weights"
                    )
        return Recipe(f"{self.name} and {rest.name}", (*self.rules, *rest.rules))

    @property
    def _added_rules(self) -> tuple[tuple[str, Scheme | None], ...]:
        """The rules without those of the default recipes."""
        return tuple(rule for rule in self.rules if rule[0] not in _DEFAULT_PATTERNS)

    def unused_patterns(self, layers: Collection[str]) -> tuple[str, ...]:
        """The patterns that match none of these layers. Patterns of the default recipes, which need no match, are left
        out."""
        return tuple(
            pattern for pattern, _ in self._added_rules if not any(fnmatchcase(layer, pattern) for layer in layers)
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, for quantization_config in a config.json."""
        rules = [[pattern, _spelled(scheme)] for pattern, scheme in self.rules]
        values = {"quant_method": "afnext", "version": FORMAT_VERSION, "recipe": self.name, "rules": rules}
        return {**values, "source": self.source}

    @classmethod
    def from_dict(cls, values: Any) -> "Recipe":
        """The inverse of `to_dict`. Raises SchemeError for anything else, and for a newer version of the format."""
        if not isinstance(values, dict) or values.get("quant_method") != "afnext":
            raise SchemeError(
                "the weights are quantized by another library; `afnext quantize` imports those of GPTQ, AWQ, "
                "compressed-tensors and ModelOpt, and those of bitsandbytes load as they are; for others use the dense "
                "ones"
            )
        version, rules = values.get("version"), values.get("rules")
        name, source = values.get("recipe"), values.get("source", "")
        if version != FORMAT_VERSION:
            raise SchemeError(
                f"the quantized format has version {str(version)[:20]}, and this afnext reads 1; update it"
            )
        if not isinstance(name, str) or not isinstance(source, str) or not isinstance(rules, list):
            raise SchemeError("the quantization has no recipe with a list of rules; the file is damaged")
        if len(rules) > MAX_RULES:
            raise SchemeError(f"the quantization has {len(rules):,} rules; at most {MAX_RULES:,} are accepted")
        for rule in rules:
            if not isinstance(rule, list) or len(rule) != 2 or not all(isinstance(part, str) for part in rule):
                raise SchemeError("a rule of the quantization is not a pattern and a scheme; the file is damaged")
            _check_pattern(rule[0])
        return cls(name[:80], tuple((pattern, parse_scheme(scheme)) for pattern, scheme in rules), source[:128])


def fewest_rules(schemes: Mapping[str, Scheme | None]) -> tuple[tuple[str, Scheme | None], ...]:
    """Rules that give each layer its scheme in `schemes`, None for dense. A rule covers a whole part of the model if
    all its layers have the same scheme, otherwise a kind of layer or a single layer."""
    rules: list[tuple[str, Scheme | None]] = []
    left = dict(schemes)
    for pattern in (_DECODER, _ENCODER, _ADAPTOR):
        layers = [layer for layer in left if fnmatchcase(layer, pattern)]
        groups = {pattern: layers}
        if len({left[layer] for layer in layers}) > 1:
            groups = {}
            for layer in layers:
                groups.setdefault(re.sub(r"\.\d+\.", ".*.", layer), []).append(layer)
        for name, members in groups.items():
            if len({left.pop(layer) for layer in members}) == 1:
                rules.append((name, schemes[members[0]]))
            else:
                rules += [(layer, schemes[layer]) for layer in members]
    rules += left.items()
    return tuple((pattern, scheme) for pattern, scheme in rules if scheme is not None)


def recipe(
    name: str,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    rules: Iterable[tuple[str, str]] = (),
) -> Recipe:
    """A default recipe by name, one of `RECIPES`, or a scheme's spelling with a group ("int4-g32-zeros", "int3-g128",
    "int8-g32").

    group_size, symmetric: of int4. rules: pairs (pattern, scheme's spelling) that come before the recipe's own, such as
    ("decoder.layers.0.*", "dense"). Raises SchemeError for unknown names and for options that the recipe does not have.
    """
    if name not in RECIPES and not name.startswith(("int4-", "int3-", "int8-g")):
        known = ", ".join(RECIPES)
        raise SchemeError(f"unknown recipe {name[:80]!r}; choose from {known}, or as in int4-g32-zeros-w4a8")
    scheme = parse_scheme("int4" if name == SMALL else name)
    if isinstance(scheme, Int4) and name in ("int4", "int4-w4a8"):
        scheme = replace(
            scheme, group_size=scheme.group_size if group_size is None else group_size, symmetric=symmetric
        )
    elif group_size is not None or not symmetric:
        raise SchemeError(f"{name} has no group size or zero points to choose; only int4 and int4-w4a8 do")
    first = tuple((_check_pattern(pattern), parse_scheme(text)) for pattern, text in rules)
    four, eight = parse_scheme("int4"), parse_scheme("int8")
    few_bytes = name == SMALL or isinstance(scheme, Int3)
    tokens = encoder = four if few_bytes else eight
    if name.endswith("a8"):
        encoder = parse_scheme("int8-w8a8")
    elif name == "fp8":
        encoder = scheme
    own = [*((pattern, tokens) for pattern in _TOKENS), (_ADAPTOR, eight)]
    own += [(_ENCODER_ATTENTION, eight)] if few_bytes else []
    own += [(_ENCODER, encoder)]
    own += [(_DECODER_ATTENTION, four)] if isinstance(scheme, Int3) else []
    own += [(_DECODER, scheme)]
    return Recipe(name if name == SMALL else _spelled(scheme), (*first, *own))


def _check_pattern(pattern: str) -> str:
    """Return `pattern`. Raises SchemeError if it is longer than any layer's name."""
    if len(pattern) > MAX_PATTERN:
        raise SchemeError(
            f"the pattern {pattern[:40]!r}... has {len(pattern):,} characters; at most {MAX_PATTERN} are accepted"
        )
    return pattern


def _spelled(scheme: Scheme | None) -> str:
    return "dense" if scheme is None else str(scheme)
