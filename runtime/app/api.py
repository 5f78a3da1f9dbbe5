"""The Python API: load a model, ask it about audio, stream its answer, chat in batches, listen once and ask often."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from ...kernels.dispatch import free_memory
from ...kernels.errors import AfnextError
from ...quant.recipe import Recipe, recipe
from ..engine.memory import MemoryPlan, parse_bytes, shown_bytes
from ..engine.options import EngineOptions
from ..engine.scheduler import Engine
from ..errors import AudioError, ConfigError
from ..files import read_settings
from ..io.audio import Audio, AudioSource
from ..io.prompt import PromptTemplate
from ..io.tokenizer import Tokenizer
from ..model.audio_flamingo import AudioFlamingo
from ..model.checkpoint import open_with_config
from ..model.hub import BUNDLED, resolve
from ..model.quantized import to_quantize
from .answer import Answer
from .context import Context
from .conversation import Conversation, Message, load_audible
from .live import Live
from .responder import DEFAULT_NEW_TOKENS, AnswerOptions, Progress, Responder, Stream, check_options
from .transcribe import (
    DEFAULT_OVERLAP,
    DEFAULT_WINDOW,
    MAX_SECONDS,
    Transcript,
    prompt_for,
    spans,
    transcribe,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

_log = logging.getLogger("afnext")


def load(
    model: str | PathLike[str] = BUNDLED,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    page_size: int = 256,
    chunk_size: int = 1024,
    encode_batch: int = 4,
    max_batch: int = 32,
    kv: str = "auto",
    release_encoder: bool = False,
    prefix_cache_bytes: int = 1 << 30,
    encoder_cache_bytes: int = 1 << 28,
    draft_tokens: int = 4,
    memory: int | str | None = None,
    quant: str | Recipe | None = None,
    progress: Progress | None = None,
) -> "Model":
    """Load a model from the package, a checkpoint folder or the Hub.

    model: a folder, a name such as "nvidia/audio-flamingo-next-hf", or "afnext-tiny", the small model that comes with
    the package and knows a closed vocabulary. device: "auto" (a GPU if there is one), or what torch takes. dtype:
    "auto" (the checkpoint's; float16 on GPUs without bfloat16), "bfloat16", "float16" or "float32". page_size,
    chunk_size, encode_batch, max_batch, kv, release_encoder, prefix_cache_bytes, encoder_cache_bytes, draft_tokens: see
    `EngineOptions`. memory: what the model and its work may take, in bytes or as "8GB"; None for what the device has
    free. quant: pack dense weights while they are read, by "int8", "int8-w8a8", "int4", "int4-w4a8" or "nf4", a
    spelling such as "int4-g32-zeros", or a recipe.

    Nothing is loaded that could not work: the memory plan (`afnext plan`) is made first, for the longest recording that
    there is room for, and the KV cache never outgrows it. Raises MemoryPlanError with advice when not even a short
    question has room, ValueError for an option out of range, and otherwise an AfnextError that says what to do.
    """
    options = EngineOptions(
        page_size=page_size,
        chunk_size=chunk_size,
        encode_batch=encode_batch,
        max_batch=max_batch,
        kv=kv,
        release_encoder=release_encoder,
        prefix_cache_bytes=prefix_cache_bytes,
        encoder_cache_bytes=encoder_cache_bytes,
        draft_tokens=draft_tokens,
    )
    quantize = recipe(quant) if isinstance(quant, str) else quant
    folder = resolve(model, revision=revision)
    tokenizer = Tokenizer.from_folder(folder)
    template = PromptTemplate.from_folder(folder)
    where = usable_device(device)
    report = progress or (lambda stage, done, total: None)
    options = _within(_free(memory, where), folder, where, dtype, quantize, options)
    network = AudioFlamingo.from_folder(
        folder,
        device=where,
        dtype=lambda stored: _dtype(dtype, stored, where),
        release_encoder=release_encoder,
        quant=quantize,
        progress=lambda done, total: report("loading weights", done, total),
    )
    config = network.config
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise ConfigError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1} and the model {config.decoder.vocab_size} "
            "embeddings. Use the tokenizer and weights of one checkpoint."
        )
    tokenizer.check_against(
        {
            "audio_token_id": config.audio_token_id,
            "audio_bos_token_id": config.audio_bos_token_id,
            "audio_eos_token_id": config.audio_eos_token_id,
        }
    )
    stored = network.config.quantization
    _log.info("loaded %s on %s in %s, weights %s", model, where, network.dtype, stored.name if stored else "dense")
    return Model(network, tokenizer, template, options, _sampling_defaults(folder))


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. Raises AfnextError if it cannot be used."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise AfnextError(f'the device {device!r} cannot be used ({error}); choose "auto", "cpu" or "cuda"') from None


def _dtype(dtype: str | torch.dtype, stored: str, device: torch.device) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = stored
        if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            _log.info("this GPU has no bfloat16; computing in float16")
            name = "float16"
    if name not in ("bfloat16", "float16", "float32"):
        raise AfnextError(f'the dtype {name!r} is not supported; choose "auto", "bfloat16", "float16" or "float32"')
    return getattr(torch, name)


def _free(memory: int | str | None, device: torch.device) -> int:
    if memory is None:
        return free_memory(device)
    return parse_bytes(memory) if isinstance(memory, str) else memory


def _within(
    memory: int,
    folder: Path,
    device: torch.device,
    dtype: str | torch.dtype,
    quant: Recipe | None,
    options: EngineOptions,
) -> EngineOptions:
    """The options with the room for keys and values that `memory` bytes leave. Raises MemoryPlanError for none."""
    _, stored = open_with_config(folder)
    config = to_quantize(stored, quant)
    computed = _dtype(dtype, config.dtype, device)
    as_stored = config == stored and (config.quantization is not None or str(computed) == f"torch.{config.dtype}")
    plan = MemoryPlan(
        config,
        memory,
        gpu=device.type != "cpu",
        dtype=computed,
        audio_seconds=0,
        text_tokens=0,
        new_tokens=min(DEFAULT_NEW_TOKENS, config.decoder.max_positions - 2),
        kv=options.kv,
        page_size=options.page_size,
        chunk_size=options.chunk_size,
        encode_batch=options.encode_batch,
        release_encoder=options.release_encoder,
        mapped=device.type == "cpu" and as_stored,
    )
    room = plan.largest()
    _log.info(
        "%s of %s on %s: room for %d tokens", shown_bytes(room.weights), shown_bytes(memory), device, room.kv_room
    )
    return replace(options, max_kv_tokens=room.kv_room)


def _sampling_defaults(folder: Path) -> dict[str, Any]:
    """What generation_config.json recommends: sampling only where it says do_sample."""
    config = read_settings(folder / "generation_config.json")
    names = ["max_new_tokens", "repetition_penalty"]
    if config.get("do_sample"):
        names += ["temperature", "top_k", "top_p", "min_p"]
    return {name: config[name] for name in names if config.get(name) is not None}


class Model:
    """A loaded model. Its calls may come from several threads at once: their requests share the steps of `engine`."""

    def __init__(
        self,
        network: AudioFlamingo,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        options: EngineOptions,
        sampling_defaults: dict[str, Any],
    ):
        self.network = network
        self.tokenizer = tokenizer
        self.template = template
        self.options = options
        self.engine = Engine(network, options)
        self._responder = Responder(self.engine, network, tokenizer, template, sampling_defaults)

    def ask(
        self,
        audio: AudioSource | list[AudioSource] | None,
        question: str,
        *,
        system: str | None = None,
        **options: "Unpack[AnswerOptions]",
    ) -> Answer:
        """Answer a question about a recording, several, or none.

        audio: a path, bytes, a file object, or a pair (array, rate); a list for several. system: replaces the
        checkpoint's own system message. Raises AudioError, PromptError, ContextLengthError or SamplingError.
        """
        return self.chat([_question(audio, question, system)], **options)[0]

    def stream(
        self,
        audio: AudioSource | list[AudioSource] | None,
        question: str,
        *,
        system: str | None = None,
        **options: "Unpack[AnswerOptions]",
    ) -> Stream:
        """Like `ask`, but gives the answer piece by piece; `stream.answer` is the whole once it has ended.

        The pieces joined are the answer's thinking, then its text.
        """
        return self.stream_chat(_question(audio, question, system), **options)

    def chat(self, conversations: Sequence[Sequence[Message]], **options: "Unpack[AnswerOptions]") -> list[Answer]:
        """Continue several conversations in one batch.

        conversations: lists of {"role": "system" | "user" | "assistant", "content": text or parts}; a part is {"type":
        "text", "text": ...} or {"type": "audio", "audio": source}. Each answer equals the one it would get alone.
        """
        return self._responder.chat(self._load(conversations, options), options)

    def transcribe(
        self,
        audio: AudioSource,
        *,
        window: float | None = None,
        overlap: float = DEFAULT_OVERLAP,
        timestamps: bool = True,
        speakers: bool = True,
        prompt: str | None = None,
        system: str | None = None,
        **options: "Unpack[AnswerOptions]",
    ) -> Transcript:
        """Write down what is said in a recording, with times and speakers.

        The recording, of up to six hours, is heard in windows of `window` seconds (by default 300, or what the model
        can hear), of which each shares `overlap` seconds with the one before; see `merge`. timestamps, speakers:
        whether to ask for them; prompt: what to ask instead. max_new_tokens is that of a window. Whatever the model
        writes comes back: what is no sound transcript is told in `warnings`.
        Raises AudioError for audio or windows that cannot be, and what `ask` raises.
        """
        longest = self.network.config.max_audio_seconds
        length = min(DEFAULT_WINDOW, longest) if window is None else window
        if length > longest:
            raise AudioError(f"a window of {length:g} s is longer than the {longest} s that the model hears at once.")
        recording = load_audible(audio, max_seconds=MAX_SECONDS, truncate=options.pop("truncate", False))
        cuts = spans(recording.duration, length, overlap)
        question = prompt or prompt_for(timestamps=timestamps, speakers=speakers)
        report = options.get("progress") or (lambda stage, done, total: None)

        def ask(piece: Audio, tokens: int) -> Answer:
            limited: AnswerOptions = {"max_new_tokens": tokens, **options}
            return self.ask(piece, question, system=system, **limited)

        return transcribe(recording, cuts, ask, lambda done: report("transcribing", done, recording.duration))

    def stream_chat(self, messages: Sequence[Message], **options: "Unpack[AnswerOptions]") -> Stream:
        """Continue one conversation, giving the answer piece by piece."""
        return self._responder.stream(self._load([messages], options)[0], options)

    @overload
    def listen(self, audio: None = None, *, system: str | None = None) -> Live: ...

    @overload
    def listen(
        self,
        audio: AudioSource | list[AudioSource],
        *,
        system: str | None = None,
        truncate: bool = False,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Context: ...

    def listen(
        self,
        audio: AudioSource | list[AudioSource] | None = None,
        *,
        system: str | None = None,
        truncate: bool = False,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Context | Live:
        """Hear a recording, or several, once, to be asked about any number of times; or without any, begin to hear one
        that is still being recorded.

        What the arguments are, `ask` and `AnswerOptions` say. Raises AudioError, PromptError or ContextLengthError.
        """
        if audio is None:
            return Live(self._responder, system)
        return Context.listen(
            self._responder, _sources(audio), system, truncate=truncate, progress=progress, cancelled=cancelled
        )

    def resume(self, path: str | PathLike[str], audio: AudioSource | list[AudioSource] | None = None) -> Context:
        """Take up what `Context.save` wrote to `path`. audio: if given, it must be what was heard.

        Raises ContextFileError for a file that is damaged or was saved by another model, dtype or kind of KV cache.
        """
        return Context.resume(self._responder, Path(path), None if audio is None else _sources(audio))

    def _load(self, conversations: Sequence[Sequence[Message]], options: AnswerOptions) -> list[Conversation]:
        check_options(options, AnswerOptions)
        return [self._responder.load(messages, truncate=options.get("truncate", False)) for messages in conversations]


def _question(audio: AudioSource | list[AudioSource] | None, question: str, system: str | None) -> list[dict[str, Any]]:
    parts = [{"type": "audio", "audio": source} for source in ([] if audio is None else _sources(audio))]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def _sources(audio: AudioSource | list[AudioSource]) -> list[AudioSource]:
    return audio if isinstance(audio, list) else [audio]
