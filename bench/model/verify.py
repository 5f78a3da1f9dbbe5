"""`afnext verify MODEL`: checks that a checkpoint works on this machine and agrees with `transformers`.

    files      every tensor is present with its shape; files that the Hub names by their hash have that hash
    settings   token ids of config and tokenizer agree; how the sizes differ from the published model's
    parity     greedy tokens of bundled recordings are those of transformers, for each dense dtype that fits
    schemes    packed weights answer, and how many of the dense model's tokens they repeat
    stages     time of every stage beside transformers, in the same run
    memory     the peak beside the plan

Where two greedy answers differ, the reference's two best scores must differ by no more than rounding in that dtype:
then either token is right, and later tokens are not compared. Every check is a row; a skipped check states why.
"""

import gc
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ...kernels.device_state import free_memory, has_bfloat16
from ...kernels.errors import AfnextError
from ...quant.recipe import RECIPES
from ...runtime.app.api import Model, load, usable_device
from ...runtime.engine.memory import DENSE, MemoryPlan
from ...runtime.io.audio import load_audio
from ...runtime.io.tokenizer import Tokenizer
from ...runtime.model.checkpoint import check_fit
from ...runtime.model.config import ModelConfig
from ...runtime.model.hub import resolve
from ...runtime.model.opened import OpenCheckpoint, open_checkpoint
from ...runtime.model.published import AUDIO_FLAMINGO_NEXT
from ..core.machine import machine, peak_device_memory, peak_rss, reset_peaks
from ..core.timing import clock_for, compare_outputs, measure_interleaved
from ..core.tolerances import tolerance
from ..report import labels
from .e2e_subjects import QUESTION, AfnextSubject, TransformersSubject

DATA = Path(__file__).parents[1] / "data"
RECORDINGS = (DATA / "jfk.flac", DATA / "scene.flac")
DTYPES = ("bfloat16", "float16", "float32")
SCHEMES = (DENSE, *RECIPES)
STAGES = ("log_mel", "encode", "prefill", "decode")
PASS, FAIL, SKIP = "pass", "FAIL", "skipped"
# Between the two best scores of the reference, relative to the largest: below this, rounding may choose either.
_TIE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.05}
_HASH = re.compile(r"[0-9a-f]{64}")
_NEW_TOKENS = 48
_ROUNDS, _STAGE_SECONDS = 5, 2.0  # for one stage; a stage whose first calls take longer is timed in one round


@dataclass(frozen=True)
class Row:
    """One check. case: dtype, scheme or file; state: PASS, FAIL or SKIP; found: the finding in words."""

    check: str
    case: str
    state: str
    found: str


