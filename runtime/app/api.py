"""The Python API: load a model, ask it about audio, stream its answer, chat in batches, listen once and ask often."""

import gc
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import torch

from ...kernels import native
from ...kernels.cpus import use_default_threads
from ...kernels.device_state import TRITON_FLOOR, capability, runs_triton, total_memory
from ...kernels.dispatch import check_forced_operations, forced_backend
from ...kernels.errors import AfnextError
from ...quant.recipe import Recipe, recipe
from ..engine.engine import Engine
from ..engine.executor import Executor, LocalExecutor
from ..engine.memory import parse_bytes
from ..engine.options import EngineOptions, default_chunk_size, encodes_ahead
from ..engine.request import OnUpdate
from ..errors import AudioError, ConfigError, PromptError
from ..io.audio import Audio, AudioSource
from ..io.prompt import PromptTemplate
from ..io.tokenizer import Tokenizer
from ..model.audio_flamingo import AudioFlamingo
from ..model.config import ModelConfig
from ..model.hub import BUNDLED, resolve
from ..model.opened import OpenCheckpoint, open_checkpoint
from ..model.quantized import to_quantize
from .answer import Answer
from .context import Context
from .conversation import Conversation, Message, load_audible
from .generation_config import FILE, GenerationDefaults, generation_defaults
from .lifetime import NotCopyable
from .live import Live
from .loading import NetworkSettings, load_network
from .packed import hint, packed_copy
from .prompts import CARD, Prompts
from .responder import AnswerOptions, Prepared, Progress, Responder, Stream, abandon_all, check_options
from .tensor_parallel import check_ranks, load_parallel
from .transcribe import (
    DEFAULT_OVERLAP,
    DEFAULT_WINDOW,
    MAX_SECONDS,
    Transcriber,
    Transcript,
    TranscriptStream,
    spans,
)

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

_log = logging.getLogger("afnext")


def load(
    model: str | PathLike[str] = BUNDLED,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    page_size: int = 256,
    chunk_size: int | None = None,
    encode_batch: int = 4,
    max_batch: int = 32,
    kv: str = "auto",
    attention: str = "auto",
    release_encoder: bool = False,
    encode_ahead: bool | None = None,
    prefix_cache_bytes: int = 1 << 30,
    encoder_cache_bytes: int = 1 << 28,
    draft_tokens: int = 4,
    batch_invariant: bool = False,
    memory: int | str | None = None,
    quant: str | Recipe | None = None,
    keep_packed: bool = False,
    fit: bool | float = False,
    warmup: bool = False,
    tp: int = 1,
    sp: int = 1,
    progress: Progress | None = None,
) -> "Model":
    """Load a model from the package, a checkpoint folder or the Hub.

    model: a folder, a name such as "nvidia/audio-flamingo-next-hf", or "afnext-tiny", the small model that is bundled
    with the package and has a closed vocabulary. device: "auto" (a GPU if there is one), or a torch device other than
    "mps". dtype: "auto" (the checkpoint's; float16 on GPUs without bfloat16), "bfloat16", "float16" or "float32".
    page_size, chunk_size (None: 1024, on GPUs 2048 from 20 GB on and 4096 from 40 GB on), encode_batch, max_batch, kv,
    attention, release_encoder, encode_ahead (None: on GPUs from 20 GB on), prefix_cache_bytes, encoder_cache_bytes,
    draft_tokens, batch_invariant: see `EngineOptions`. encode_ahead needs the whole model on one device. memory: limit
    for the model and its requests, in bytes or as "8GB"; None for the device's free memory. quant: pack dense weights
    while they are read, as "int8", "int8-w8a8", "fp8", "int4", "int4-w4a8", "nf4", "nvfp4", "mxfp4", "small" or "int3",
    a variant such as "int4-g32-zeros", or a recipe. keep_packed: write the packed weights to afnext's cache folder and
    load them from there, memory-mapped, now and the next time. fit: choose kv, chunk_size, encode_batch,
    release_encoder, encode_ahead and, for dense weights, quant so that `fit` seconds of audio fit into the memory
    (True: the longest audio that the model accepts); changes that cost time are preferred to those that cost accuracy,
    and the choice is logged. tp: number of processes, each with its own GPU, or its share of a CPU's threads, and with
    a part of the decoder and of the KV cache (docs/scaling.md); `memory` is then that of each GPU. If a process fails
    or is killed, all are ended, and every request raises EngineDeadError. sp: like tp, but each process holds the whole
    weights, and long prompts are divided by tokens, with less traffic. warmup: on a GPU, allocate the whole KV cache
    and record the decode steps of every size, so that requests do not wait for it. Kernels are always compiled, or
    loaded from Triton's cache on disk.

    The memory plan (`afnext plan`) is made before loading, for the longest recording that fits, and it limits the KV
    cache. Raises MemoryPlanError with advice if not even a short question fits, ValueError for an option out of range,
    and otherwise an AfnextError that says what to do.
    """
    check_forced_operations()
    where, report = usable_device(device), progress or (lambda stage, done, total: None)
    available = parse_bytes(memory) if isinstance(memory, str) else memory
    gpu = where.type == "cuda"
    size = (available or total_memory(where)) if gpu else 0
    options = EngineOptions(
        page_size=page_size,
        chunk_size=default_chunk_size(size, gpu) if chunk_size is None else chunk_size,
        encode_batch=encode_batch,
        max_batch=max_batch,
        kv=kv,
        attention=attention,
        release_encoder=release_encoder,
        encode_ahead=encodes_ahead(encode_ahead, size, gpu, max(tp, sp)),
        prefix_cache_bytes=prefix_cache_bytes,
        encoder_cache_bytes=encoder_cache_bytes,
        draft_tokens=draft_tokens,
        batch_invariant=batch_invariant,
    )
    quantize = recipe(quant) if isinstance(quant, str) else quant
    checkpoint = open_checkpoint(resolve(model, revision=revision, progress=progress))
    settings = NetworkSettings(str(dtype), quantize, available, options, sequence=sp > 1)
    if fit is not False:
        if max(tp, sp) > 1:
            raise ConfigError("fit chooses settings for one device; leave it out with tp or sp, and see `afnext plan`.")
        settings = settings.fitted(checkpoint, where, None if fit is True else fit)
        quantize = settings.quant
    if keep_packed:
        checkpoint = _kept(checkpoint, quantize, where, report)
    tokenizer = Tokenizer.from_folder(checkpoint.files)
    template = PromptTemplate.from_folder(checkpoint.files)
    if where.type == "cpu":
        use_default_threads()
        if forced_backend() is None:
            native.warn_if_missing()
    if where.type == "cuda" and not runs_triton(where):
        _log.warning(
            "this GPU has compute capability %d.%d and the Triton kernels need %d.%d: the model runs on torch's "
            "kernels, which are slower",
            *(capability(where) or ()),
            *TRITON_FLOOR,
        )
    ranks = check_ranks(to_quantize(checkpoint.config, quantize), where, tp=tp, sp=sp)
    options = settings.within(checkpoint, where, ranks)
    _check_tokenizer(tokenizer, checkpoint.config)

    def loaded(done: int, total: int) -> None:
        report("loading weights", done, total)

    executor: Executor
    if ranks == 1:
        executor = LocalExecutor(load_network(checkpoint, settings, where, progress=loaded), options)
    else:
        executor, options = load_parallel(checkpoint, settings, options, where, ranks, loaded)
    network = executor.model
    stored = network.config.quantization
    _log.info("loaded %s on %s in %s, weights %s", model, where, network.dtype, stored.name if stored else "dense")
    if isinstance(quant, str) and checkpoint.config.quantization is None:
        hint(os.fspath(model), checkpoint.folder, quant, checkpoint.weights.nbytes)
    stated = checkpoint.files.settings(checkpoint.files.find(FILE))
    defaults = generation_defaults(stated, network.config.decoder.vocab_size)
    prompts = Prompts.from_folder(checkpoint.files)
    made = Model(network, tokenizer, template, options, defaults, prompts, executor)
    if runs_triton(where):
        made.engine.rehearse(report)
    if warmup:
        made.engine.warm_up(lambda done, total: report("recording CUDA graphs", done, total))
    return made


def _check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
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


def _kept(checkpoint: OpenCheckpoint, quant: Recipe | None, device: torch.device, report: Progress) -> OpenCheckpoint:
    """The packed copy of a dense checkpoint; a packed checkpoint is returned unchanged."""
    if quant is None and checkpoint.imported:
        quant = checkpoint.config.quantization  # for a GGUF file: convert its blocks once instead of at each load
    elif quant is not None and to_quantize(checkpoint.config, quant) == checkpoint.config:
        return checkpoint
    if quant is None:
        raise ConfigError('keep_packed keeps packed weights: say how to pack them, as in quant="int4".')
    return open_checkpoint(
        packed_copy(
            checkpoint.folder, quant, device=device, progress=lambda done, total: report("packing weights", done, total)
        )
    )


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. Raises AfnextError if it cannot be used."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device).partition(":")[0] == "mps":
        raise AfnextError(
            'afnext does not compute on Apple\'s GPUs ("mps"); choose "cpu", which has kernels for Apple silicon'
        )
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise AfnextError(f'the device {device!r} cannot be used ({error}); choose "auto", "cpu" or "cuda"') from None


class Model(NotCopyable):
    """A loaded model. Several threads may call it at once: their requests share the steps of `engine`.

    It holds its weights and KV pages until it is closed, left as a `with` block, or dropped.
    """

    def __init__(
        self,
        network: AudioFlamingo,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        options: EngineOptions,
        defaults: GenerationDefaults,
        prompts: Prompts = CARD,
        executor: Executor | None = None,
    ):
        """executor: computes the operations; by default `network` in this process."""
        self.tokenizer = tokenizer
        self.template = template
        self.options = options
        self.prompts = prompts
        self._responder = Responder(Engine(network, options, executor), network, tokenizer, template, defaults)

    @property
    def engine(self) -> Engine:
        """The engine that runs the requests. Raises AfnextError after the model has been closed."""
        return self._responder.engine

    @property
    def network(self) -> AudioFlamingo:
        """The network with its weights. Raises AfnextError after the model has been closed."""
        return self._responder.network

    def close(self) -> None:
        """Stop the engine and free weights and KV pages. Answers in progress are completed; later calls, also of the
        model's contexts, raise AfnextError. Idempotent."""
        self._responder.close()
        gc.collect()  # modules and recorded steps refer to each other
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _instead(self) -> str:
        return "it holds weights and a KV cache. Share it between threads, or load one in each process."

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
        return self.chat([question_messages(audio, question, system)], **options)[0]

    def stream(
        self,
        audio: AudioSource | list[AudioSource] | None,
        question: str,
        *,
        system: str | None = None,
        **options: "Unpack[AnswerOptions]",
    ) -> Stream:
        """Like `ask`, but yields the answer piece by piece; afterwards `stream.answer` is the whole answer.

        The joined pieces are the answer's thinking followed by its text.
        """
        return self.stream_chat(question_messages(audio, question, system), **options)

    def chat(
        self, conversations: Sequence[Sequence[Message]] | Sequence[Message], **options: "Unpack[AnswerOptions]"
    ) -> list[Answer]:
        """Continue several conversations in one batch, or a single one, which gives a list of one answer.

        conversations: lists of {"role": "system" | "user" | "assistant", "content": text or parts}; a part is {"type":
        "text", "text": ...} or {"type": "audio", "audio": source}. Each answer is the same as if its conversation ran
        alone: bit for bit if the model was loaded with batch_invariant, otherwise up to rounding, which depends on how
        many tokens are computed together. In bfloat16, float16 or with rounded activations, rounding can change a token
        when two scores are nearly equal; the tokens after it then differ, too.
        """
        return self._responder.chat(self._load(_several(conversations), options), options)

    def transcribe(
        self,
        audio: AudioSource,
        *,
        window: float | None = None,
        overlap: float = DEFAULT_OVERLAP,
        timestamps: bool | None = None,
        speakers: bool | None = None,
        prompt: str | None = None,
        system: str | None = None,
        **options: "Unpack[AnswerOptions]",
    ) -> Transcript:
        """Transcribe the speech in a recording, with times and speakers.

        The recording, of up to six hours, is transcribed in windows of `window` seconds (by default 300, or the model's
        limit), each of which overlaps the previous one by `overlap` seconds; see `Merger`. timestamps, speakers:
        whether to ask for them; None asks if the checkpoint has a prompt for it. prompt: replaces the checkpoint's
        prompt. max_new_tokens: limit of each window's answer and thinking; by default 12 tokens per second of audio
        plus 128 for the answer, plus the checkpoint's max_new_tokens for thinking. `Transcript.windows` has the model's
        text; malformed output is reported in `Transcript.warnings`. Raises AudioError for audio or windows that cannot
        be transcribed, PromptError if the checkpoint has no prompt for the request, and the errors of `ask`.
        """
        stream = self.stream_transcribe(
            audio,
            window=window,
            overlap=overlap,
            timestamps=timestamps,
            speakers=speakers,
            prompt=prompt,
            system=system,
            **options,
        )
        return stream.finish()

    def stream_transcribe(
        self,
        audio: AudioSource,
        *,
        window: float | None = None,
        overlap: float = DEFAULT_OVERLAP,
        timestamps: bool | None = None,
        speakers: bool | None = None,
        prompt: str | None = None,
        system: str | None = None,
        **options: "Unpack[AnswerOptions]",
    ) -> TranscriptStream:
        """Like `transcribe`, but yields each segment as soon as no later window can change it.

        Afterwards `stream.transcript` is the whole transcript.
        """
        check_options(options, AnswerOptions)
        longest = self.network.config.max_audio_seconds
        length = min(DEFAULT_WINDOW, longest) if window is None else window
        if length > longest:
            raise AudioError(f"a window of {length:g} s is longer than the {longest} s that the model hears at once.")
        question = prompt or self.prompts.transcript(timestamps=timestamps, speakers=speakers)
        recording = load_audible(audio, max_seconds=MAX_SECONDS, truncate=options.pop("truncate", False))
        cuts = spans(recording.duration, length, overlap)
        report = options.get("progress") or (lambda stage, done, total: None)
        if "max_new_tokens" in options:
            options.setdefault("max_answer_tokens", options["max_new_tokens"])

        def ask(piece: Audio, tokens: int) -> Answer:
            limited: AnswerOptions = {"max_answer_tokens": tokens, **options}
            return self.ask(piece, question, system=system, **limited)

        transcriber = Transcriber(ask, self.tokenizer.decode, self.prompts.no_speech)
        return TranscriptStream(
            recording, cuts, transcriber.hear, lambda done: report("transcribing", done, recording.duration)
        )

    def stream_chat(self, messages: Sequence[Message], **options: "Unpack[AnswerOptions]") -> Stream:
        """Continue one conversation, yielding the answer piece by piece."""
        return self._responder.stream(self._load([messages], options)[0], options)

    def prepare_chat(self, messages: Sequence[Message], options: AnswerOptions, on_update: OnUpdate) -> Prepared:
        """The engine's request for a conversation; `on_update` notifies the caller. For `AsyncModel`."""
        (conversation,) = self._load([messages], options)
        try:
            return self._responder.prepare(conversation, options, on_update=on_update)
        except BaseException:
            conversation.abandon()
            raise

    @overload
    def listen(self, audio: None = None, *, system: str | None = None, salt: bytes = b"") -> Live: ...

    @overload
    def listen(
        self,
        audio: AudioSource | list[AudioSource],
        *,
        system: str | None = None,
        salt: bytes = b"",
        truncate: bool = False,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Context: ...

    def listen(
        self,
        audio: AudioSource | list[AudioSource] | None = None,
        *,
        system: str | None = None,
        salt: bytes = b"",
        truncate: bool = False,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Context | Live:
        """Process one or several recordings once, for any number of questions; without one, start a live recording.

        salt: see `Request`; other arguments: see `ask` and `AnswerOptions`. Raises AudioError, PromptError or
        ContextLengthError.
        """
        if audio is None:
            return Live(self._responder, system, salt)
        return Context.listen(
            self._responder,
            _sources(audio),
            system,
            salt=salt,
            truncate=truncate,
            progress=progress,
            cancelled=cancelled,
        )

    def resume(self, path: str | PathLike[str], audio: AudioSource | list[AudioSource] | None = None) -> Context:
        """Load a context that `Context.save` wrote to `path`. audio: if given, it must be the saved context's audio.

        Raises ContextFileError for a file that is damaged or was saved by another model, dtype or kind of KV cache.
        """
        return Context.resume(self._responder, Path(path), None if audio is None else _sources(audio))

    def _load(self, conversations: Sequence[Sequence[Message]], options: AnswerOptions) -> list[Conversation]:
        check_options(options, AnswerOptions)
        loaded: list[Conversation] = []
        try:
            for messages in conversations:
                loaded.append(self._responder.load(messages, options))
        except BaseException:
            abandon_all(loaded)
            raise
        return loaded


def _several(conversations: Sequence[Sequence[Message]] | Sequence[Message]) -> list[Sequence[Message]]:
    """A list of conversations; a single conversation becomes a list of one. Raises PromptError for anything else."""
    given: list[Any] = [conversations] if isinstance(conversations, Mapping | str) else list(conversations)
    messages = sum(isinstance(item, Mapping) for item in given)
    if isinstance(conversations, Mapping | str) or 0 < messages < len(given) or any(isinstance(i, str) for i in given):
        raise PromptError(
            'chat takes conversations, each a list of messages: chat([[{"role": "user", "content": "..."}], ...])'
        )
    return [given] if messages else given


def question_messages(
    audio: AudioSource | list[AudioSource] | None, question: str, system: str | None
) -> list[dict[str, Any]]:
    """The messages of one question about recordings, in the format of `Model.chat`."""
    parts = [{"type": "audio", "audio": source} for source in ([] if audio is None else _sources(audio))]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def _sources(audio: AudioSource | list[AudioSource]) -> list[AudioSource]:
    return audio if isinstance(audio, list) else [audio]
