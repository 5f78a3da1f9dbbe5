"""Quantizes a checkpoint with calibration, layer by layer, on the user's recordings.

The calibration set is a folder of recordings. NAME.txt beside NAME.wav (or .flac, .mp3 ...) has the expected answer,
such as a transcript, NAME.prompt.txt the question; without them a general question is used. The set runs through the
stages of `layerwise`; each stage is quantized on the outputs of the quantized stages before it.

Each stage is written to OUT as one safetensors file as soon as it is done, and the hidden states between stages to
OUT/.calibration, so an interrupted run continues after its last complete stage. The same inputs give the same bytes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...kernels.packed_weight import Packed
from ...quant.calibrate import Calibration, InputStatistics, LayerReport, quantize_stage
from ...quant.convert import INDEX_FILE, CheckpointWriter, shard_name
from ...quant.recipe import Recipe
from ...quant.scheme import Scheme, Stored
from ..engine.layerwise import HiddenStates, PlacedPrompt, Stage, Stem, Window, decoder_inputs, stages
from ..errors import CheckpointError
from ..files import output_file, read_json_object
from ..io.prompt import PromptTemplate
from ..io.tokenizer import Tokenizer
from ..model.checkpoint import check_fit
from ..model.encoder import token_count
from ..model.hub import resolve
from ..model.opened import open_checkpoint
from ..model.quantized import check_rules, layer_schemes, quantization_metadata
from ..model.weights import fill
from .conversation import Conversation
from .model_card import write_card
from .output_folder import copy_texts, locked_folder, text_files
from .quantize import weights_hash

Progress = Callable[[str, float, float], None]
_QUESTIONS = ("Describe this audio in detail.", "Transcribe the input speech.", "What can be heard, and when?")
_WORK = ".calibration"


class CalibrationError(CheckpointError):
    """The calibration set cannot be used, or the output folder has other contents."""


@dataclass(frozen=True)
class Example:
    """A recording, the question about it, and the expected answer ("" for none)."""

    audio: Path
    question: str
    answer: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation in the format of `Conversation.load`."""
        parts = [{"type": "audio", "audio": str(self.audio)}, {"type": "text", "text": self.question}]
        answer = [{"role": "assistant", "content": self.answer}] if self.answer else []
        return [{"role": "user", "content": parts}, *answer]


def read_examples(folder: Path) -> list[Example]:
    """The examples in a folder, by name. Raises CalibrationError if there is none, or a text without its recording."""
    if not folder.is_dir():
        raise CalibrationError(f"{folder} is not a folder; give one with the recordings to calibrate on")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    recordings = [path for path in files if path.suffix.lower() != ".txt"]
    texts = {path for path in files if path.suffix.lower() == ".txt"}
    examples = []
    for number, audio in enumerate(recordings):
        answer, question = audio.with_suffix(".txt"), audio.with_suffix(".prompt.txt")
        asked = _text(question) if question in texts else _QUESTIONS[1 if answer in texts else number % len(_QUESTIONS)]
        examples.append(Example(audio, asked, _text(answer) if answer in texts else ""))
        texts -= {answer, question}
    if texts:
        raise CalibrationError(f"{min(texts)} has no recording of the same name; add one, or remove the text")
    if not examples:
        raise CalibrationError(f"{folder} has no recordings; give a folder with some to calibrate on")
    return examples


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise CalibrationError(f"{path} cannot be read: {problem}") from None


