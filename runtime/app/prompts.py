"""Prompts by task: transcripts, translations, captions, music, lyrics, and the checkpoints for each.

Source: the prompt guide on the model cards of nvidia/audio-flamingo-next-hf, nvidia/audio-flamingo-next-think-hf and
nvidia/audio-flamingo-next-captioner-hf (Hugging Face, 2026), which print the same table. Two prompts with timestamps
are not in it; the cards only say to ask for timestamps and speaker labels directly. Those have `from_card=False`, and
their effect on the released weights is not verified. The same holds for `ast` without a source language.

>>> from afnext import prompts
>>> model.ask("talk.mp3", prompts.get("ast", source="English", to="German"))
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..checkpoint_folder import CheckpointFolder
from ..errors import CheckpointError, PromptError

Variant = Literal["instruct", "think", "captioner"]
"""The released checkpoints: audio-flamingo-next-hf, audio-flamingo-next-think-hf, audio-flamingo-next-captioner-hf."""

FILE = "prompts.json"
"""Optional file of a checkpoint that supports only certain prompts: {"tasks": {name: prompt}, "no_speech":
[answer]}."""

_FROM = " from {source}"
_CODE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z]{2,4})?")


@dataclass(frozen=True)
class Task:
    """A task that the model was trained on.

    name: the argument of `get`. description: one line for users. prompt: the text with {source} and {target} for
    languages; None if the user's question is the prompt. variants: the checkpoints recommended for it, best first, as
    in the card. from_card: whether the card has this prompt. example: an example of such a prompt.
    """

    name: str
    description: str
    prompt: str | None
    variants: tuple[Variant, ...]
    from_card: bool = True
    example: str | None = None


_SPEECH: tuple[Variant, ...] = ("instruct", "think")
_DIARIZE = (
    "Transcribe the input audio. If multiple speakers are present, provide diarized transcripts with speaker labels."
)
_TASKS = (
    Task("asr", "a transcript", "Transcribe the input speech.", _SPEECH),
    Task(
        "asr-timestamps",
        "a transcript with times",
        "Transcribe the input speech with timestamps.",
        _SPEECH,
        from_card=False,
    ),
    Task(
        "ast",
        "a translation of the speech into another language",
        f"Translate any speech you hear{_FROM} into {{target}}.",
        _SPEECH,
    ),
    Task("caption", "a short description", "Generate a caption for the input audio.", ("captioner", "think")),
    Task(
        "long-caption",
        "a detailed description with everything that is said",
        "Generate a detailed caption for the input audio. In the caption, transcribe all spoken content by all "
        "speakers in the audio precisely.",
        ("captioner", "think"),
    ),
    Task(
        "music",
        "a description of a piece of music",
        "Summarize the track with precision: mention its musical style, BPM, key, arrangement, production choices, and "
        "the emotions or story it conveys.",
        ("captioner", "instruct", "think"),
    ),
    Task(
        "lyrics",
        "the lyrics of a song",
        "Generate a lyrics transcription from the input song.",
        ("instruct", "captioner", "think"),
    ),
    Task(
        "diarize",
        "a transcript with speakers",
        f"{_DIARIZE}\n[Speaker 1] ...\n[Speaker 2] ...",
        _SPEECH,
    ),
    Task(
        "diarize-timestamps",
        "a transcript with speakers and times",
        "Transcribe the input audio with timestamps. If multiple speakers are present, provide diarized transcripts "
        "with speaker labels.\n[mm:ss.s - mm:ss.s] [Speaker 1] ...\n[mm:ss.s - mm:ss.s] [Speaker 2] ...",
        _SPEECH,
        from_card=False,
    ),
    Task(
        "qa",
        "an answer to your own question",
        None,
        _SPEECH,
        example="What precise description did the commentator use for the punch that ended the fight?",
    ),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}
"""Every task of the model cards by name."""

_TRANSCRIPTS = {
    (True, True): "diarize-timestamps",
    (True, False): "asr-timestamps",
    (False, True): "diarize",
    (False, False): "asr",
}


@dataclass(frozen=True)
class Prompts:
    """The prompts that one checkpoint supports: those of the cards, or those in its `prompts.json`.

    tasks: by name. no_speech: answers that mean there is no speech.
    """

    tasks: Mapping[str, Task]
    no_speech: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path | CheckpointFolder) -> "Prompts":
        """The prompts of the checkpoint in `folder`. Raises CheckpointError for a malformed `prompts.json`."""
        settings = CheckpointFolder.of(folder).settings(FILE)
        if not settings:
            return CARD
        texts, silent = settings.get("tasks"), settings.get("no_speech", [])
        if not (isinstance(texts, dict) and isinstance(silent, list) and _are_texts([*texts.values(), *silent])):
            raise CheckpointError(
                f'{FILE} should read {{"tasks": {{name: prompt}}, "no_speech": [answer]}}, all of them strings; '
                "correct the file, or remove it to use the prompts of the model card."
            )
        tasks = {
            name: replace(TASKS.get(name, Task(name, "", None, ())), prompt=text, variants=(), from_card=False)
            for name, text in texts.items()
        }
        return cls(tasks, tuple(silent))

    def get(self, task: str, *, to: str | None = None, source: str | None = None) -> str:
        """The prompt for a task.

        to, source: for a translation, the language to translate into and, optionally, the one that is spoken, each by
        its English name. Raises PromptError for an unknown task, for one that needs a question or a language, and for a
        language if the task takes none.
        """
        if task not in self.tasks:
            raise PromptError(f"there is no prompt for the task {task!r} here; there is one for {self._names()}.")
        prompt = self.tasks[task].prompt
        if prompt is None:
            raise PromptError(f"the task {task!r} has no prompt; ask your own question instead.")
        if "{target}" not in prompt:
            if to is not None or source is not None:
                raise PromptError(f"the task {task!r} takes no language; leave it out, or choose the task 'ast'.")
            return prompt
        if to is None:
            raise PromptError(f"the task {task!r} needs the language to translate into, such as German.")
        spoken = "" if source is None else f" from {_language(source)}"
        return prompt.replace(_FROM, spoken).replace("{target}", _language(to))

    def transcript(self, *, timestamps: bool | None = None, speakers: bool | None = None) -> str:
        """The prompt for a transcript with times and speakers; None asks for them if the checkpoint supports them.

        Raises PromptError if the checkpoint has no prompt for the request.
        """
        for times in (True, False) if timestamps is None else (timestamps,):
            for names in (True, False) if speakers is None else (speakers,):
                name = _TRANSCRIPTS[times, names]
                if name in self.tasks:
                    return self.get(name)
        wanted = {True: "with", False: "without"}
        asked = [f"{wanted[v]} {n}" for n, v in (("timestamps", timestamps), ("speakers", speakers)) if v is not None]
        raise PromptError(
            f"this checkpoint has no prompt for a transcript{' ' * bool(asked)}{' and '.join(asked)}; it has prompts "
            f"for {self._names()}. Ask for one of these, or give a prompt of your own."
        )

    def _names(self) -> str:
        return ", ".join(self.tasks)


CARD = Prompts(TASKS)
"""The prompts of the model cards."""


def get(task: str, *, to: str | None = None, source: str | None = None) -> str:
    """The model cards' prompt for a task; see `Prompts.get`."""
    return CARD.get(task, to=to, source=source)


def is_language_code(name: str) -> bool:
    """Whether a language is given as a code such as "de" or "pt-BR", which prompts do not use."""
    return _CODE.fullmatch(name) is not None


def _language(name: str) -> str:
    name = name.strip()
    if is_language_code(name):
        raise PromptError(f"the prompt needs the name of the language, such as German, not the code {name!r}.")
    if not name or not name.isprintable():
        raise PromptError(f"{name!r} is not the name of a language; write one such as German.")
    return name


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(text, str) and text for text in values)
