"""Recipes: which layer is stored by which scheme, as an ordered list of patterns.

A rule is a pattern of layer names, in which * stands for any characters, and a scheme; the first rule that matches a
layer decides, and a layer that none matches stays dense. Layers are named as the runtime names them:
`encoder.layers.0.fc1`, `adaptor.linear_1`, `decoder.embed_tokens`, `decoder.layers.0.mlp.down_proj`, `decoder.lm_head`.

    recipe     decoder layers   lm_head, embeddings, adaptor   encoder layers
    int8       int8             int8                           int8
    int8-w8a8  int8-w8a8        int8                           int8-w8a8
    int4       int4, groups     int8                           int8
    int4-w4a8  int4-w4a8        int8                           int8-w8a8
    nf4        nf4              int8                           int8

Convolutions, norms, biases and the encoder's positions are always dense: together they are 0.2 % of the weights. The
lm_head and the embeddings keep 8 bits: a row serves one token alone, so no other row makes up for its error. Of the
embeddings only the rows looked up are read, so fewer bits would save no time.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from .scheme import Int4, Scheme, SchemeError, parse_scheme

FORMAT_VERSION = 1
RECIPES = ("int8", "int8-w8a8", "int4", "int4-w4a8", "nf4")
_ALWAYS_INT8 = ("decoder.lm_head", "decoder.embed_tokens", "adaptor.*")


@dataclass(frozen=True)
class Recipe:
    """Rules, first match first.

    name: what the recipe is called where it is shown; source: a hash of the dense weights that it was applied to, empty
    for one that was not yet. Recipes of the same rules are equal.
    """

    name: str = field(compare=False)
    rules: tuple[tuple[str, Scheme | None], ...]
    source: str = field(default="", compare=False)

    def scheme(self, layer: str) -> Scheme | None:
        """The scheme of the layer, such as "decoder.layers.0.mlp.up_proj"; None where it stays dense."""
        return next((scheme for pattern, scheme in self.rules if fnmatchcase(layer, pattern)), None)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: what stands under quantization_config in a config.json."""
        rules = [[pattern, _spelled(scheme)] for pattern, scheme in self.rules]
        values = {"quant_method": "afnext", "version": FORMAT_VERSION, "recipe": self.name, "rules": rules}
        return {**values, "source": self.source}

    @classmethod
    def from_dict(cls, values: Any) -> "Recipe":
        """The inverse of `to_dict`. Raises SchemeError for anything else, and for a newer version of the format."""
        if not isinstance(values, dict) or values.get("quant_method") != "afnext":
            raise SchemeError(
                "the weights are quantized by another library; `afnext quantize` imports those of GPTQ, AWQ and "
                "compressed-tensors, for others use the dense ones"
            )
        version, rules = values.get("version"), values.get("rules")
        name, source = values.get("recipe"), values.get("source", "")
        if version != FORMAT_VERSION:
            raise SchemeError(
                f"the quantized format has version {str(version)[:20]}, and this afnext reads 1; update it"
            )
        if not isinstance(name, str) or not isinstance(source, str) or not isinstance(rules, list):
            raise SchemeError("the quantization has no recipe with a list of rules; the file is damaged")
        for rule in rules:
            if not isinstance(rule, list) or len(rule) != 2 or not all(isinstance(part, str) for part in rule):
                raise SchemeError("a rule of the quantization is not a pattern and a scheme; the file is damaged")
        return cls(name[:80], tuple((pattern, parse_scheme(scheme)) for pattern, scheme in rules), source[:128])


def recipe(
    name: str,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    rules: Iterable[tuple[str, str]] = (),
) -> Recipe:
    """A default recipe by name, one of `RECIPES`, or a scheme's spelling that says how int4 groups ("int4-g32-zeros").

    group_size, symmetric: of int4. rules: pairs (pattern, scheme's spelling) that come before the recipe's own, such as
    ("decoder.layers.0.*", "dense"). Raises SchemeError for unknown names and for options that the recipe does not have.
    """
    if name not in RECIPES and not name.startswith("int4-"):
        known = ", ".join(RECIPES)
        raise SchemeError(f"unknown recipe {name[:80]!r}; choose from {known}, or as in int4-g32-zeros-w4a8")
    scheme = parse_scheme(name)
    if isinstance(scheme, Int4) and name in RECIPES:
        scheme = replace(
            scheme, group_size=scheme.group_size if group_size is None else group_size, symmetric=symmetric
        )
    elif group_size is not None or not symmetric:
        raise SchemeError(f"{name} has no group size or zero points to choose; only int4 and int4-w4a8 do")
    first = tuple((pattern, parse_scheme(text)) for pattern, text in rules)
    eight = parse_scheme("int8")
    encoder = parse_scheme("int8-w8a8" if name.endswith("a8") else "int8")
    own = [*((pattern, eight) for pattern in _ALWAYS_INT8), ("encoder.layers.*", encoder), ("decoder.layers.*", scheme)]
    return Recipe(_spelled(scheme), (*first, *own))


def _spelled(scheme: Scheme | None) -> str:
    return "dense" if scheme is None else str(scheme)
