"""Random blocks of ggml's formats, with the sizes that weights have."""

import gguf
import numpy as np

_LAYOUTS = {
    "Q4_0": [("d", "<f2"), ("rest", "u1", 16)],
    "Q4_1": [("d", "<f2"), ("m", "<f2"), ("rest", "u1", 16)],
    "Q5_0": [("d", "<f2"), ("rest", "u1", 20)],
    "Q5_1": [("d", "<f2"), ("m", "<f2"), ("rest", "u1", 20)],
    "Q8_0": [("d", "<f2"), ("rest", "u1", 32)],
    "Q4_K": [("d", "<f2"), ("m", "<f2"), ("rest", "u1", 140)],
    "Q5_K": [("d", "<f2"), ("m", "<f2"), ("rest", "u1", 172)],
    "Q6_K": [("rest", "u1", 208), ("d", "<f2")],
}
# The largest product of a block's codes and, of the K formats, its six- or eight-bit scales.
_LARGEST = {"Q4_0": 8, "Q4_1": 8, "Q5_0": 16, "Q5_1": 16, "Q8_0": 128, "Q4_K": 945, "Q5_K": 1953, "Q6_K": 4096}


def random_blocks(kind: str, rows: int, inputs: int, rng: np.random.Generator, size: float = 1.0) -> np.ndarray:
    """Blocks [rows, bytes] of weights up to about `size`, every bit of their codes and scales random."""
    layout = np.dtype(_LAYOUTS[kind])
    count = inputs // gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    blocks = np.frombuffer(rng.bytes(rows * count * layout.itemsize), layout).reshape(rows, count).copy()
    unit = size / _LARGEST[kind]
    blocks["d"] = unit * rng.uniform(0.5, 1, (rows, count))
    if "m" in layout.names:
        blocks["m"] = (size / 63 if kind.endswith("K") else size) * rng.uniform(-0.5, 0.5, (rows, count))
    return blocks.view("u1").reshape(rows, -1)


def weights_of(kind: str, blocks: np.ndarray) -> np.ndarray:
    """The float32 weights of blocks, as the package `gguf` decodes them."""
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
