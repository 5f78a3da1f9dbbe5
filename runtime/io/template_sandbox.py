"""The jinja2 environment that chat templates run in, with bounded time and memory.

A template is code from the checkpoint. jinja2's immutable sandbox keeps it from accessing Python's internals and from
changing the messages; this one bounds its cost. Only operations whose cost is at most proportional to the size of their
operands and result are available: some filters, tests and methods are removed, and arguments that multiply a text are
checked first. Every operation's size is charged to one budget for the whole rendering, and values that nest too deeply
or exceed `MAX_CHARACTERS` and `MAX_ITEMS` are refused when they are made. So neither many small steps nor few large
ones can exceed the budget by more than one operation.

The environment has the features that templates for `transformers` expect: trimmed blocks, loop controls,
`{% generation %}` blocks (rendered as their content), `tojson`, `raise_exception` and `strftime_now`.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS

from ..errors import PromptError
from ..files import shown

MAX_CHARACTERS = 4 << 20
MAX_ITEMS = 100_000
MAX_DEPTH = 64
MAX_INTEGER_BITS = 2**13
ITEM = 32
"""Cost of a list element in characters, about its memory."""
BUDGET = 1 << 26
"""Characters that one rendering may process in total."""
_PLAIN = (float, range, Undefined, type(None))

TOO_LONG = (
    f"the rendered prompt, or a text that the chat template makes on the way, would pass {MAX_CHARACTERS} characters "
    f"or {MAX_ITEMS} items. Shorten the messages; if they are short, the checkpoint's chat template is at fault."
)


class Budget:
    """The remaining budget of one rendering."""

    def __init__(self, seconds: float) -> None:
        self._left = BUDGET
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds

    def spend(self, cost: int) -> None:
        """Subtract `cost` characters. Raises PromptError when the budget or the time is exhausted."""
        self._left -= cost
        if self._left < 0 or time.monotonic() > self._deadline:
            raise PromptError(
                f"the checkpoint's chat template did not finish within {self._seconds} s and {BUDGET:,} characters of "
                "work; it may loop without end. Use another template."
            )


budget: ContextVar[Budget] = ContextVar("render_budget")
"""The budget of the rendering in progress."""


def charge(value: Any) -> Any:
    """Charge the whole size of `value`, contents included, and return it.

    Raises PromptError for a value that is too large, and for objects that are not plain data.
    """
    characters = items = 0
    pending: list[tuple[Any, int]] = [(value, 0)]
    while pending:
        part, depth = pending.pop()
        if isinstance(part, str):
            characters += len(part)
        elif isinstance(part, dict | list | tuple):
            items += len(part)
            if depth == MAX_DEPTH or items > MAX_ITEMS:
                raise PromptError(TOO_LONG)
            inner = [*part.keys(), *part.values()] if isinstance(part, dict) else part
            pending += [(each, depth + 1) for each in inner]
        elif isinstance(part, int):
            _check_integer(part)
        elif not isinstance(part, _PLAIN):
            raise PromptError(f"the checkpoint's chat template writes or stores a {type(part).__name__}, not data.")
        if characters > MAX_CHARACTERS:
            raise PromptError(TOO_LONG)
    budget.get().spend(1 + characters + ITEM * items)
    return value


def charge_top(value: Any) -> Any:
    """Charge the length of `value`, without its contents, and return it."""
    cost = len(value) if isinstance(value, str) else ITEM * len(value) if isinstance(value, dict | list | tuple) else 0
    if isinstance(value, int):
        _check_integer(value)
    budget.get().spend(1 + cost)
    return value


def _check_integer(value: int) -> None:
    if value.bit_length() > MAX_INTEGER_BITS:
        raise PromptError("the checkpoint's chat template computes with huge numbers. Use another template.")


def _metered(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        budget.get().spend(ITEM)
        yield value


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is rendered as
    content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# Names that no template can contain, for the filters that `guarded` wraps around parts of a template.
_STEPS = "loop steps"
_CHARGE = "charge"
_CHARGE_TOP = "charge top"


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (
        str,
        _names(
            "capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace isupper "
            "join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
            "splitlines startswith strip swapcase title upper"
        ),
    ),
    (dict, _names("get items keys values")),
    (list, _names("count index")),
    (tuple, _names("count index")),
    (int, frozenset()),
    (float, _names("is_integer")),
)
_FILTERS = _names(
    "abs capitalize count d default dictsort first float int items last length list lower map max min reject "
    "rejectattr reverse round select selectattr sort string title trim unique upper"
)
_DEEP_FILTERS = _names("dictsort max min sort string unique")
_DEEP_TESTS = _names("== != < > <= >= eq equalto ge gt greaterthan in le lessthan lt ne")


class Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox described in the module's docstring. `compiled` compiles templates."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        # No optimizer: it would evaluate constant expressions at compile time, outside any budget.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        self.filters = {name: _limited(FILTERS[name], name in _DEEP_FILTERS) for name in _FILTERS}
        own: dict[str, Callable[..., Any]] = {
            "indent": _indent,
            "join": _join_filter,
            "replace": _replace,
            "safe": _text,
            "sum": _sum,
            "tojson": _tojson,
            _STEPS: _steps,
            _CHARGE: _charge,
            _CHARGE_TOP: _charge_own,
        }
        self.filters |= own
        self.tests = {name: _limited(cast(Any, test), name in _DEEP_TESTS) for name, test in TESTS.items()}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del self.globals["lipsum"]

    def wrap_str_format(self, value: Any) -> None:
        """Returns None, which disables `format`: its widths multiply a text."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, methods in _METHODS:
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        budget.get().spend(1)
        charge(argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # Named as in jinja2, so that a template may pass keyword arguments called `self` and `obj`.
        for value in (*args, *kwargs.values()):
            charge_top(value)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            charge_top(owner)
            if name == "replace":
                return _replace(owner, *args, **kwargs)
            if name == "join":
                return _join(args[0] if args else (), owner)
        elif isinstance(owner, list | tuple):  # count and index compare
            charge(owner)
            charge(args)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str | list | tuple | dict):
            return charge(result)
        return list(_metered(result)) if isinstance(owner, dict) and name in ("items", "keys", "values") else result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        charge_top(left)
        charge_top(right)
        if operator == "%" and not isinstance(left, int | float):
            raise PromptError("the checkpoint's chat template formats a text with %, which is not supported; use ~.")
        if operator in ("*", "**"):
            _check_product(operator, left, right)
        return charge(super().call_binop(context, operator, left, right))

    def compiled(self, source: str) -> jinja2.Template:
        """Compile the template `source`, with charges around everything that loops, joins, compares, slices or writes.

        Raises jinja2's errors, SyntaxError for blocks nested too deeply, and RecursionError.
        """
        tree = self.parse(source)
        for node in list(tree.find_all(nodes.Node)):
            if isinstance(node, nodes.For):
                node.iter = self._filtered(node.iter, _STEPS)
            elif isinstance(node, nodes.List | nodes.Tuple):
                if getattr(node, "ctx", "load") == "load":
                    node.items = [self._filtered(item, _CHARGE) for item in node.items]
            elif isinstance(node, nodes.Pair):
                node.value = self._filtered(node.value, _CHARGE)
            elif isinstance(node, nodes.Getitem):
                if isinstance(node.arg, nodes.Slice):
                    node.node = self._filtered(node.node, _CHARGE_TOP)
            elif isinstance(node, nodes.Compare | nodes.Operand):
                node.expr = self._filtered(node.expr, _CHARGE)
            elif isinstance(node, nodes.Output | nodes.Concat):
                node.nodes = [self._filtered(part, _CHARGE) for part in node.nodes]
        return self.from_string(tree)

    def _filtered(self, node: nodes.Node, name: str) -> nodes.Expr:
        if isinstance(node, nodes.Const) and not isinstance(node.value, str):
            return node
        expression = cast(nodes.Expr, node)
        return nodes.Filter(expression, name, [], [], None, None, lineno=node.lineno, environment=self)


