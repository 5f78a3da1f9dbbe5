"""Finds the chat template of a checkpoint and renders it in a sandbox (`template_sandbox`)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint_folder import DECODER_FOLDER, CheckpointFolder
from ..errors import PromptError
from .template_sandbox import MAX_CHARACTERS, TOO_LONG, Budget, Sandbox, budget

MAX_TEMPLATE_BYTES = 1 << 16
RENDER_SECONDS = 5.0


class PromptTemplate:
    """A compiled chat template; `source` is its text. Rendering has no side effects, so threads may share one."""

    def __init__(self, source: str):
        """Compile `source`.

        Raises PromptError when it is not a valid jinja2 template, is longer than 65,536 characters, or uses a filter or
        test that the sandbox does not offer.
        """
        self.source = source
        if len(source) > MAX_TEMPLATE_BYTES:
            raise PromptError(f"the checkpoint's chat template is longer than {MAX_TEMPLATE_BYTES:,} characters.")
        try:
            self._template = Sandbox().compiled(source)
        except Exception as error:  # jinja2's errors, and Python's about the code that jinja2 generates
            raise PromptError(f"the checkpoint's chat template does not compile: {_text_of(error)}") from error

    @classmethod
    def from_folder(cls, folder: Path | CheckpointFolder) -> "PromptTemplate":
        """The template of a checkpoint's folder.

        Searched in chat_template.jinja, then under `chat_template` in processor_config.json, chat_template.json and
        tokenizer_config.json, where it is a string or several named ones, of which `default` is used. In NVIDIA's
        component layout these files may also lie in llm/; a template of the text model there, which writes no <sound>,
        does not count. Raises PromptError when there is none, CheckpointError when a file is damaged.
        """
        files = CheckpointFolder.of(folder)
        for name in ("", f"{DECODER_FOLDER}/"):
            source = _find_template(files, name)
            if source is not None and (not name or "<sound>" in source):
                return cls(source)
        raise PromptError(
            f"no chat template in {files.path}: neither chat_template.jinja nor a chat_template entry in "
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
        Raises PromptError when the template raises, loops, reaches outside the sandbox or produces too much text.
        """
        names = {
            **(variables or {}),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        token = budget.set(Budget(RENDER_SECONDS))
        try:
            return _joined(self._template.generate(names))
        except PromptError:
            raise
        except RecursionError as error:
            raise PromptError("the checkpoint's chat template recurses without end. Use another template.") from error
        except Exception as error:  # template code may raise anything
            raise PromptError(f"the checkpoint's chat template failed on these messages: {_text_of(error)}") from error
        finally:
            budget.reset(token)


def _joined(pieces: Iterable[str]) -> str:
    parts: list[str] = []
    room = MAX_CHARACTERS
    for piece in pieces:
        budget.get().spend(1)
        room -= len(piece)
        if room < 0:
            raise PromptError(TOO_LONG)
        parts.append(piece)
    return "".join(parts)


def _text_of(error: Exception) -> str:
    """The message of an error, or its class name, at most 500 characters."""
    return (str(error) or type(error).__name__)[:500]


def _find_template(files: CheckpointFolder, prefix: str) -> str | None:
    source = files.text(f"{prefix}chat_template.jinja", MAX_TEMPLATE_BYTES)
    for file in ("processor_config.json", "chat_template.json", "tokenizer_config.json"):
        if source is None and (value := files.settings(prefix + file).get("chat_template")) is not None:
            source = _default_template(value, prefix + file)
    return source


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
