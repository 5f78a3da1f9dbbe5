"""The options that several commands share, each with its help."""

from enum import Enum
from typing import Annotated

import typer

from ...quant.recipe import RECIPES


class DType(str, Enum):
    """What activations and dense weights are computed in."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class KV(str, Enum):
    """What keys and values are stored in."""

    auto = "auto"
    int8 = "int8"


class Format(str, Enum):
    """What a transcript is written as."""

    text = "text"
    json = "json"
    srt = "srt"
    vtt = "vtt"


ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="AFNEXT_MODEL",
        help="Checkpoint folder, a name on the Hub, or the small model that comes with afnext.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DTypeOption = Annotated[DType, typer.Option(help="auto takes the checkpoint's.")]
KVOption = Annotated[KV, typer.Option(help="int8 halves the memory of the context; auto keeps it in the dtype.")]
QuantOption = Annotated[
    str | None, typer.Option(help=f"Pack dense weights while loading: {', '.join(RECIPES)}; see quantize.")
]
SystemOption = Annotated[str | None, typer.Option(help="Replaces the checkpoint's system message.")]
NewTokensOption = Annotated[int | None, typer.Option(help="Upper bound of the answer's length.", min=1)]
TemperatureOption = Annotated[float | None, typer.Option(help="0 is greedy.", min=0.0)]
TopPOption = Annotated[float | None, typer.Option(help="Sample from the most likely tokens up to this probability.")]
PenaltyOption = Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")]
SeedOption = Annotated[int | None, typer.Option(help="Repeats a sampled answer.")]
TruncateOption = Annotated[bool, typer.Option("--truncate", help="Cut audio that is too long instead of refusing it.")]
ChunkOption = Annotated[int, typer.Option(help="Prompt tokens a prefill step: less memory when smaller.", min=1)]
ReleaseOption = Annotated[
    bool, typer.Option("--release-encoder", help="Keep the encoder's layers off the GPU, lent to it one by one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no timings.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log which implementation runs.")]