@dataclass
class Report:
    """The checks of one model on one machine, in order."""

    model: str
    device: str
    rows: list[Row]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(row.state != FAIL for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the machine."""
        rows = [asdict(row) for row in self.rows]
        return {"model": self.model, "device": self.device, "passed": self.passed, "rows": rows, "machine": machine()}


def verify(
    model: str,
    *,
    device: str = "auto",
    schemes: Sequence[str] = SCHEMES,
    dtypes: Sequence[str] = DTYPES,
    stages: bool = True,
    new_tokens: int = _NEW_TOKENS,
    progress: Callable[[str], None] = lambda check: None,
) -> Report:
    """Run every check that fits this machine.

    model: a folder or a name on the Hub; schemes: DENSE and recipes; dtypes: of the dense weights; stages: time them
    beside transformers; progress: called with the name of the next check. Faults of the checkpoint become rows; only a
    missing model raises.
    """
    folder, where = Path(resolve(model)), usable_device(device)
    report = Report(model, _name(where), [])
    progress("files")
    try:
        checkpoint = open_checkpoint(folder)
        report.rows += _files(checkpoint)
        _settings(checkpoint, report)
    except AfnextError as fault:
        report.rows.append(Row("files" if not report.rows else "settings", "", FAIL, str(fault)))
        return report
    config = checkpoint.config
    dense: dict[str, list[list[int]]] = {}
    for dtype in dtypes if DENSE in schemes and config.quantization is None else ():
        progress(f"parity, {dtype}")
        dense |= _dense(folder, config, where, dtype, new_tokens, stages, report)
    for scheme in schemes:
        if scheme != DENSE and config.quantization is None:
            progress(scheme)
            _packed(folder, config, where, scheme, new_tokens, dense, report)
    if config.quantization is not None:
        progress(config.quantization.name)
        _packed(folder, config, where, None, new_tokens, dense, report)
    return report


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _files(checkpoint: OpenCheckpoint) -> Iterator[Row]:
    """Raises CheckpointError, naming them, for tensors that are missing, unexpected or of another shape."""
    weights, folder = checkpoint.weights, checkpoint.folder
    check_fit(weights, checkpoint.config)
    yield Row("files", "weights", PASS, f"{len(weights.names)} tensors, {weights.nbytes:,} bytes, none missing")
    hashed = 0
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file() and (expected := _published_hash(path)):
            hashed += 1
            with path.open("rb") as file:
                found = _sha256(file)
            if found != expected:
                yield Row("files", path.name, FAIL, f"its SHA-256 is {found}, not {expected}; download it again")
                return
    if hashed:
        yield Row("files", "hashes", PASS, f"SHA-256 of {hashed} files is the published one")
    else:
        yield Row("files", "hashes", SKIP, "no file of this folder is named by its hash, as the Hub's cache names them")


def _published_hash(path: Path) -> str | None:
    """The SHA-256 by which the Hub's cache names the file that a snapshot links to."""
    name = Path(os.path.realpath(path)).name
    return name if path.is_symlink() and _HASH.fullmatch(name) else None


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _settings(checkpoint: OpenCheckpoint, report: Report) -> None:
    """Check config and tokenizer; raises AfnextError if they cannot be read or contradict each other."""
    config = checkpoint.config
    ids = {
        "audio_token_id": config.audio_token_id,
        "audio_bos_token_id": config.audio_bos_token_id,
        "audio_eos_token_id": config.audio_eos_token_id,
    }
    Tokenizer.from_folder(checkpoint.files).check_against(ids)
    named = ", ".join(f"{name.removesuffix('_token_id')} {value}" for name, value in ids.items())
    report.rows.append(Row("settings", "token ids", PASS, f"config and tokenizer agree: {named}"))
    published = ModelConfig.from_dict(AUDIO_FLAMINGO_NEXT, {"max_audio_len": 1800})
    others = [
        f"{part}.{key} {value} instead of {getattr(getattr(published, part), key)}"
        for part in ("encoder", "decoder")
        for key, value in vars(getattr(config, part)).items()
        if value != getattr(getattr(published, part), key)
    ]
    found = f"not Audio Flamingo Next's: {'; '.join(others)}" if others else "those of Audio Flamingo Next"
    report.rows.append(Row("settings", "sizes", SKIP if others else PASS, found))


def _dense(
    folder: Path, config: ModelConfig, device: torch.device, dtype: str, new_tokens: int, stages: bool, report: Report
) -> dict[str, list[list[int]]]:
    """Check one dense dtype; the answers' tokens by dtype."""
    plan, reason = _plan(config, device, dtype, DENSE, new_tokens)
    if plan is None or reason:
        report.rows.append(Row("parity", dtype, SKIP, reason))
        return {}
    with _loaded(folder, device, dtype, None, report) as model:
        if model is None:
            return {}
        answers = _answers(model, new_tokens, plan, dtype, report)
        try:
            reference = TransformersSubject(f"transformers {dtype}", folder, model)
        except (AfnextError, ImportError, RuntimeError, ValueError) as error:
            report.rows.append(Row("parity", dtype, SKIP, " ".join(str(error).split())))
            return {dtype: answers}
        for path, tokens in zip(RECORDINGS, answers, strict=True):
            state, found = _compared(reference, load_audio(path).samples, tokens, dtype)
            report.rows.append(Row("parity", f"{dtype}, {path.stem}", state, found))
        if stages:
            report.rows += _stages(model, reference, dtype, new_tokens)
    return {dtype: answers}


def _packed(
    folder: Path,
    config: ModelConfig,
    device: torch.device,
    scheme: str | None,
    new_tokens: int,
    dense: dict[str, list[list[int]]],
    report: Report,
) -> None:
    """Check packed weights: those of the checkpoint itself, or dense ones packed by `scheme`."""
    dtype = "bfloat16" if has_bfloat16(device) else "float16"
    name = scheme or (config.quantization.name if config.quantization else "")
    plan, reason = _plan(config, device, dtype, scheme or DENSE, new_tokens)
    if plan is None or reason:
        report.rows.append(Row("schemes", name, SKIP, reason))
        return
    with _loaded(folder, device, dtype, scheme, report) as model:
        if model is None:
            return
        answers = _answers(model, new_tokens, plan, name, report)
    lengths = f"{sum(map(len, answers))} tokens"
    if dtype not in dense:
        report.rows.append(Row("schemes", name, PASS, f"answers, {lengths}; there is no dense answer to compare with"))
        return
    pairs = [
        pair for ours, theirs in zip(answers, dense[dtype], strict=True) for pair in zip(ours, theirs, strict=False)
    ]
    same = sum(ours == theirs for ours, theirs in pairs)
    report.rows.append(Row("schemes", name, PASS, f"answers, {lengths}, {same} of {len(pairs)} as {dtype} has them"))


def _plan(
    config: ModelConfig, device: torch.device, dtype: str, scheme: str, new_tokens: int
) -> tuple[MemoryPlan | None, str]:
    """The memory plan of a check, and why the check cannot run, "" if it can."""
    if dtype == "bfloat16" and not has_bfloat16(device):
        return None, "this GPU has no bfloat16"
    try:
        plan = MemoryPlan(
            config,
            free_memory(device),
            gpu=device.type != "cpu",
            dtype=getattr(torch, dtype),
            audio_seconds=30.0,
            scheme=scheme,
            new_tokens=new_tokens,
            mapped=device.type == "cpu" and scheme == DENSE and dtype == config.dtype,
        )
    except AfnextError as fault:
        return None, str(fault)
    return plan, "" if plan.fits else f"takes {plan.total:,} bytes, and {plan.memory:,} are free"


@contextmanager
def _loaded(
    folder: Path, device: torch.device, dtype: str, quant: str | None, report: Report
) -> Iterator[Model | None]:
    """The model, closed after the block; None, with a row in the report, if it cannot be loaded."""
    try:
        model = load(folder, device=device, dtype=dtype, quant=quant, prefix_cache_bytes=0, encoder_cache_bytes=0)
    except AfnextError as fault:
        report.rows.append(Row("load", quant or dtype, FAIL, str(fault)))
        yield None
        return
    try:
        yield model
    finally:
        model.close()
        del model
        gc.collect()


def _answers(model: Model, new_tokens: int, plan: MemoryPlan, case: str, report: Report) -> list[list[int]]:
    """Greedy tokens for each recording; adds a row with the peak memory."""
    device = model.network.device
    reset = reset_peaks(device)
    options: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_new_tokens": new_tokens}
    answers = [model.ask(path, QUESTION, **options).token_ids for path in RECORDINGS]
    peak = peak_device_memory(device)
    if peak is not None:
        state = PASS if peak <= plan.total else FAIL
        report.rows.append(Row("memory", case, state, f"peak {peak:,} bytes, planned at most {plan.total:,}"))
    else:
        resident = peak_rss() if reset else None
        found = "unknown" if resident is None else f"{resident:,} bytes"
        text = f"peak of the whole process {found}, planned for the model at most {plan.total:,}"
        report.rows.append(Row("memory", case, SKIP, text))
    return answers


def _compared(reference: TransformersSubject, audio: np.ndarray, ours: list[int], dtype: str) -> tuple[str, str]:
    """Whether `ours` are the tokens that the reference generates greedily; see the top of this file for ties."""
    expected, scores = reference.greedy(audio, len(ours))
    for step, (mine, theirs) in enumerate(zip(ours, expected, strict=False)):
        if mine == theirs:
            continue
        values = scores[step]
        gap, largest = float(values[theirs] - values[mine]), float(values.abs().max())
        where = f"token {step} of {len(ours)} is {mine} instead of {theirs}, whose score is ahead by {gap:.3g}"
        if gap <= _TIE[dtype] * largest:
            return PASS, f"{step} tokens are the same; {where}: a tie in {dtype}"
        return FAIL, where
    if len(expected) != len(ours):
        return FAIL, f"the answer has {len(ours)} tokens and the reference's ends after {len(expected)}"
    return PASS, f"all {len(ours)} tokens are the same"


def _stages(model: Model, reference: TransformersSubject, dtype: str, new_tokens: int) -> Iterator[Row]:
    """Times of every stage for 30 s of audio, of afnext and the reference in turn."""
    ours = AfnextSubject("afnext", model)
    audio = np.resize(load_audio(RECORDINGS[1]).samples, 480_000)
    for subject in (ours, reference):
        subject.begin(audio, 1, new_tokens)
    bound = tolerance("dense", dtype)
    for stage in STAGES:
        calls = {subject.name: getattr(subject, stage) for subject in (ours, reference)}
        start = time.monotonic()
        outputs = {name: call() for name, call in calls.items()}
        rounds = _ROUNDS if time.monotonic() - start < _STAGE_SECONDS else 1
        agreement = compare_outputs(outputs[reference.name], outputs["afnext"], bound)
        taken = measure_interleaved(
            calls, repeats=rounds, warmup=0, max_time=_STAGE_SECONDS, clock=clock_for(model.network.device)
        )
        mine, theirs = taken["afnext"].median, taken[reference.name].median
        times = f"{labels.seconds(mine)}, transformers {labels.seconds(theirs)}, {theirs / mine:.2f}x"
        case = f"{dtype}, {stage.replace('_', '-')}"
        if agreement.agrees:
            yield Row("stages", case, PASS, f"{times}, relative RMS {agreement.error:.2g}")
        else:
            yield Row("stages", case, FAIL, f"the outputs differ: {agreement.reason}; {times}")


def show(report: Report, console: Console) -> None:
    """Print the checks as one table, then the verdict."""
    table = Table(title=f"{report.model} on {report.device}", title_justify="left", box=None, pad_edge=False)
    for name in ("check", "case", "", "found"):
        table.add_column(name, overflow="fold")
    colors = {PASS: "green", FAIL: "red", SKIP: "dim"}
    for row in report.rows:
        table.add_row(row.check, row.case, f"[{colors[row.state]}]{row.state}[/]", row.found)
    console.print(table)
    failed = sum(row.state == FAIL for row in report.rows)
    skipped = sum(row.state == SKIP for row in report.rows)
    verdict = f"[red]{failed} checks failed[/]" if failed else "[green]no check failed[/]"
    console.print(f"\n{verdict}; {len(report.rows) - failed - skipped} passed, {skipped} skipped.")
