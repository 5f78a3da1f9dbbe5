"""Options shared by several commands, declared once: single options, and groups of options.

Nothing here imports torch, so that `--help` is fast; tests compare the choices with those of the library.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from ...model.hub import BUNDLED, SHORT_NAMES

if TYPE_CHECKING:
    from ..api import Model
    from ..responder import AnswerOptions, Progress

T = TypeVar("T")
RECIPES = ("int8", "int8-w8a8", "fp8", "int4", "int4-w4a8", "nf4", "nvfp4", "mxfp4", "small", "int3")
DENSE = "dense"
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


class KV(str, Enum):
    """Formats of keys and values."""

    auto = "auto"
    int8 = "int8"
    fp8 = "fp8"
    int4 = "int4"


class Attention(str, Enum):
    """How prompts attend."""

    auto = "auto"
    int8 = "int8"


class Format(str, Enum):
    """Formats of a transcript."""

    text = "text"
    json = "json"
    ndjson = "ndjson"
    srt = "srt"
    vtt = "vtt"


def dtype_name(text: str) -> str:
    """The full name of a dtype or of its abbreviation. Raises typer.BadParameter for an unknown one."""
    name = _DTYPES.get(text.lower(), text.lower())
    if name not in ("auto", *_DTYPES.values()):
        raise typer.BadParameter(f"{text!r} is not one of auto, bfloat16 (bf16), float16 (fp16), float32 (fp32).")
    return name


def scheme_name(text: str) -> str:
    """The scheme's name unchanged; the library checks it. Raises typer.BadParameter for the name of a dtype."""
    if text.lower() in {"auto", *_DTYPES, *_DTYPES.values()}:
        raise typer.BadParameter(f"{text!r} is a dtype, not a scheme; give it with --dtype.")
    return text.lower()


def memory_size(text: str) -> str:
    """The amount unchanged. Raises typer.BadParameter for a number without a unit."""
    if text.strip().isdigit() and len(text.strip()) < 8:
        raise typer.BadParameter(f"{text!r} has no unit; write {text.strip()}GB.")
    return text


def question_text(text: str | None) -> str | None:
    """The question unchanged. Raises typer.BadParameter for an empty one, and for bytes that are not UTF-8."""
    if text is not None and not text.strip():
        raise typer.BadParameter("the question is empty; ask something.")
    if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
        raise typer.BadParameter("the question is not valid UTF-8.")
    return text


ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="AFNEXT_MODEL",
        help=f"A checkpoint folder, a name on the Hub, or a short name: {', '.join(SHORT_NAMES)}.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...; auto is a GPU if there is one.")]
