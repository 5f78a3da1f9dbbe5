"""The loss by quantization, scheme by scheme, with and without calibration.

    layers    RMS error of a layer's output over the output's RMS, on held-out inputs: normal weights and inputs, and
              heavy-tailed weights (Student's t, 4 degrees of freedom) with inputs that span a quarter of the dimensions
              and have a few channels 30 times larger than the rest
    speech    Whisper tiny.en on recordings with transcripts: word errors, and the divergence from the dense model
    model     a checkpoint of this family on an asr manifest: word errors

Methods: `nearest` takes the nearest codes (the scales of int4 are searched); `scaling` and `feedback` each use one half
of the calibration in `quant.calibrate`, `both` uses both. Results are saved row by row, so a stopped run can continue.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels.packed_weight import Packed
from ...quant.awq import Fold
from ...quant.calibrate import WITH_FEEDBACK, Calibration, InputStatistics, quantize_stage
from ...quant.recipe import RECIPES, recipe
from ...quant.scheme import Int4, Int8, Scheme, parse_scheme
from ...runtime.app.api import load
from ...runtime.app.calibration import calibrate, read_examples
from ..ops.libraries import available
from .answers import run_quality
from .data import read_manifest

METHODS: dict[str, Calibration | None] = {
    "nearest": None,
    "scaling": Calibration(feedback=False),
    "feedback": Calibration(scaling=False),
    "both": Calibration(),
}
DECODER_LAYER = "decoder.layers.0.mlp.up_proj"
SCHEMES = tuple(
    dict.fromkeys(
        (
            *(str(recipe(name).scheme(DECODER_LAYER)) for name in RECIPES),
            *("int8-g32", "int3-g128"),
            *(f"int4-g{group}{zeros}" for zeros in ("", "-zeros") for group in (32, 64, 128)),
        )
    )
)
"""That of the decoder's MLPs in every recipe, and other groups."""
MODEL_RECIPES = tuple(dict.fromkeys((*(recipe(name).name for name in RECIPES), *SCHEMES)))
"""What a checkpoint is quantized by."""
HEADS = (Int8(), Int4(32, symmetric=False), Int4(64, symmetric=False), Int4(32))
"""What else the head of Whisper is rounded to, alone."""
_LAYER = Fold("norm", ("layer",))
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """One measurement. part: layers, speech or model; case: within the part; values: the results."""

    part: str
    case: str
    scheme: str
    method: str
    values: dict[str, float]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The identity of the measurement."""
        return self.part, self.case, self.scheme, self.method


class Results:
    """The rows in a JSON file, to which every new row is written at once."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            self.rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]

    def __contains__(self, key: tuple[str, str, str, str]) -> bool:
        return any(row.key == key for row in self.rows)

    def add(self, row: Row) -> None:
        """Add and save a row."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps([asdict(row) for row in self.rows], indent=1) + "\n", encoding="utf-8")


def variants(schemes: Sequence[str] = SCHEMES) -> Iterator[tuple[str, str]]:
    """Every (scheme, method) in the order of the tables. Without feedback there is nothing but scaling, and int8 gains
    little from either alone."""
    for scheme in schemes:
        most = "both" if isinstance(parse_scheme(scheme), WITH_FEEDBACK) else "scaling"
        for method in METHODS:
            if scheme.startswith(("int3", "int4")) or method in ("nearest", most):
                yield scheme, method


def bits_of(scheme: Scheme, inputs: int = 4096) -> float:
    """Bits per weight, including scales and zeros, for channels of `inputs` inputs."""
    stored = scheme.stored((1, inputs)).values()
    return 8 * sum(torch.Size(part.shape).numel() * part.dtypes[0].itemsize for part in stored) / inputs


def layer_case(name: str, rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [outputs, inputs], calibration inputs and held-out inputs [rows, inputs]; deterministic."""
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(outputs, inputs, generator=generator)
    if name == "random":
        x = torch.randn(2 * rows, inputs, generator=generator)
        return normal * inputs**-0.5, x[:rows], x[rows:]
    chi = torch.randn(4, outputs, inputs, generator=generator).square().mean(0).sqrt()
    mixing = torch.randn(inputs // 4, inputs, generator=generator)
    mixing[:, torch.randperm(inputs, generator=generator)[: inputs // 64]] *= 30
    x = torch.randn(2 * rows, inputs // 4, generator=generator) @ mixing
    x += 0.1 * torch.randn(x.shape, generator=generator)
    return normal / chi * inputs**-0.5, x[:rows], x[rows:]


def layer_error(weight: Tensor, calibration: Tensor, held_out: Tensor, scheme: Scheme, method: str) -> float:
    """RMS error of the layer's output over the RMS of the output, on `held_out`."""
    options = METHODS[method]
    parameters = {"norm.weight": torch.ones(weight.shape[1]), "layer.weight": weight}
    if options is None:
        result: dict[str, Tensor | Packed] = {**parameters, "layer.weight": scheme.quantize(weight)}
    else:
        statistics = InputStatistics(weight.shape[1], len(calibration), options.rows)
        statistics.add(calibration)
        result = dict(quantize_stage(parameters, [_LAYER], {"layer": statistics}, _scheme_of(scheme), options))
    packed, divided = result["layer.weight"], result["norm.weight"]
    assert isinstance(packed, Packed)
    assert isinstance(divided, Tensor)
    actual = scheme.linear(held_out * divided, packed, None)
    exact = held_out.double() @ weight.double().T
    return float((actual.double() - exact).norm() / exact.norm())


def _scheme_of(scheme: Scheme) -> Callable[[str], Scheme | None]:
    return lambda layer: scheme if layer == "layer" else None


def measure_layers(
    results: Results, schemes: Sequence[str] = SCHEMES, *, rows: int = 2048, inputs: int = 1024, outputs: int = 512
) -> None:
    """Add the missing rows of part `layers`, with bfloat16's own error as the first of each case."""
    for case in ("random", "heavy-tailed"):
        weight, calibration, held_out = layer_case(case, rows, inputs, outputs)
        if ("layers", case, "bf16", "nearest") not in results:
            exact = held_out.double() @ weight.double().T
            rounded = nn.functional.linear(held_out.bfloat16(), weight.bfloat16()).double()
            results.add(
                Row("layers", case, "bf16", "nearest", {"error": float((rounded - exact).norm() / exact.norm())})
            )
        for name, method in variants(schemes):
            if ("layers", case, name, method) not in results:
                scheme = parse_scheme(name)
                assert scheme is not None
                error = layer_error(weight, calibration, held_out, scheme, method)
                results.add(Row("layers", case, name, method, {"error": error}))


def _speech_runs(schemes: Sequence[str]) -> Iterator[tuple[str, str, str, dict[str, Scheme]]]:
    """The measurements on Whisper: case, name, method, and the scheme of each quantized part."""
    from .quantized_whisper import DECODER_ATTENTION, DECODER_MLP, EMBEDDINGS, HEAD, PARTS, recipe_parts

    yield "everything", "dense", "nearest", {}
    for name, method in variants(schemes):
        scheme = parse_scheme(name)
        assert scheme is not None
        yield "everything", name, method, dict.fromkeys(PARTS, scheme)
    for part in PARTS:
        yield f"{part} alone", "int4-g64", "nearest", {part: Int4(64)}
    for name in RECIPES:
        parts = recipe_parts(recipe(name))
        if len(set(parts.values())) > 1:
            yield "recipes", name, "nearest", parts
    for mlp in ("int4-g64", "int3-g64", "int3-g128"):
        scheme = parse_scheme(mlp)
        assert scheme is not None
        for method in ("nearest", "both"):
            yield "decoder alone, attention int4-g64", mlp, method, {DECODER_ATTENTION: Int4(64), DECODER_MLP: scheme}
    if available("gguf") and available("xllamacpp"):
        from .q4_k import KIND, Q4K

        # Like audio.cpp: everything but the embeddings.
        yield "recipes", KIND, "nearest", {part: Q4K() for part in PARTS if part != EMBEDDINGS}
    for scheme in HEADS:
        yield f"{HEAD} alone", str(scheme), "nearest", {HEAD: scheme}


def measure_speech(
    results: Results,
    whisper: Path,
    data: Path,
    recordings: Path,
    schemes: Sequence[str] = SCHEMES,
    *,
    progress: Progress = lambda done, total: None,
) -> None:
    """Add the rows of part `speech`: `data` is an asr manifest, `recordings` a folder to calibrate on.

    whisper: the folder of model.bin and tokenizer.json. Recipes with one scheme for everything are among the schemes.
    llama.cpp rounds Q4_K, which has no row without it.
    """
    from .quantized_whisper import Clip, Whisper, load_clip, measure

    model = Whisper(whisper)
    clips = [load_clip(item.audio, item.text) for item in read_manifest(data, "asr").items if item.audio is not None]
    encoded = [model.encode(clip) for clip in clips]
    dense = [(tokens := model.transcribe(x), model.scores(x, tokens)) for x in encoded]
    runs = list(_speech_runs(schemes))
    calibration: list[tuple[Clip, list[int]]] = []
    for number, (case, name, method, parts) in enumerate(runs):
        progress(number, len(runs))
        if ("speech", case, name, method) in results:
            continue
        if METHODS[method] is not None and not calibration:
            model.reset()
            heard = [load_clip(example.audio) for example in read_examples(recordings)]
            calibration = [(clip, model.transcribe(model.encode(clip))) for clip in heard]
        model.reset()
        if parts:
            model.quantize(parts, METHODS[method], calibration)
        values = measure(model, clips, dense)
        results.add(Row("speech", case, name, method, {**asdict(values), "rate": values.errors / values.words}))


def measure_model(
    results: Results,
    folder: Path,
    data: Path,
    recordings: Path,
    recipes: Sequence[str],
    *,
    progress: Progress = lambda done, total: None,
) -> None:
    """Add the rows of part `model`: a checkpoint dense, by each recipe, and by each calibrated on `recordings`."""
    runs = [("dense", "nearest"), *((name, method) for name in recipes for method in ("nearest", "both"))]
    for number, (name, method) in enumerate(runs):
        progress(number, len(runs))
        if ("model", folder.name, name, method) in results:
            continue
        with tempfile.TemporaryDirectory() as work:
            options = METHODS[method]
            if options is None:
                model = load(folder, quant=None if name == "dense" else name)
            else:
                calibrate(folder, Path(work, "model"), recipe(name), recordings, options=options)
                model = load(Path(work, "model"))
            record = run_quality(model, data, Path(work, "rows.csv"), task="asr")
            values = {key: float(value) for key, value in record.values.items() if isinstance(value, int | float)}
            results.add(Row("model", folder.name, name, method, values))


def tables(rows: Sequence[Row]) -> str:
    """The results in Markdown: a table per part, a line per scheme, a column per method."""
    written = ["# What quantization costs\n"]
    cases = dict.fromkeys((row.part, row.case) for row in rows)
    for part, title, shown in (
        ("layers", "Error of a layer's output, %", lambda row: f"{100 * row.values['error']:.3g}"),
        ("speech", "Whisper tiny.en: word errors, and divergence from the dense model in thousandths of a nat a token",
         lambda row: f"{row.values['errors']:.0f} ({1000 * row.values['divergence']:.3g})"),
        ("model", "Word error rate of a checkpoint, %", lambda row: f"{100 * row.values['wer']:.2f}"),
    ):  # fmt: skip
        for case in (case for at, case in cases if at == part):
            chosen = [row for row in rows if (row.part, row.case) == (part, case)]
            written += [f"\n## {title}: {case}\n", *_table(chosen, shown)]
    return "\n".join(written) + "\n"


def _table(rows: Sequence[Row], shown: Callable[[Row], str]) -> Iterator[str]:
    yield f"| scheme | bits | {' | '.join(METHODS)} |"
    yield "| --- " * (2 + len(METHODS)) + "|"
    names = dict.fromkeys(row.scheme for row in rows)
    for name in [*(name for name in names if name not in SCHEMES), *(name for name in SCHEMES if name in names)]:
        cells = {row.method: shown(row) for row in rows if row.scheme == name}
        bits = "16" if name in ("dense", "bf16") else _bits(name)
        yield f"| {name} | {bits} | {' | '.join(cells.get(method, '') for method in METHODS)} |"


def _bits(name: str) -> str:
    """Bits per weight in the decoder's layers, for a scheme, a recipe or a format of GGUF files."""
    if name == "Q4_K":
        return "4.5"
    scheme = recipe(name).scheme(DECODER_LAYER) if name in RECIPES else parse_scheme(name)
    assert scheme is not None
    return f"{bits_of(scheme):.3g}"
