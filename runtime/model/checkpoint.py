"""Checkpoints: memory-mapped safetensors files in any layout of the model family, under one set of names.

Files are untrusted. The header of every file is checked against the file (`safetensors_header`), names against the
index, and, before the first weight is returned, names, shapes and dtypes against the config. Pickle is refused.

Tensors are views of the mapped file: opening costs no memory, and the system can reclaim the pages that are read.
`load_weights` returns such a view if the weight stays on the CPU in the stored dtype; every other weight is a copy, and
its source pages are released at once, so that loading peaks at the model plus one tensor.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path

import torch

from ...quant.convert import TORCH_DTYPES
from ...quant.recipe import Recipe
from ...quant.scheme import PARTS, Scheme
from ..errors import CheckpointError
from ..files import shown
from .checkpoint_files import first_five, part_files, refuse_adapter, weight_parts
from .config import ModelConfig
from .mapped_file import MappedFile
from .parameters import canonical_name, expected_shapes
from .quantized import check_finite, check_scales, check_written_for, expected_tensors, layer_schemes, to_quantize
from .safetensors_header import parse_header_and_metadata, shown_shape
from .sharding import Shard
from .stored_parameter import MappedParameter, StoredParameter

__all__ = ["Checkpoint", "check_fit", "expected_shapes", "load_weights"]

# float16 represents every 8-bit float. Other libraries' scaled ones come with tensors of scales, which do not fit a
# config; ours, the codes of the scheme fp8 and the scales of nvfp4, are read as stored.
_READ_AS = {**TORCH_DTYPES, "F8_E4M3": torch.float16, "F8_E5M2": torch.float16}


class Checkpoint:
    """The tensors of a checkpoint by canonical name. Made by `Checkpoint.open`."""

    def __init__(
        self,
        folder: Path,
        parameters: dict[str, StoredParameter],
        files: tuple[Path, ...],
        metadata: dict[str, dict[str, str]],
    ) -> None:
        """folder: a folder, or the single file of the checkpoint; parameters: by canonical name; metadata: for each
        file, by its label, the strings in its header."""
        self.folder = folder
        self.files = files
        self.metadata = metadata
        self._parameters = parameters

    @property
    def parameters(self) -> Mapping[str, StoredParameter]:
        """The stored parameters by canonical name."""
        return self._parameters

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> "Checkpoint":
        """Map and check the safetensors files in `folder`: one file, shards with an index, or NVIDIA's components.

        Raises CheckpointError naming file and tensor for anything missing, damaged, ambiguous or unsafe.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; give the folder that has config.json and the weights.")
        refuse_adapter(folder)
        parameters: dict[str, StoredParameter] = {}
        files: list[Path] = []
        metadata: dict[str, dict[str, str]] = {}
        for part in weight_parts(folder):
            prefix = f"{part}." if part else ""
            for path, names in part_files(folder, part).items():
                file = MappedFile(path, path.relative_to(folder).as_posix())
                tensors, metadata[file.label] = parse_header_and_metadata(file.map, file.label)
                if names is not None:
                    _check_index(file.label, names, set(tensors))
                for name, stored in tensors.items():
                    add(parameters, canonical_name(prefix + name), MappedParameter(file, name, stored))
                files.append(path)
        return cls(folder, parameters, tuple(files), metadata)

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the parameters, in the stored order."""
        return tuple(self._parameters)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters as stored."""
        return sum(map(self.stored_bytes, self._parameters))

    @property
    def is_mapped(self) -> bool:
        """Whether every tensor is a view of its mapped file, which costs no memory."""
        return all(parameter.is_mapped for parameter in self._parameters.values())

    @property
    def parameter_count(self) -> int:
        """Number of elements of all parameters."""
        return sum(parameter.elements for parameter in self._parameters.values())

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the parameter called `name`. Raises CheckpointError when there is none."""
        return self._parameter(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of `tensor(name)`: the stored one, float16 for weights in 8-bit floats. Raises CheckpointError for
        one that torch lacks."""
        stored = self.stored_dtype(name)
        try:
            return _read_as(name)[stored]
        except KeyError:
            raise CheckpointError(
                f"{self.origin(name)} is stored in {stored}, which this runtime does not read."
            ) from None

    def stored_bytes(self, name: str) -> int:
        """Bytes of the parameter as it is loaded."""
        return self._parameter(name).nbytes

    def origin(self, name: str) -> str:
        """File and stored name of the parameter, for error messages."""
        return self._parameter(name).origin

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter on the CPU: a view of the mapped file, or a copy if it is stored differently; weights in
        8-bit floats as float16, which represents them exactly.

        The memory may be read-only: writing into the tensor ends the process, so clone it first.
        Raises CheckpointError when there is no such parameter.
        """
        wanted = self.dtype(name)
        return self._parameter(name).tensor().to(wanted)

    def release(self, name: str, nbytes: int | None = None) -> None:
        """Release the memory of `tensor(name)`, or of its first `nbytes`; reading it again reads the file again."""
        parameter = self._parameter(name)
        parameter.release(parameter.nbytes if nbytes is None else nbytes)

    def stored_dtype(self, name: str) -> str:
        """The dtype of the parameter as safetensors spells it, such as BF16."""
        return self._parameter(name).dtype

    def _parameter(self, name: str) -> StoredParameter:
        try:
            return self._parameters[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no parameter {shown(name)}.") from None


def _read_as(name: str) -> Mapping[str, torch.dtype]:
    """The dtype in which a tensor called `name` is read, by the stored one."""
    return TORCH_DTYPES if name.endswith((f".{PARTS[0]}", f".{PARTS[1]}")) else _READ_AS


def check_fit(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise one CheckpointError listing tensors that are missing, unexpected, or of a wrong shape or dtype."""
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
        wanted, read_as = expected[name].dtypes, _read_as(name)
        if read_as.get(checkpoint.stored_dtype(name)) not in wanted:
            kind = f"in a dtype other than {', '.join(kind for kind, dtype in read_as.items() if dtype in wanted)}"
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
    shard: Shard | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical name and tensor, on `device`, of each entry of `expected_tensors(config)`, one by one.

    Dense weights are converted to `dtype` (None: as stored), packed ones are returned as stored. device: one for all,
    or a function of the canonical name. quant: a recipe; the layers that it matches are packed, and their packed
    tensors yielded.
    shard: yield this part of each tensor. Memory peaks at the weights that the caller keeps plus one tensor. On the CPU
    a tensor that needs no conversion is a read-only view of the file. `progress(done, total)` is called with stored
    bytes after each weight. Raises CheckpointError before the first tensor if the checkpoint does not fit the config,
    is packed differently from `quant`, or stores scales that are not finite or too large for a product; during loading
    if computed scales are not finite or too large, or a weight does not fit `dtype` (finite values that float16 cannot
    hold). Raises SchemeError if a layer does not fit its scheme.
    """
    check_fit(checkpoint, config)
    wanted = expected_tensors(config)
    names = [name for name in checkpoint.names if name in wanted]
    shapes = expected_shapes(config)
    asked = layer_schemes(to_quantize(config, quant))
    schemes = {layer: scheme for layer, scheme in asked.items() if f"{layer}.weight" in checkpoint}
    later: dict[str, Callable[[], None]] = {}
    for layer, scheme in layer_schemes(config).items():
        check = partial(_check_stored_scales, checkpoint, layer, scheme, shapes[f"{layer}.weight"][1], dtype)
        scales = f"{layer}.{PARTS[1]}"
        if checkpoint.parameters[scales].is_mapped:
            check()
        else:  # they are decoded once, for the check and the model
            later[scales] = check
    where = device if callable(device) else lambda name: torch.device(device)
    return _weights(checkpoint, names, schemes, later, where, dtype, shard, progress)


def _check_stored_scales(
    checkpoint: Checkpoint, layer: str, scheme: Scheme, inputs: int, dtype: torch.dtype | None
) -> None:
    _, *names = (name for part in PARTS if (name := f"{layer}.{part}") in checkpoint)
    tensors = [checkpoint.tensor(name) for name in names]
    for name, tensor in zip(names, tensors, strict=True):
        check_finite(tensor, checkpoint.origin(name))
    check_scales(
        scheme, tensors[0], tensors[1] if len(tensors) > 1 else None, inputs, dtype, checkpoint.origin(names[0])
    )


def _weights(
    checkpoint: Checkpoint,
    names: list[str],
    schemes: dict[str, Scheme],
    checks: Mapping[str, Callable[[], None]],
    device: Callable[[str], torch.device],
    dtype: torch.dtype | None,
    shard: Shard | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """checks: called before the parameter of that name is read."""
    total = sum(map(checkpoint.stored_bytes, names))
    done = 0
    for name in names:
        if name in checks:
            checks[name]()
        scheme = schemes.get(name.removesuffix(".weight"))
        yield from weight_tensors(checkpoint, name, scheme, device(name), dtype, shard)
        done += checkpoint.stored_bytes(name)
        if progress is not None:
            progress(done, total)


def weight_tensors(
    checkpoint: Checkpoint,
    name: str,
    scheme: Scheme | None,
    device: torch.device,
    dtype: torch.dtype | None,
    shard: Shard | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of one parameter or, with a scheme, of its packed tensors; see `load_weights`."""
    if scheme is None:
        # Keep no local reference to the weight, so that the caller decides how long it stays in memory.
        yield name, _place(checkpoint, name, device, dtype, shard)
    else:
        yield from _pack(checkpoint, name, scheme, device, dtype, shard)