DTypeOption = Annotated[
    str,
    typer.Option(
        parser=dtype_name,
        metavar="DTYPE",
        help="Dtype to compute in: bfloat16 (bf16), float16 (fp16), float32 (fp32); auto takes the checkpoint's.",
    ),
]
KVOption = Annotated[
    KV,
    typer.Option(
        help="How keys and values are stored: int8 and fp8 halve the memory of the context, int4 halves that; auto "
        "keeps the dtype.",
    ),
]
ChunkOption = Annotated[
    int | None,
    typer.Option(
        help="Prompt tokens per prefill step; fewer take less memory.", min=1, show_default="1024 to 4096, by device"
    ),
]
EncodeBatchOption = Annotated[int, typer.Option(help="Audio windows encoded at once.", min=1)]
ReleaseOption = Annotated[
    bool,
    typer.Option(
        "--release-encoder",
        help="Keep the encoder's layers off the GPU and copy them there as they compute.",
    ),
]
AheadOption = Annotated[
    bool | None,
    typer.Option(
        "--encode-ahead/--no-encode-ahead",
        help="On a GPU, encode the audio of the next chunk while a chunk is computed; needs more memory.",
        show_default="on GPUs from 20 GB on",
    ),
]
SystemOption = Annotated[str | None, typer.Option(help="Replaces the checkpoint's system message.")]
TruncateOption = Annotated[bool, typer.Option("--truncate", help="Cut audio that is too long instead of refusing it.")]
TaskOption = Annotated[
    str | None,
    typer.Option(help="Use the model card's prompt for a task instead of a question; see `afnext tasks`."),
]
ToOption = Annotated[
    str | None, typer.Option("--to", metavar="LANGUAGE", help="For --task ast: the language to translate into.")
]
FromOption = Annotated[
    str | None, typer.Option("--from", metavar="LANGUAGE", help="For --task ast: the language that is spoken.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no timings.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log which implementations run.")]


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded."""

    model: ModelOption = BUNDLED
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None
    device: DeviceOption = "auto"
    dtype: DTypeOption = "auto"
    quant: Annotated[
        str,
        typer.Option(
            "--quant",
            "--scheme",
            parser=scheme_name,
            metavar="SCHEME",
            help=f"Pack dense weights while loading: {', '.join(RECIPES)}, int4-g32, ...; see `afnext quantize`.",
        ),
    ] = DENSE
    keep_packed: Annotated[
        bool,
        typer.Option(
            "--keep-packed",
            help="With --quant: keep the packed copy, and load it the next time.",
        ),
    ] = False
    fit: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Choose --kv, --quant and the like so that this many seconds of audio fit into memory.",
            min=1.0,
        ),
    ] = None
    kv: KVOption = KV.auto
    attention: Annotated[
        Attention,
        typer.Option(help="With --kv int8: read prompts faster by products of 8 bits, rounded; auto keeps the dtype."),
    ] = Attention.auto
    memory: Annotated[
        str | None,
        typer.Option(
            parser=memory_size,
            metavar="SIZE",
            help="Memory limit of the model and its requests, such as 8GB; by default the free memory.",
        ),
    ] = None
    chunk_size: ChunkOption = None
    encode_batch: EncodeBatchOption = 4
    release_encoder: ReleaseOption = False
    encode_ahead: AheadOption = None
    draft_tokens: Annotated[
        int,
        typer.Option(
            help="Speculative tokens per step; 0 turns speculation off. The answer stays the same.",
            min=0,
        ),
    ] = 4
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            help="Compute each answer bit for bit as if it ran alone; some steps take longer.",
        ),
    ] = False
    warmup: Annotated[
        bool,
        typer.Option(
            "--warmup",
            help="On a GPU: allocate the KV cache and record all CUDA graphs before the first request.",
        ),
    ] = False
    tp: Annotated[
        int,
        typer.Option(
            help="GPUs, or processes on a CPU, that share the decoder and its KV cache; see docs/scaling.md.",
            min=1,
        ),
    ] = 1
    sp: Annotated[
        int,
        typer.Option(help="Like --tp with the whole weights on each, and long prompts divided by tokens.", min=1),
    ] = 1
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads to compute with.", min=1, show_default="cores, within the CPU quota"),
    ] = None

    def load(self, progress: "Progress | None" = None) -> "Model":
        """Load the model. Raises the errors of `afnext.load`."""
        from ....kernels.cpus import use_threads
        from ..api import load

        if self.threads is not None:
            use_threads(self.threads)
        return load(
            self.model,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            quant=None if self.quant == DENSE else self.quant,
            kv=self.kv.value,
            attention=self.attention.value,
            keep_packed=self.keep_packed,
            fit=False if self.fit is None else self.fit,
            memory=self.memory,
            chunk_size=self.chunk_size,
            encode_batch=self.encode_batch,
            release_encoder=self.release_encoder,
            encode_ahead=self.encode_ahead,
            draft_tokens=self.draft_tokens,
            batch_invariant=self.batch_invariant,
            warmup=self.warmup,
            tp=self.tp,
            sp=self.sp,
            progress=progress,
        )


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is generated. None means the value in the checkpoint's generation_config.json."""

    max_new_tokens: Annotated[int | None, typer.Option(help="Limit of the answer's length.", min=1)] = None
    temperature: Annotated[float | None, typer.Option(help="0 always takes the most likely token.", min=0.0)] = None
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample from this many of the most likely tokens; 0 for all."),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the most likely tokens up to this probability."),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Leave out tokens less likely than this share of the most likely one."),
    ] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")] = None
    stop_repetition: Annotated[
        bool,
        typer.Option(
            "--stop-repetition",
            help="End an answer that repeats itself; repetition is always reported.",
        ),
    ] = False
    seed: Annotated[int | None, typer.Option(help="Makes a sampled answer reproducible.")] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the answer before this text; repeat for more."),
    ] = None

    def given(self) -> "AnswerOptions":
        """The options that were given."""
        values: Any = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in list(values.items()):
            if value is None or value is False or value == []:
                del values[name]
        return values


@dataclass(frozen=True)
class RayOptions:
    """Whether and how to run on Ray; see docs/scaling.md."""

    ray: Annotated[bool, typer.Option("--ray", help="Run replicas of the model on Ray; see docs/scaling.md.")] = False
    ray_address: Annotated[
        str | None,
        typer.Option(help="With --ray: a running cluster, auto or HOST:PORT; otherwise one is started here."),
    ] = None
    replicas: Annotated[int, typer.Option(help="With --ray: copies of the model.", min=1)] = 1
    gpus_per_replica: Annotated[
        float | None,
        typer.Option(help="With --ray: GPUs of each replica, by default one per --tp or --sp if there are any.", min=0),
    ] = None

    def check(self) -> None:
        """Raise typer.BadParameter for options that need --ray."""
        for option in fields(self):
            if not self.ray and getattr(self, option.name) != option.default:
                raise typer.BadParameter("it belongs to --ray.", param_hint=f"--{option.name.replace('_', '-')}")


@dataclass(frozen=True)
class OutputOptions:
    """Options of the output."""

    as_json: JsonOption = False
    quiet: QuietOption = False
    verbose: VerboseOption = False

    @property
    def silent(self) -> bool:
        """Whether progress and notes are suppressed."""
        return self.quiet or self.as_json


def grouped(command: Callable[..., T]) -> Callable[..., T]:
    """The command with each parameter that is annotated with a dataclass replaced by the dataclass's fields."""
    hints = get_type_hints(command, include_extras=True)
    taken = {name: hints[name] for name in inspect.signature(command).parameters}
    groups = {name: hint for name, hint in taken.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    shared: list[inspect.Parameter] = []  # after the command's own, so that help begins with these
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            types = get_type_hints(groups[name], include_extras=True)
            members = {field.name: (field.default, types[field.name]) for field in fields(groups[name])}
        else:
            members = {name: (parameter.default, hints[name])}
        (shared if name in groups else parameters).extend(
            inspect.Parameter(member, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for member, (default, annotation) in members.items()
        )
    parameters += shared

    @wraps(command)
    def expanded(**values: Any) -> T:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return command(**values)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded
