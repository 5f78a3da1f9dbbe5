"""The end-to-end benchmark: every stage from an audio file to new tokens, beside the reference, on any machine.

Both sides run interleaved in one process, so that drift of the machine affects both; outputs are compared before a
speedup is reported. Without the real weights a random checkpoint of the true width is used. On machines that cannot
hold all layers, `--random full-width:ENC,DEC` measures few of them, and the time of the full model is extrapolated from
the cost of a layer: T(1) + (layers - 1) * (T(n) - T(1)) / (n - 1). Such records say "extrapolated".
"""

import tempfile
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...kernels.errors import AfnextError
from ...quant.recipe import recipe
from ...runtime.app.api import Model, load
from ...runtime.io.audio import load_audio
from ...runtime.model.hub import resolve
from ..core.ceilings import measured_ceilings
from ..core.machine import energy_joules, machine, peak_device_memory, peak_rss, reset_peaks
from ..core.random_checkpoint import write_random_checkpoint
from ..core.record import SCHEMES, Record, append, finished, recipe_of
from ..core.timing import Samples, clock_for, compare_outputs, measure_interleaved, speedup
from ..core.tolerances import tolerance
from .e2e_subjects import AfnextSubject, TransformersSubject, variants

FULL_LAYERS, FULL_WIDTH = (32, 28), (1280, 3584)
_STAGES = ("log-mel", "encode", "prefill", "decode", "first token", "total")
_LAYERED = ("encode", "prefill", "decode")


@dataclass(frozen=True)
class Plan:
    """What to measure. audio_seconds, schemes and batches are crossed; decode alone depends on the batch."""

    audio_seconds: Sequence[float]
    schemes: Sequence[str]
    batches: Sequence[int]
    new_tokens: int
    repeats: int


def run_e2e(
    *,
    out: Path,
    model: str | None = None,
    random: str | None = None,
    baseline: str = "transformers",
    audio_seconds: Sequence[float] = (30.0, 300.0),
    schemes: Sequence[str] = ("bf16",),
    batches: Sequence[int] = (1,),
    new_tokens: int = 16,
    repeats: int = 5,
    device: str = "auto",
    quiet: bool = False,
) -> list[Record]:
    """Measure and append records to `out`; what it already holds is not measured again. Returns the new records.

    model: a checkpoint, or random: the shape of a random one (see `random_checkpoint.py`). baseline: "transformers",
    "transformers,compiled,nf4" (with variants of it, see `e2e_subjects.variants`) or "none". Raises AfnextError for
    anything else.
    """
    if (model is None) == (random is None):
        raise AfnextError("name a checkpoint with --model, or the shape of a random one with --random")
    unknown = [scheme for scheme in schemes if scheme not in SCHEMES]
    if unknown:
        raise AfnextError(f"unknown scheme {', '.join(unknown)}; choose from {', '.join(SCHEMES)}")
    plan = Plan(audio_seconds, schemes, batches, new_tokens, repeats)
    with ExitStack() as stack:
        if random is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            alone = recipe_of(schemes[0]) if baseline == "none" and len(schemes) == 1 else None
            # Dense weights are written only if something needs them: the full size takes a third of the disk in int4.
            write_random_checkpoint(folder, random, quant=recipe(alone) if alone else None)
            model = str(folder)
        assert model is not None
        run = _Run(out, model, random or model, baseline, plan, device, quiet)
        return [record for scheme in schemes for record in run.scheme(scheme)]


class _Run:
    """The state of one run: where records go, and what is known of the machine."""

    def __init__(self, out: Path, model: str, label: str, baseline: str, plan: Plan, device: str, quiet: bool):
        self._out, self._folder, self._label, self._plan = out, resolve(model), label, plan
        self._baselines = [] if baseline == "none" else baseline.split(",")
        known = {"transformers", *variants()}
        if set(self._baselines) - known:
            raise AfnextError(f"unknown baseline {baseline!r}; choose none, or some of {', '.join(sorted(known))}")
        self._device = device
        self._done = finished(out)
        self._machine = machine()
        self._console = Console(stderr=True, quiet=quiet)

    def scheme(self, scheme: str) -> Iterator[Record]:
        """Measure one scheme over all recordings and batches."""
        loaded = load(self._folder, device=self._device, dtype=SCHEMES[scheme], quant=recipe_of(scheme))
        subjects = self._subjects(loaded, scheme)
        cases = [(seconds, batch) for seconds in self._plan.audio_seconds for batch in self._plan.batches]
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as bars:
            task = bars.add_task(scheme, total=len(cases) * len(_STAGES))
            for seconds, batch in cases:
                yield from self._case(
                    loaded,
                    subjects,
                    scheme,
                    seconds,
                    batch,
                    lambda stage: bars.update(task, description=stage, advance=1),
                )

    def _subjects(self, loaded: Model, scheme: str) -> list[AfnextSubject | TransformersSubject]:
        subjects: list[AfnextSubject | TransformersSubject] = [AfnextSubject(f"afnext {scheme}", loaded)]
        for name in self._baselines:
            dense = scheme if recipe_of(scheme) is None else "bf16"
            label = f"transformers {dense}" if name == "transformers" else f"transformers {name}"
            try:
                options = {} if name == "transformers" else variants()[name]()
                subjects.append(TransformersSubject(label, self._folder, loaded, **options))
            except (ImportError, RuntimeError, ValueError) as error:
                self._console.print(f"[yellow]{label} is left out:[/yellow] {error}")
        return subjects

    def _case(
        self,
        loaded: Model,
        subjects: list[AfnextSubject | TransformersSubject],
        scheme: str,
        seconds: float,
        batch: int,
        progress: Callable[[str], None],
    ) -> Iterator[Record]:
        config = loaded.network.config
        layers = (config.encoder.layers, config.decoder.layers)
        case = {
            "model": self._label,
            "layers": list(layers),
            "audio_seconds": seconds,
            "batch": batch,
            "scheme": scheme,
        }
        expected = [self._record(stage, subject.name, case).key for stage in _STAGES for subject in subjects]
        if self._done.issuperset(expected):
            return
        audio = recording(seconds)
        if batch == self._plan.batches[0]:
            yield self._keep(self._load_audio(audio, case, subjects[0].name))
        for subject in subjects:
            subject.begin(audio, batch, self._plan.new_tokens)
            subject.encode()
            subject.prefill()
        for stage in _STAGES:
            progress(f"{scheme} {seconds:g} s x {batch}: {stage}")
            yield from map(self._keep, self._stage(stage, subjects, case, loaded))

    def _stage(
        self, stage: str, subjects: list[AfnextSubject | TransformersSubject], case: dict[str, Any], loaded: Model
    ) -> list[Record]:
        calls = {subject.name: _call(subject, stage) for subject in subjects}
        few_layers = min(case["layers"]) > 1 and _width(loaded) == FULL_WIDTH and tuple(case["layers"]) != FULL_LAYERS
        single = {}
        if stage in _LAYERED and few_layers:
            single = {_single(subject): _call(subject, stage, first_layer_only=True) for subject in subjects}
        device, dtype = loaded.network.device, str(loaded.network.dtype).removeprefix("torch.")
        outputs, memory = {}, {}
        for name, call in calls.items():
            reset_peaks(device)
            resident, joules = _resident(), energy_joules(device)
            outputs[name] = call()
            memory[name] = {
                "working_bytes": _above(peak_rss(), resident),
                "peak_device_bytes": peak_device_memory(device),
                "joules": _above(energy_joules(device), joules),
            }
        samples = self._measure(stage, {**calls, **single}, device)
        if single:  # they change the subject's state
            for call in calls.values():
                call()
        ours = subjects[0].name
        records = []
        for subject in subjects:
            values: dict[str, Any] = {**samples[subject.name].values(), **memory[subject.name]}
            values |= self._rates(stage, samples[subject.name], case)
            if stage == "decode" and subject.name == ours:
                values |= _weight_traffic(loaded, samples[ours])
            if subject.name == ours and len(subjects) > 1:
                other = subjects[1].name
                agreement = compare_outputs(outputs[other], outputs[ours], tolerance(case["scheme"], dtype))
                gain = speedup(samples[other], samples[ours], agreement)
                values |= {"agrees": agreement.agrees, "error": agreement.error}
                values |= {"speedup": gain.ratio, "speedup_over": other, "reason": gain.reason}
            records.append(self._record(stage, subject.name, case, values))
        if single:
            records += [self._extrapolated(stage, subject, case, samples) for subject in subjects]
        return records

    def _measure(self, stage: str, calls: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, Samples]:
        # A decode step is short, and its distribution is of interest; the totals take long.
        few = min(3, self._plan.repeats)
        repeats = {"decode": 4 * self._plan.repeats, "first token": few, "total": few}.get(stage, self._plan.repeats)
        return measure_interleaved(
            calls, repeats=repeats, warmup=0, max_time=90.0, clock=clock_for(device), watch=device.type == "cpu"
        )

    def _rates(self, stage: str, samples: Samples, case: dict[str, Any]) -> dict[str, float]:
        median, seconds = samples.median, case["audio_seconds"]
        if stage == "encode":
            return {"windows_per_s": seconds / 30 / median, "real_time_factor": seconds / median}
        if stage == "prefill":
            return {"tokens_per_s": seconds / 0.04 / median}
        if stage == "decode":
            steps = {"context": round(seconds / 0.04), "new_tokens": self._plan.new_tokens}
            return {"tokens_per_s": case["batch"] / median, **steps}
        return {"real_time_factor": seconds / median}

    def _extrapolated(
        self,
        stage: str,
        subject: AfnextSubject | TransformersSubject,
        case: dict[str, Any],
        samples: dict[str, Samples],
    ) -> Record:
        """The stage's time with all layers of the full model, from its times with one layer and with those present."""
        index = 0 if stage == "encode" else 1
        one, every = samples[_single(subject)].median, samples[subject.name].median
        layer = max(0.0, (every - one) / (case["layers"][index] - 1))
        whole = Samples((one + (FULL_LAYERS[index] - 1) * layer,))
        values: dict[str, Any] = {"median_s": whole.median, "one_layer_s": one, "further_layer_s": layer}
        values |= self._rates(stage, whole, case)
        return replace(
            self._record(stage, subject.name, {**case, "layers": list(FULL_LAYERS)}, values), kind="extrapolated"
        )

    def _load_audio(self, audio: np.ndarray, case: dict[str, Any], subject: str) -> Record:
        with wav_file(audio) as path:
            samples = measure_interleaved({subject: lambda: load_audio(path)}, repeats=self._plan.repeats)[subject]
        values = {**samples.values(), "real_time_factor": case["audio_seconds"] / samples.median}
        return self._record("load audio", subject, case, values)

    def _record(self, stage: str, subject: str, case: dict[str, Any], values: dict[str, Any] | None = None) -> Record:
        return Record("e2e", stage, subject, case, values or {}, machine=self._machine)

    def _keep(self, record: Record) -> Record:
        append(self._out, record)
        return record


def _call(
    subject: AfnextSubject | TransformersSubject, stage: str, *, first_layer_only: bool = False
) -> Callable[[], Any]:
    method = getattr(subject, stage.replace("-", "_").replace(" ", "_"))
    if not first_layer_only:
        return method

    def call() -> Any:
        with subject.layers(1, 1):
            return method()

    return call


def _single(subject: AfnextSubject | TransformersSubject) -> str:
    return f"{subject.name}, first layer only"


def _width(loaded: Model) -> tuple[int, int]:
    return loaded.network.config.encoder.hidden_size, loaded.network.config.decoder.hidden_size


def _resident() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


def _above(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else max(0, after - before)


def _weight_traffic(loaded: Model, samples: Samples) -> dict[str, Any]:
    """The rates at which a decode step reads weights and at which the machine copies memory, both in bytes/s."""
    decoder = loaded.network.decoder
    head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
    nbytes = sum(buffer.nbytes for module in (decoder.layers, decoder.norm, head) for buffer in module.buffers())
    rate, copy = nbytes / samples.median, measured_ceilings(loaded.network.device).copy
    return {
        "weight_bytes": nbytes,
        "weight_bytes_per_s": rate,
        "copy_bytes_per_s": copy,
        "percent_of_copy": 100 * rate / copy,
        "resident_bytes": peak_rss(),
    }


def recording(seconds: float) -> np.ndarray:
    """A gliding tone with bursts of noise: float32 at 16 kHz, the same at each call."""
    generator = np.random.default_rng(0)
    t = np.arange(round(seconds * 16_000)) / 16_000
    tone = np.sin(2 * np.pi * (300 + 100 * np.sin(0.7 * t)) * t) * (np.sin(2 * np.pi * 0.9 * t) > 0)
    return (0.3 * tone + 0.02 * generator.standard_normal(t.size)).astype(np.float32)


@contextmanager
def wav_file(audio: np.ndarray) -> Iterator[Path]:
    """A 16-bit wav file of the recording, removed after the block."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes((audio.clip(-1, 1) * 32767).astype("<i2").tobytes())
        yield path
