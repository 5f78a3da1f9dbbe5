"""Checkpoints in GGUF files: audio.cpp's packages, and llama.cpp's pairs of a text model and an audio encoder.

Weights in blocks are converted to the schemes of `quant.ggml` with the same values; nothing is rounded again. A weight
that is not a matrix of a product, such as the encoder's positions, is dequantized to float32.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...quant.convert import spelled
from ...quant.ggml import FORMATS, dequantized, packed_codes, packed_scales
from ...quant.importers import ImportFormatError
from ...quant.recipe import Recipe, fewest_rules
from ...quant.scheme import PARTS, Scheme
from ..checkpoint_folder import EmbeddedFiles
from ..errors import CheckpointError
from .checkpoint import Checkpoint, add
from .checkpoint_files import first_five
from .download import GGUF_SUFFIX
from .gguf_file import DENSE_TYPES, GgufFile, GgufTensor
from .gguf_package import is_package, package_contents, package_tensors
from .gguf_pair import is_encoder, is_text_model, pair_contents, pair_tensors
from .quantized import is_matrix
from .safetensors_header import StoredTensor
from .stored_parameter import MappedParameter, StoredParameter


@dataclass(frozen=True)
class GgufCheckpoint:
    """Contents of GGUF files: settings and texts, weights, and the recipe of those in blocks (None: there are none)."""

    files: EmbeddedFiles
    weights: Checkpoint
    recipe: Recipe | None


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of a file with its canonical name and the model's shape."""

    file: GgufFile
    stored_name: str
    name: str | None
    shape: tuple[int, ...]
    tensor: GgufTensor


def gguf_files(path: Path) -> tuple[GgufFile, ...]:
    """The files of the checkpoint at `path`: one package, or a text model and an encoder.

    path: a GGUF file, or a folder with GGUF files and no config.json; otherwise the result is empty. Raises
    CheckpointError for a damaged file, or if it is not clear which files belong together.
    """
    if path.is_dir():
        if (path / "config.json").exists():
            return ()
        return _chosen(path, [GgufFile(file) for file in _in_folder(path)])
    if path.suffix.lower() != GGUF_SUFFIX:
        return ()
    first = GgufFile(path)
    if not is_text_model(first):
        return _chosen(path, [first])
    beside = (GgufFile(file) for file in _in_folder(path.parent) if file != path and "mmproj" in file.name.lower())
    return _chosen(path, [first, *beside])


def open_gguf(path: Path, files: tuple[GgufFile, ...]) -> GgufCheckpoint:
    """The checkpoint in the files that `gguf_files` found at `path`. Raises CheckpointError or ConfigError."""
    first = files[0]
    if len(files) == 1:
        contents, named = package_contents(first), package_tensors(first)
        tensors = [NamedTensor(first, *each) for each in named]
    else:
        contents = pair_contents(*files)
        tensors = [NamedTensor(file, *each) for file in files for each in pair_tensors(file)]
    parameters: dict[str, StoredParameter] = {}
    schemes: dict[str, Scheme | None] = {}
    for tensor in tensors:
        for name, parameter in _parameters(tensor).items():
            add(parameters, name, parameter)
        if tensor.name is not None and is_matrix(tensor.name, tensor.shape):
            form = FORMATS.get(tensor.tensor.kind)
            schemes[tensor.name.removesuffix(".weight")] = None if form is None else form.scheme
    paths = tuple(file.path for file in files)
    weights = Checkpoint(path, parameters, paths, metadata={})
    return GgufCheckpoint(EmbeddedFiles(path, contents), weights, _recipe(schemes, tensors))


class _BlockScales:
    """The scales, and zero points if any, of a matrix in blocks: decoded together, kept until both are released."""

    def __init__(self, source: NamedTensor) -> None:
        self._source = source
        self._decoded: dict[str, Tensor] = {}

    def part(self, name: str) -> Tensor:
        """One of them by its name in `PARTS`. Raises ImportFormatError for numbers that cannot be stored."""
        if name not in self._decoded:
            tensor = self._source.tensor
            scales, zeros = packed_scales(tensor.kind, _rows(self._source.file.mapped.bytes, tensor))
            self._decoded = {PARTS[1]: scales} if zeros is None else {PARTS[1]: scales, PARTS[2]: zeros}
        return self._decoded[name]

    def release(self, name: str) -> None:
        """Forget one of them; it is decoded again if it is asked for again."""
        self._decoded.pop(name, None)