def _pack(
    checkpoint: Checkpoint,
    name: str,
    scheme: Scheme,
    device: torch.device,
    dtype: torch.dtype | None,
    shard: Shard | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    weight = checkpoint.tensor(name)
    if shard is not None:  # columns are cut after packing: int8 has one scale for a whole row
        weight = shard.cut_rows(shard.rows(name.removesuffix(".weight")), weight)

    def release(rows: int) -> None:
        checkpoint.release(name, rows * weight.shape[1] * weight.itemsize)

    try:
        packed = scheme.quantize(weight, device=device, progress=release)
    except ValueError as problem:
        raise CheckpointError(f"{checkpoint.origin(name)} cannot be quantized: {problem}.") from None
    check_scales(scheme, packed.scales, packed.zeros, weight.shape[1], dtype, checkpoint.origin(name))
    checkpoint.release(name)
    for part, tensor in packed.named(name).items():
        yield part, tensor if shard is None else shard.cut(part, tensor)


def _place(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype | None, shard: Shard | None
) -> torch.Tensor:
    mapped = checkpoint.tensor(name)
    if shard is not None:
        mapped = shard.cut(name, mapped)
    if name.endswith(PARTS):
        dtype = None
    dtype = dtype or mapped.dtype
    if device.type == "cpu" and mapped.dtype == dtype:
        if not checkpoint.parameters[name].is_mapped:
            checkpoint.release(name)
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


def add(parameters: dict[str, StoredParameter], name: str | None, parameter: StoredParameter) -> None:
    """Add the parameter under its canonical name, or skip it if None. Raises CheckpointError for a duplicate name."""
    if name is None:
        return
    if name in parameters:
        raise CheckpointError(
            f"{parameters[name].origin} and {parameter.origin} are both {shown(name)}; keep one of them."
        )
    parameters[name] = parameter