@dataclass(frozen=True)
class _State:
    """The state of a run: the number of steps done, and the hidden states for the next one."""

    fingerprint: str
    done: int
    lengths: tuple[int, ...]
    width: int
    dtype: str
    windows: tuple[Window, ...]
    prompts: tuple[PlacedPrompt, ...]
    reports: tuple[LayerReport, ...]

    def save(self, work: Path) -> None:
        path = work / "state.json"
        path.with_suffix(".part").write_text(json.dumps(asdict(self)))
        path.with_suffix(".part").replace(path)

    @classmethod
    def read(cls, work: Path) -> "_State":
        values = read_json_object(work / "state.json", f"{work}/state.json", CalibrationError, max_bytes=1 << 30)
        try:
            values["lengths"] = tuple(values["lengths"])
            values["windows"] = tuple(Window(**window) for window in values["windows"])
            values["reports"] = tuple(LayerReport(**report) for report in values["reports"])
            values["prompts"] = tuple(
                PlacedPrompt(tuple(prompt["token_ids"]), tuple(prompt["positions"])) for prompt in values["prompts"]
            )
            return cls(**values)
        except (KeyError, TypeError) as problem:
            raise CalibrationError(f"{work}/state.json is damaged ({problem}); remove {work.parent}") from None


def calibrate(
    source: str | PathLike[str],
    out: str | PathLike[str],
    recipe: Recipe,
    data: str | PathLike[str],
    *,
    options: Calibration | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    measured: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[LayerReport, ...]:
    """Quantize a dense checkpoint by `recipe`, calibrated on the recordings in a folder, into the folder `out`.

    source: a folder or Hub name; data: see the module. options: by default scaling and feedback. dtype: of the
    computation, by default the checkpoint's. measured: see `quantize`. progress: called with ("layers", done, total)
    and, within a layer, ("this layer", done, total). Returns a report of every layer. Memory peaks at the largest
    stage: its dense weights, a few matrices [in, in] of its widest input, and one of its weights in float32. An
    unfinished run of the same inputs in `out` is continued. Raises AfnextError: CalibrationError for data that cannot
    be used, and for an `out` with other contents; OutputError for an `out` that another run is writing to, or that
    cannot be written.
    """
    examples = read_examples(Path(data))
    options = options or Calibration()
    calibrator = _Calibrator(source, Path(out), recipe, examples, options, torch.device(device), dtype, measured)
    return calibrator.run(progress)


class _Calibrator:
    def __init__(
        self,
        source: str | PathLike[str],
        out: Path,
        recipe: Recipe,
        examples: list[Example],
        options: Calibration,
        device: torch.device,
        dtype: torch.dtype | None,
        measured: str | None,
    ):
        folder = resolve(source)
        self.opened = open_checkpoint(folder)
        self.checkpoint, self.config = self.opened.weights, self.opened.config
        if self.config.quantization is not None:
            raise CalibrationError(f"{folder} is quantized already; calibration takes dense weights")
        check_fit(self.checkpoint, self.config)
        self.recipe = replace(recipe, source=weights_hash(self.checkpoint))
        check_rules(self.config, recipe)
        self.schemes = layer_schemes(replace(self.config, quantization=self.recipe))
        self.source, self.measured = os.fspath(source), measured
        self.out, self.work = out, out / _WORK
        self.examples = examples
        self.options = options
        self.device = device
        self.dtype = dtype or getattr(torch, self.config.dtype)

    def run(self, progress: Progress) -> tuple[LayerReport, ...]:
        """See `calibrate`."""
        text_files(self.opened.files)  # raises for refused links before the long computation
        with locked_folder(self.out):
            return self._run(progress)

    def _run(self, progress: Progress) -> tuple[LayerReport, ...]:
        state = self._started(progress)
        on_windows, on_prompts = stages(self.config, state.windows)
        steps: list[Stage | None] = [*on_windows, None, *on_prompts]
        for number, stage in enumerate(steps):
            progress("layers", number, len(steps))
            if number < state.done:
                continue
            states = HiddenStates(self._states(number), state.lengths, state.width, getattr(torch, state.dtype))
            last = number + 1 == len(steps)
            reports: list[LayerReport] = []
            if stage is None:
                tensors, outputs = self._rest([*on_windows, *on_prompts]), self._joined(state, states)
            else:
                self._fill(stage)
                tensors, reports = self._quantized(stage, states, progress)
                outputs = stage.outputs(states)
            self._save(shard_name(number + 1, len(steps)), tensors)
            del tensors
            total = len(state.prompts) if stage is None else len(states)
            following = states if last else self._written(number + 1, outputs, total, progress)
            state = replace(
                state,
                done=number + 1,
                lengths=following.lengths,
                width=following.width,
                dtype=_name(following.dtype),
                reports=(*state.reports, *reports),
            )
            state.save(self.work)
            states.path.unlink()
            if stage is not None:
                stage.module.to("meta")
        self._finish(len(steps))
        progress("layers", len(steps), len(steps))
        return state.reports

    def _states(self, step: int) -> Path:
        return self.work / f"states-{step}.bin"

    def _written(self, step: int, outputs: Iterable[Tensor], total: int, progress: Progress) -> HiddenStates:
        return HiddenStates.write(
            self._states(step), outputs, lambda done, _: progress("this layer", total + done, 2 * total), total
        )

    def _started(self, progress: Progress) -> _State:
        """The state of an interrupted run, or of a new one after the stem."""
        fingerprint = self._fingerprint()
        if (self.work / "state.json").exists():
            state = _State.read(self.work)
            if state.fingerprint != fingerprint:
                raise CalibrationError(
                    f"{self.out} has an unfinished calibration with other inputs or options; remove it, or use those"
                )
            return state
        if self.out.exists() and any(path != self.work for path in self.out.iterdir()):
            raise CalibrationError(f"{self.out} is not empty; give a new folder")
        self.work.mkdir(parents=True, exist_ok=True)
        windows: list[Window] = []
        prompts: list[PlacedPrompt] = []
        states = HiddenStates.write(
            self._states(0), self._heard(windows, prompts), lambda *_: None, total=len(self.examples)
        )
        state = _State(
            fingerprint, 0, states.lengths, states.width, _name(states.dtype), tuple(windows), tuple(prompts), ()
        )
        state.save(self.work)
        return state

    @torch.inference_mode()
    def _heard(self, windows: list[Window], prompts: list[PlacedPrompt]) -> Iterator[Tensor]:
        """The stem's output for every window of every recording; appends the windows and prompts to the lists."""
        tokenizer, template = Tokenizer.from_folder(self.opened.files), PromptTemplate.from_folder(self.opened.files)
        stem = Stem(self.config.encoder.mel_bins, self.dtype, self._parameter)
        for example in self.examples:
            conversation = Conversation.load(
                example.messages,
                tokenizer,
                template,
                max_audio_seconds=self.config.max_audio_seconds,
                truncate=False,
            )
            positions = []
            for recording in conversation.audio:
                position = recording.position
                for index, waveform in enumerate(recording.windows):
                    tokens = token_count(waveform.numel())
                    if tokens:
                        positions.append(position)
                        windows.append(Window(waveform.numel(), index))
                        yield stem.run(waveform)
                    position += tokens
            prompts.append(PlacedPrompt(tuple(conversation.prompt.token_ids), tuple(positions)))

    def _fingerprint(self) -> str:
        inputs = {
            "recipe": self.recipe.to_dict(),
            "options": asdict(self.options),
            "dtype": _name(self.dtype),
            "examples": [(e.audio.name, _sha256(e.audio), e.question, e.answer) for e in self.examples],
        }
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

    def _parameter(self, name: str) -> Tensor:
        """A dense parameter on the device, in the dtype of the computation."""
        return self.checkpoint.tensor(name).to(self.device).to(self.dtype)

    def _fill(self, stage: Stage) -> None:
        names = [name for name, _ in stage.module.named_buffers()]
        fill(stage.module, ((name, self._parameter(stage.canonical(name))) for name in names))

    def _scheme(self, stage: Stage, layer: str) -> Scheme | None:
        return self.schemes.get(stage.canonical(layer))

    @torch.inference_mode()
    def _quantized(
        self, stage: Stage, states: HiddenStates, progress: Progress
    ) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """Calibrate and quantize a filled stage, and return its tensors to store; its module gets the quantized
        weights."""
        statistics = {
            fold.targets[0]: InputStatistics(
                stage.module.get_buffer(f"{fold.targets[0]}.weight").shape[1],
                stage.input_tokens(states),
                self.options.rows,
                self.device,
            )
            for fold in stage.folds
            if any(self._scheme(stage, target) for target in fold.targets)
        }
        if statistics:
            stage.gather(states, statistics, lambda done, total: progress("this layer", done, 2 * total))
        parameters = {
            name: self.checkpoint.tensor(stage.canonical(name)).to(self.device)
            for name, _ in stage.module.named_buffers()
        }
        tensors: dict[str, Tensor] = {}
        reports: list[LayerReport] = []
        quantized = quantize_stage(
            parameters,
            stage.folds,
            statistics,
            lambda layer: self._scheme(stage, layer),
            self.options,
            report=lambda report: reports.append(replace(report, layer=stage.canonical(report.layer))),
        )
        for name, value in quantized:
            canonical = stage.canonical(name)
            if isinstance(value, Packed):
                scheme = self.schemes[canonical.removesuffix(".weight")]
                tensors |= value.named(canonical)
                fill(stage.module, [(name, scheme.dequantize(value, self.dtype))])
            else:
                tensors[canonical] = value
                fill(stage.module, [(name, value.to(self.dtype))])
            self.checkpoint.release(canonical)
        return tensors, reports

    def _rest(self, others: list[Stage]) -> dict[str, Tensor]:
        """The tensors to store that belong to no stage, such as the embeddings, which need no calibration."""
        staged = {stage.canonical(name) for stage in others for name, _ in stage.module.named_buffers()}
        tensors: dict[str, Tensor] = {}
        for name in self.checkpoint.names:
            scheme = self.schemes.get(name.removesuffix(".weight"))
            if name not in staged and scheme is not None:
                tensors |= scheme.quantize(self.checkpoint.tensor(name)).named(name)
            elif name not in staged:
                tensors[name] = self.checkpoint.tensor(name)
        return tensors

    @torch.inference_mode()
    def _joined(self, state: _State, audio: HiddenStates) -> Iterator[Tensor]:
        """The decoder's inputs, with the embeddings that will be stored."""
        name = "decoder.embed_tokens"
        scheme = self.schemes.get(name)

        def embed(ids: Tensor) -> Tensor:
            rows = self.checkpoint.tensor(f"{name}.weight")[ids]
            return (rows if scheme is None else scheme.dequantize(scheme.quantize(rows), self.dtype)).to(self.dtype)

        yield from decoder_inputs(state.prompts, audio, embed)

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        expected = {key: Stored(tuple(tensor.shape), (tensor.dtype,)) for key, tensor in tensors.items()}
        metadata = quantization_metadata(self.recipe)
        with CheckpointWriter(self.work, expected, metadata, shard_bytes=1 << 62) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor)
                if key in self.checkpoint:
                    self.checkpoint.release(key)
            (file,) = writer.finish(metadata)
        file.replace(self.out / name)

    def _finish(self, shards: int) -> None:
        """Write the index, the config and the texts of the checkpoint; remove temporary files."""
        index: dict[str, str] = {}
        for number in range(shards):
            name = shard_name(number + 1, shards)
            with safe_open(self.out / name, "pt") as file:
                index |= dict.fromkeys(file.keys(), name)
        with output_file(self.out / INDEX_FILE, CalibrationError) as written:
            written.write(json.dumps({"metadata": {}, "weight_map": index}).encode())
        write_card(self.out, self.source, self.opened.files, self.recipe, self.measured)
        copy_texts(self.opened.files, self.out, self.recipe)
        shutil.rmtree(self.work)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