class _BlockParameter(StoredParameter):
    """Codes, scales or zero points of a matrix in blocks, as its scheme stores them."""

    def __init__(self, source: NamedTensor, part: str, scales: _BlockScales) -> None:
        self.file, self.stored_name = source.file.mapped, source.stored_name
        self._tensor, self._part, self._scales = source.tensor, part, scales
        stored = FORMATS[source.tensor.kind].scheme.stored(source.shape)[part]
        self.shape, self._dtype = stored.shape, stored.dtypes[0]
        if self._dtype == torch.bfloat16:  # ggml's own 16 bits
            self._dtype = torch.float16

    @property
    def dtype(self) -> str:
        """See `StoredParameter`."""
        return spelled(self._dtype)

    @property
    def nbytes(self) -> int:
        """See `StoredParameter`."""
        return self.elements * self._dtype.itemsize

    def tensor(self) -> Tensor:
        """A copy, decoded from the blocks. Raises CheckpointError for numbers that cannot be stored."""
        try:
            if self._part == PARTS[0]:
                return packed_codes(self._tensor.kind, _rows(self.file.bytes, self._tensor))
            return self._scales.part(self._part)
        except ImportFormatError as problem:
            raise CheckpointError(f"{self.origin} {problem}.") from None
        finally:
            self.file.release(self._tensor.start, self._tensor.end)

    def release(self, nbytes: int) -> None:
        """Forget what was decoded; the file's memory is released as soon as it is decoded."""
        if nbytes >= self.nbytes:
            self._scales.release(self._part)


class _DequantizedParameter(StoredParameter):
    """A parameter in blocks that is not a matrix of a product, as float32."""

    dtype = "F32"

    def __init__(self, source: NamedTensor) -> None:
        self.file, self.stored_name, self.shape = source.file.mapped, source.stored_name, source.shape
        self._tensor = source.tensor

    @property
    def nbytes(self) -> int:
        """See `StoredParameter`."""
        return 4 * self.elements

    def tensor(self) -> Tensor:
        """A copy, decoded from the blocks."""
        return dequantized(self._tensor.kind, _rows(self.file.bytes, self._tensor)).view(self.shape)

    def release(self, nbytes: int) -> None:
        """See `StoredParameter`."""
        self.file.release(self._tensor.start, self._tensor.end)


def _parameters(source: NamedTensor) -> Mapping[str | None, StoredParameter]:
    """The parameters of a tensor of a file, by canonical name."""
    kind, name = source.tensor.kind, source.name
    if kind in DENSE_TYPES:
        stored = StoredTensor(kind, source.shape, source.tensor.start, source.tensor.end)
        return {name: MappedParameter(source.file.mapped, source.stored_name, stored)}
    if kind not in FORMATS:
        raise CheckpointError(
            f"{source.file.label}: tensor {source.stored_name} is stored as {kind}, which this runtime does not read; "
            f"it reads {', '.join((*DENSE_TYPES, *FORMATS))}."
        )
    if name is None or not is_matrix(name, source.shape):
        return {name: _DequantizedParameter(source)}
    form = FORMATS[kind]
    layer = name.removesuffix("weight")
    scales = _BlockScales(source)
    return {layer + part: _BlockParameter(source, part, scales) for part in form.scheme.stored(source.shape)}


def _rows(data: Tensor, tensor: GgufTensor) -> Tensor:
    """The bytes of a tensor in blocks, row by row: [rows, bytes] uint8."""
    weights = tensor.shape[-1]
    nbytes = weights // FORMATS[tensor.kind].weights * FORMATS[tensor.kind].nbytes
    return data[tensor.start : tensor.end].view(-1, nbytes)


def _in_folder(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == GGUF_SUFFIX and not path.is_dir())


def _chosen(path: Path, files: list[GgufFile]) -> tuple[GgufFile, ...]:
    """One package, or one text model and one encoder. Raises CheckpointError for anything else."""
    if not files:
        return ()
    for file in files:
        if file.metadata.get("split.count", 1) != 1:
            raise CheckpointError(
                f"{file.label} is one part of a model in several files; join them with llama.cpp's "
                "`llama-gguf-split --merge` first."
            )
    packages = [file for file in files if is_package(file)]
    texts = [file for file in files if is_text_model(file)]
    encoders = [file for file in files if is_encoder(file)]
    if len(packages) == 1 and not texts:
        return (packages[0],)
    if len(texts) == len(encoders) == 1 and not packages:
        return texts[0], encoders[0]
    if len(packages) + len(texts) > 1 or len(encoders) > 1:
        names = first_five([file.label for file in (*packages, *texts, *encoders)])
        raise CheckpointError(f"{path} holds several models ({names}); name one file, beside the mmproj it needs.")
    if texts:
        raise CheckpointError(
            f"{texts[0].label} is a text model alone; put the mmproj file that belongs to it beside it, under a name "
            "with mmproj in it."
        )
    if encoders:
        raise CheckpointError(f"{encoders[0].label} is an audio encoder alone; give the text model that it belongs to.")
    found = files[0].metadata.get("general.architecture")
    raise CheckpointError(
        f"{files[0].label} holds a model of the architecture {str(found)[:40]!r}; this runtime reads audio.cpp's "
        "packages of Audio Flamingo and llama.cpp's pairs of a qwen2 text model and an mmproj file."
    )


def _recipe(schemes: Mapping[str, Scheme | None], tensors: Iterable[NamedTensor]) -> Recipe | None:
    """The recipe of the layers in blocks; None if there are none."""
    kinds: Counter[str] = Counter()
    for each in tensors:
        if each.tensor.kind in FORMATS:
            kinds[each.tensor.kind] += each.tensor.end - each.tensor.start
    if not any(schemes.values()):
        return None
    return Recipe(f"gguf-{kinds.most_common(1)[0][0].lower()}", fewest_rules(schemes))
