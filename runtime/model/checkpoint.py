"""Checkpoints: safetensors files, memory-mapped, in any layout of the family, under one set of names.

Nothing is trusted. The header of every file is checked against the file (`safetensors_header`), names against the
index, and, before the first weight is handed out, names, shapes and dtypes against the config. Pickle is refused.

Tensors are views of the mapped file: opening costs no memory, and what is read stays the system's to reclaim.
`load_weights` hands out such a view where the CPU wants the dtype that is stored; every other weight is a copy, and
the pages that it was copied from are released at once, so that loading peaks at the model plus one tensor.
"""

import math
import mmap
import warnings
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch

from ...quant.convert import TORCH_DTYPES
from ...quant.recipe import Recipe
from ...quant.scheme import PARTS, Scheme
from ..errors import CheckpointError
from ..files import shown
from .checkpoint_files import first_five, part_files, weight_parts
from .config import ModelConfig
from .parameters import canonical_name, expected_shapes
from .quantized import check_finite, check_written_for, expected_tensors, layer_schemes, to_quantize
from .safetensors_header import StoredTensor, parse_header_and_metadata, shown_shape

__all__ = ["Checkpoint", "check_fit", "expected_shapes", "load_weights"]

# Every 8-bit float is one of float16's, too. Scaled ones come with tensors of scales, which do not fit a config.
_READ_AS = {**TORCH_DTYPES, "F8_E4M3": torch.float16, "F8_E5M2": torch.float16}
# A tied model stores neither of these.
LM_HEAD = ("decoder.lm_head.weight", "decoder.lm_head.weight_codes")


