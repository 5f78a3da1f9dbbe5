"""The format of a checkpoint that another library quantized, by its quantization_config."""

from collections.abc import Mapping
from typing import Any

from . import fp8_importer, nvfp4_importer
from .float_importer import FloatFormat
from .importers import ForeignFormat, ImportFormatError


def foreign_format(values: Any) -> ForeignFormat | FloatFormat:
    """Read the quantization_config of a config.json. Raises ImportFormatError for unsupported formats."""
    if isinstance(values, Mapping):
        if values.get("quant_method") == "modelopt":
            return _modelopt_format(values)
        if values.get("quant_method") == "compressed-tensors":
            if values.get("format") == fp8_importer.COMPRESSED_FORMAT:
                return fp8_importer.compressed_fp8(values)
            if values.get("format") == nvfp4_importer.COMPRESSED_FORMAT:
                return nvfp4_importer.compressed_nvfp4(values)
    return ForeignFormat.from_config(values)


def _modelopt_format(values: Mapping[str, Any]) -> FloatFormat:
    algorithm = values.get("quant_algo")
    if algorithm == nvfp4_importer.MODELOPT_ALGORITHM:
        return nvfp4_importer.modelopt_nvfp4(values)
    if algorithm not in fp8_importer.MODELOPT_ALGORITHMS:
        raise ImportFormatError(
            f"ModelOpt's weights in {str(algorithm)[:40]!r} cannot be imported, only in "
            f"{', '.join(fp8_importer.MODELOPT_ALGORITHMS)} or {nvfp4_importer.MODELOPT_ALGORITHM}; use the dense ones"
        )
    return fp8_importer.Fp8Format("modelopt")
