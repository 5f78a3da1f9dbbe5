"""The chat template that ships with a checkpoint, rendered in a sandbox.

A template is code from the checkpoint: it runs in jinja2's immutable sandbox, which keeps it from Python's internals
and from changing the messages. On top of that a rendering has a deadline, checked at every step of a loop and every
call, and limits on the text it makes and on what `+`, `*`, `**` and `~` may build. That stops endless loops and the
usual bombs with an error; it is no wall against an author who looks for the one slow operation left.

The environment offers what templates written for `transformers` expect: trimmed blocks, loop controls,
`{% generation %}` blocks (rendered as their content), `tojson`, `raise_exception` and `strftime_now`.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import CheckpointError, PromptError
from ..files import read_settings, read_text

MAX_TEMPLATE_BYTES = 2**20
MAX_RENDERED_CHARACTERS = 16 * 2**20
MAX_INTEGER_BITS = 2**16
RENDER_SECONDS = 5.0

_deadline: ContextVar[float] = ContextVar("render_deadline", default=float("inf"))


class PromptTemplate:
    """A compiled chat template; `source` is its text. Rendering changes nothing, so threads may share one."""

    def __init__(self, source: str):
        """Compile `source`. Raises PromptError when it is not a valid jinja2 template."""
        self.source = source
        environment = _Sandbox()
        try:
            self._template = environment.from_string(_guarded(environment, source))
        except (jinja2.TemplateError, RecursionError, MemoryError, ValueError) as error:
            raise PromptError(f"the checkpoint's chat template does not compile: {error}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> "PromptTemplate":
        """The template of a checkpoint's folder.

        Looked for in chat_template.jinja, then under `chat_template` in processor_config.json, chat_template.json and
        tokenizer_config.json, where it is a string or several named ones, of which `default` is taken.
        Raises PromptError when there is none, CheckpointError when a file is damaged.
        """
        folder = Path(folder)
        file = folder / "chat_template.jinja"
        if file.is_file():
            return cls(read_text(file, file.name, CheckpointError, MAX_TEMPLATE_BYTES))
        for name in ("processor_config.json", "chat_template.json", "tokenizer_config.json"):
            value = read_settings(folder / name).get("chat_template")
            if value is not None:
                return cls(_default_template(value, name))
        raise PromptError(
            f"no chat template in {folder}: neither chat_template.jinja nor a chat_template entry in "
            "processor_config.json, chat_template.json or tokenizer_config.json. Add the checkpoint's own."
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """The conversation as one string, special tokens spelled out.

        variables: further names the template may use, such as `bos_token`.
        Raises PromptError when the template raises, loops, reaches outside the sandbox or makes too much text.
        """
        names = {
            **(variables or {}),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        token = _deadline.set(time.monotonic() + RENDER_SECONDS)
        try:
            return _joined(self._template.generate(names))
        except PromptError:
            raise
        except RecursionError as error:
            raise PromptError("the checkpoint's chat template recurses without end. Use another template.") from error
        except Exception as error:  # template code may raise anything
            raise PromptError(
                f"the checkpoint's chat template failed on these messages: {error or type(error).__name__}"
            ) from error
        finally:
            _deadline.reset(token)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what an assistant wrote, for training; here it is just content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"])
        self.filters |= {"tojson": _tojson, _STEPS: _steps, _SIZED: _sized}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del self.globals["lipsum"]

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # Named as in jinja2, so that a template may pass keyword arguments called `self` and `obj`.
        _check_deadline()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator != "+":
            _check_product(operator, left, right)
        return _sized(super().call_binop(context, operator, left, right))


# Names that no template can spell, for the filters that `_guarded` puts around loops and concatenations.
_STEPS = "loop steps"
_SIZED = "sized text"


def _guarded(environment: jinja2.Environment, source: str) -> nodes.Template:
    """Parse a template so that each loop meets the deadline at every step and `~` joins nothing oversized."""
    tree = environment.parse(source)

    def filtered(node: nodes.Node, name: str) -> nodes.Filter:
        return nodes.Filter(
            cast(nodes.Expr, node), name, [], [], None, None, lineno=node.lineno, environment=environment
        )

    for loop in list(tree.find_all(nodes.For)):
        loop.iter = filtered(loop.iter, _STEPS)
    for concatenation in list(tree.find_all(nodes.Concat)):
        concatenation.nodes = [filtered(node, _SIZED) for node in concatenation.nodes]
    return tree


@jinja2.pass_context
def _steps(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_deadline()
        yield item


def _sized(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MAX_RENDERED_CHARACTERS:
        raise PromptError(_too_long())
    return value


def _check_deadline() -> None:
    if time.monotonic() > _deadline.get():
        raise PromptError(
            f"the checkpoint's chat template did not finish within {RENDER_SECONDS} s; it may loop without end. "
            "Use another template."
        )


def _check_product(operator: str, left: Any, right: Any) -> None:
    """Refuse a product or power before it takes memory or time without bound."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_INTEGER_BITS:
            raise PromptError("the checkpoint's chat template computes with huge numbers. Use another template.")
    elif operator == "*":
        repeated, count = (right, left) if isinstance(left, int) else (left, right)
        sized = isinstance(repeated, str | list | tuple) and isinstance(count, int)
        if sized and len(repeated) * count > MAX_RENDERED_CHARACTERS:
            raise PromptError(_too_long())


def _joined(pieces: Iterable[str]) -> str:
    parts: list[str] = []
    room = MAX_RENDERED_CHARACTERS
    for piece in pieces:
        _check_deadline()
        room -= len(piece)
        if room < 0:
            raise PromptError(_too_long())
        parts.append(piece)
    return "".join(parts)


def _too_long() -> str:
    return (
        f"the rendered prompt would pass {MAX_RENDERED_CHARACTERS} characters. "
        "Shorten the messages; if they are short, the checkpoint's chat template is at fault."
    )


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which are plain text in a prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _default_template(value: Any, name: str) -> str:
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict):
        value = value.get("default")
    if not isinstance(value, str):
        raise PromptError(
            f"chat_template in {name} is neither a string nor a list of named templates with one called 'default'."
        )
    return value