class MappedFile:
    """A file, memory-mapped read-only, as one uint8 tensor."""

    def __init__(self, path: Path, label: str) -> None:
        self.label = label
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as problem:
            raise CheckpointError(f"{label} cannot be mapped into memory: {problem}.") from None
        with warnings.catch_warnings():
            # torch warns that the memory is read-only; it is so on purpose.
            warnings.simplefilter("ignore", UserWarning)
            self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def release(self, start: int, end: int) -> None:
        """Give the whole pages within bytes `start..end` back to the system; a later read brings them back."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED, first, length)


@dataclass(frozen=True)
class _Entry:
    """Where a parameter is stored, and under which name."""

    stored_name: str
    file: MappedFile
    stored: StoredTensor


class Checkpoint:
    """The tensors of a checkpoint by canonical name. Made by `Checkpoint.open`."""

    def __init__(
        self, folder: Path, entries: dict[str, _Entry], files: tuple[Path, ...], metadata: dict[str, dict[str, str]]
    ) -> None:
        """metadata: of each file, by its label, what its header holds beside the tensors."""
        self.folder = folder
        self.files = files
        self.metadata = metadata
        self._entries = entries

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> "Checkpoint":
        """Map and check the safetensors files in `folder`: one file, shards with an index, or NVIDIA's components.

        Raises CheckpointError naming file and tensor for anything missing, damaged, ambiguous or unsafe.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder; give the folder that holds config.json and the weights.")
        entries: dict[str, _Entry] = {}
        files: list[Path] = []
        metadata: dict[str, dict[str, str]] = {}
        for part in weight_parts(folder):
            prefix = f"{part}." if part else ""
            for path, names in part_files(folder, part).items():
                file = MappedFile(path, path.relative_to(folder).as_posix())
                tensors, metadata[file.label] = parse_header_and_metadata(file.map, file.label)
                if names is not None:
                    _check_index(file.label, names, set(tensors))
                _add(entries, prefix, file, tensors)
                files.append(path)
        return cls(folder, entries, tuple(files), metadata)

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the parameters, in the order in which they are stored."""
        return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters as stored."""
        return sum(map(self.stored_bytes, self._entries))

    @property
    def parameter_count(self) -> int:
        """How many numbers all parameters hold."""
        return sum(math.prod(entry.stored.shape) for entry in self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the parameter called `name`. Raises CheckpointError when there is none."""
        return self._entry(name).stored.shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of `tensor(name)`: the stored one, float16 for 8-bit floats. Raises CheckpointError for one that
        torch lacks."""
        stored = self.stored_dtype(name)
        try:
            return _READ_AS[stored]
        except KeyError:
            raise CheckpointError(
                f"{self.origin(name)} is stored in {stored}, which this runtime does not read."
            ) from None

    def stored_bytes(self, name: str) -> int:
        """Bytes of the parameter in its file."""
        stored = self._entry(name).stored
        return stored.end - stored.start

    def origin(self, name: str) -> str:
        """File and stored name of the parameter, for error messages."""
        entry = self._entry(name)
        return f"{entry.file.label}: tensor {shown(entry.stored_name)}"

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter on the CPU: a view of the mapped file (a copy if it lies unaligned there), or 8-bit floats as
        float16, which holds each of them.

        The memory is read-only: writing into the tensor ends the process, so clone it first.
        Raises CheckpointError when there is no such parameter.
        """
        wanted, entry = self.dtype(name), self._entry(name)
        dtype = TORCH_DTYPES[entry.stored.dtype]
        flat = entry.file.bytes[entry.stored.start : entry.stored.end]
        if entry.stored.start % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype).view(entry.stored.shape).to(wanted)

    def release(self, name: str, nbytes: int | None = None) -> None:
        """Give the memory behind `tensor(name)`, or its first bytes, back; reading that again reads the file again."""
        entry = self._entry(name)
        end = entry.stored.end if nbytes is None else min(entry.stored.end, entry.stored.start + nbytes)
        entry.file.release(entry.stored.start, end)

    def stored_dtype(self, name: str) -> str:
        """The dtype of the parameter as the file spells it, such as BF16."""
        return self._entry(name).stored.dtype

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no parameter {shown(name)}.") from None


def open_with_config(folder: Path) -> tuple[Checkpoint, ModelConfig]:
    """The checkpoint in `folder` and its config, as `with_stored_head`. Raises CheckpointError or ConfigError."""
    checkpoint = Checkpoint.open(folder)
    return checkpoint, with_stored_head(ModelConfig.from_folder(folder), checkpoint)


def with_stored_head(config: ModelConfig, stored: Container[str]) -> ModelConfig:
    """The config, untied where a head of its own is stored: the reference uses it whatever the flag says."""
    if not config.decoder.tie_word_embeddings or not any(name in stored for name in LM_HEAD):
        return config
    return replace(config, decoder=replace(config.decoder, tie_word_embeddings=False))


def check_fit(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise one CheckpointError listing what is missing, unexpected, misshapen, or stored in no usable dtype."""
    check_written_for(config, checkpoint.metadata, checkpoint.folder)
    expected = expected_tensors(config)
    stored = set(checkpoint.names)
    common = [name for name in checkpoint.names if name in expected]
    problems = {
        "missing": [name for name in expected if name not in stored],
        "unexpected": [checkpoint.origin(name) for name in checkpoint.names if name not in expected],
        "misshapen": [
            f"{checkpoint.origin(name)} {shown_shape(checkpoint.shape(name))} instead of "
            f"{shown_shape(expected[name].shape)}"
            for name in common
            if checkpoint.shape(name) != expected[name].shape
        ],
    }
    for name in common:
        wanted = expected[name].dtypes
        if _READ_AS.get(checkpoint.stored_dtype(name)) not in wanted:
            kind = f"in a dtype other than {', '.join(kind for kind, dtype in _READ_AS.items() if dtype in wanted)}"
            problems.setdefault(kind, []).append(f"{checkpoint.origin(name)} {checkpoint.stored_dtype(name)}")
    found = [f"{len(items)} {kind} ({first_five(items)})" for kind, items in problems.items() if items]
    if found:
        raise CheckpointError(
            f"the tensors in {checkpoint.folder} do not fit its config.json: {'; '.join(found)}. "
            "Use dense weights, or those that afnext quantized, and the config that belongs to them."
        )


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    device: torch.device | str | Callable[[str], torch.device],
    dtype: torch.dtype | None,
    quant: Recipe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical name and tensor, on `device`, of everything in `expected_tensors(config)`, one by one.

    Dense weights come in `dtype` (None: as stored), packed ones as stored. device: one for all, or what tells it from
    the canonical name. quant: of a dense checkpoint, pack the layers that it packs, and yield what it stores for them.
    Memory peaks at the weights that the caller keeps plus one tensor. On the CPU a tensor that needs no conversion is
    not copied but a read-only view of the file. `progress(done, total)` is called with stored bytes after each weight.
    Raises CheckpointError at once when the checkpoint does not fit the config or is packed otherwise than `quant` says,
    and during loading when a weight does not fit `dtype` (finite values that float16 cannot hold) or its scales are not
    finite; SchemeError when a layer does not fit its scheme.
    """
    check_fit(checkpoint, config)
    wanted = expected_tensors(config)
    names = [name for name in checkpoint.names if name in wanted]
    schemes = {} if config.quantization else layer_schemes(to_quantize(config, quant))
    where = device if callable(device) else lambda name: torch.device(device)
    return _weights(checkpoint, names, schemes, where, dtype, progress)


def _weights(
    checkpoint: Checkpoint,
    names: list[str],
    schemes: dict[str, Scheme],
    device: Callable[[str], torch.device],
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    total = sum(map(checkpoint.stored_bytes, names))
    done = 0
    for name in names:
        yield from weight_tensors(checkpoint, name, schemes.get(name.removesuffix(".weight")), device(name), dtype)
        done += checkpoint.stored_bytes(name)
        if progress is not None:
            progress(done, total)


def weight_tensors(
    checkpoint: Checkpoint, name: str, scheme: Scheme | None, device: torch.device, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of one parameter, or, where there is a scheme, of what stands for it; see `load_weights`."""
    if scheme is None:
        # No local name for the weight: the caller alone decides how long it lives.
        yield name, _place(checkpoint, name, device, dtype)
    else:
        yield from _pack(checkpoint, name, scheme, device)


def _pack(
    checkpoint: Checkpoint, name: str, scheme: Scheme, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    weight = checkpoint.tensor(name)

    def release(rows: int) -> None:
        checkpoint.release(name, rows * weight.shape[1] * weight.itemsize)

    try:
        packed = scheme.quantize(weight, device=device, progress=release)
    except ValueError as problem:
        raise CheckpointError(f"{checkpoint.origin(name)} cannot be quantized: {problem}.") from None
    checkpoint.release(name)
    yield from packed.named(name).items()


def _place(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    mapped = checkpoint.tensor(name)
    if name.endswith(PARTS):
        check_finite(mapped, checkpoint.origin(name))
        dtype = None
    dtype = dtype or mapped.dtype
    if device.type == "cpu" and mapped.dtype == dtype:
        return mapped
    weight = mapped.to(device).to(dtype)
    if (
        dtype == torch.float16
        and mapped.dtype != dtype
        and bool(weight.isinf().any())
        and not bool(mapped.isinf().any())
    ):
        raise CheckpointError(f"{checkpoint.origin(name)} has values beyond float16's 65504; load it in bfloat16.")
    checkpoint.release(name)
    return weight


def _check_index(label: str, listed: set[str], stored: set[str]) -> None:
    for names, problem in (
        (listed - stored, "lacks, against its index,"),
        (stored - listed, "has, against its index,"),
    ):
        if names:
            raise CheckpointError(
                f"{label} {problem} {len(names)} tensors: {first_five(sorted(map(shown, names)))}. "
                "Shards and index do not belong together; download both again."
            )


def _add(entries: dict[str, _Entry], prefix: str, file: MappedFile, tensors: dict[str, StoredTensor]) -> None:
    for stored_name, stored in tensors.items():
        name = canonical_name(prefix + stored_name)
        if name is None:
            continue
        if name in entries:
            first = entries[name]
            raise CheckpointError(
                f"{file.label}: tensor {shown(stored_name)} and {first.file.label}: tensor {shown(first.stored_name)} "
                f"are both {shown(name)}; keep one of them."
            )
        entries[name] = _Entry(stored_name, file, stored)
