"""OpenAI's request fields and response objects, for the server and for batches of requests."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..io.scripts import joined
from ..io.segments import Segment
from .answer import Answer, Usage
from .prompts import Prompts, is_language_code
from .transcribe import Transcript

FINISH = {"stop": "stop", "length": "length", "deadline": "length", "repetition": "length", "cancelled": "stop"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "verbosity", "prediction", "include"),
    }
)
"""Fields of a chat completion that have no effect here."""

IMPOSSIBLE: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "web_search_options": (None,),
}
"""Fields for unsupported features, with the values that do not request the feature."""


def completion(answer: Answer, head: Mapping[str, Any], usage: Mapping[str, Any], details: Any) -> dict[str, Any]:
    """A `chat.completion` object. head: its id, created and model. details: values without an OpenAI field."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.thinking is not None:
        message |= {"reasoning_content": answer.thinking, "reasoning": answer.thinking}
    choice = {"index": 0, "message": message, "finish_reason": FINISH[answer.finish_reason], "logprobs": None}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage, "afnext": details}


def completion_usage(usage: Usage) -> dict[str, Any]:
    """The `usage` object of a chat completion."""
    prompt = usage.audio_tokens + usage.text_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": usage.new_tokens,
        "total_tokens": prompt + usage.new_tokens,
        "prompt_tokens_details": {
            "audio_tokens": usage.audio_tokens,
            "text_tokens": usage.text_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
        "audio_seconds": usage.audio_seconds,
    }


def transcript_usage(transcript: Transcript) -> dict[str, Any]:
    """The `usage` object of a transcription."""
    usage = transcript.usage
    given = usage.audio_tokens + usage.text_tokens
    return {
        "type": "tokens",
        "input_tokens": given,
        "output_tokens": usage.new_tokens,
        "total_tokens": given + usage.new_tokens,
        "input_token_details": {"audio_tokens": usage.audio_tokens, "text_tokens": usage.text_tokens},
        "seconds": transcript.duration,
    }


def plain_text(segments: Iterable[Segment]) -> str:
    """The text without times and speakers."""
    return joined(segment.text for segment in segments)


def transcript_prompt(
    prompts: Prompts,
    *,
    timestamps: bool | None = None,
    speakers: bool | None = None,
    language: str = "",
    hint: str = "",
) -> str:
    """The prompt for a transcript.

    language: the spoken one; codes such as "de" are ignored, because prompts name languages. hint: further information
    about the recording. Raises PromptError if the checkpoint has no prompt for the request.
    """
    prompt = prompts.transcript(timestamps=timestamps, speakers=speakers)
    named = [f"The language is {language}."] if language and not is_language_code(language) else []
    return "\n".join([prompt, *named, *([hint] if hint else [])])
