"""Relative RMS within which outputs must agree before their times are compared."""

# Two runs of one random model: rounding alone, at the given dtype and over many layers.
DENSE = {"float32": 1e-4, "bfloat16": 0.08, "float16": 0.02}
# Packed weights against dense ones: the effect of rounding on the scores of a random model.
PACKED = {
    "int8": 0.15,
    "int8-w8a8": 0.25,
    "fp8": 0.4,
    **dict.fromkeys(("int4", "int4-w4a8", "nf4", "nvfp4", "mxfp4"), 0.7),
    "int3": 1.0,
}


def tolerance(scheme: str, dtype: str) -> float:
    """The bound for a model in `scheme` that computes in `dtype` ("float32", "bfloat16" or "float16")."""
    return PACKED.get(scheme, DENSE[dtype])