def _limited(function: Callable[..., Any], deep: bool) -> Callable[..., Any]:
    """A filter or test that charges its arguments (`deep`: with their contents) and its result."""

    def limited(*arguments: Any, **keywords: Any) -> Any:
        values: list[Any] = []
        for value in arguments:
            if isinstance(value, Iterator):
                value = charge(list(_metered(value))) if deep else _metered(value)
            elif not isinstance(value, Context | jinja2.Environment | nodes.EvalContext):
                charge(value) if deep else charge_top(value)
            values.append(value)
        if deep:
            charge(tuple(keywords.values()))
        result = function(*values, **keywords)
        if isinstance(result, str | list | tuple | dict):
            return charge(result)
        return _metered(result) if isinstance(result, Iterator) else result

    if hasattr(function, "jinja_pass_arg"):
        limited.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return limited


@jinja2.pass_context
def _charge(context: Context, value: Any) -> Any:
    return charge(list(_metered(value)) if isinstance(value, Iterator) else value)


@jinja2.pass_context
def _charge_own(context: Context, value: Any) -> Any:
    return charge_top(value)


@jinja2.pass_context
def _steps(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    return _metered(items)


def _check_product(operator: str, left: Any, right: Any) -> None:
    """Refuse a product or power that would take unbounded memory or time."""
    if isinstance(left, int) and isinstance(right, int):
        if operator == "**" and left.bit_length() * right > MAX_INTEGER_BITS:
            raise PromptError("the checkpoint's chat template computes with huge numbers. Use another template.")
    elif operator == "*":
        repeated, count = (right, left) if isinstance(left, int) else (left, right)
        most = MAX_CHARACTERS if isinstance(repeated, str) else MAX_ITEMS
        if isinstance(repeated, str | list | tuple) and isinstance(count, int) and len(repeated) * count > most:
            raise PromptError(TOO_LONG)


def _checked_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise PromptError(TOO_LONG)


def _replace(text: Any, old: Any, new: Any, count: Any = None) -> str:
    text, old, new = str(charge(text)), str(charge(old)), str(charge(new))
    most = text.count(old) if count is None or count < 0 else min(int(count), text.count(old))
    _checked_length(len(text) + most * max(0, len(new) - len(old)))
    return str(charge(text.replace(old, new, most)))


@jinja2.pass_environment
def _join_filter(environment: jinja2.Environment, value: Any, d: Any = "", attribute: Any = None) -> str:
    return _join(value if attribute is None else map(make_attrgetter(environment, attribute), value), d)


def _join(items: Any, separator: Any = "") -> str:
    separator = str(charge(separator))
    texts = [str(charge(item)) for item in _metered(items)]
    _checked_length(sum(map(len, texts)) + len(separator) * len(texts))
    return str(charge(separator.join(texts)))


def _indent(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    text = str(charge(text))
    margin = width if isinstance(width, str) else " " * min(int(width), MAX_CHARACTERS)
    _checked_length(len(text) + (text.count("\n") + 1) * len(margin))
    return str(charge(FILTERS["indent"](text, margin, first, blank)))


def _text(value: Any) -> str:
    """The filter `safe`, which marks text as HTML in jinja2; here nothing is escaped."""
    return str(charge(value))


def _sum(values: Any, attribute: None = None, start: float = 0) -> float:
    return sum((value for value in _metered(values) if isinstance(value, int | float)), start)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which are plain text in a prompt.
    if not (indent is None or (isinstance(indent, int) and indent <= 8)) or len("".join(separators or ())) > 16:
        raise PromptError("the checkpoint's chat template asks tojson for an indent over 8 or for long separators.")
    text = json.dumps(
        charge(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return str(charge(text))


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(message if isinstance(message, str) else shown(message))


def _strftime_now(form: str) -> str:
    if not isinstance(form, str) or len(form) > 200 or re.search(r"%[-_0^#]*\d", form):
        raise PromptError("the checkpoint's chat template asks for a date in an unusual format.")
    return datetime.now().strftime(form)
