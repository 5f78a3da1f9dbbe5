"""An emulator of the PTX instructions in kernels' inline assembly, which the interpreter cannot run."""

import re

import torch
from torch import Tensor


def run_ptx(source: str, words: Tensor, dtype: torch.dtype, results: int = 4) -> list[Tensor]:
    """What the instructions in `source` make of words, by their definitions: the 32 bits of each result.

    The results are the first operands, from $0 on, and the words are the next one.
    """

    def halves(register: Tensor) -> Tensor:
        return torch.stack((register, register >> 16), -1).to(torch.int16).view(dtype).double()

    def byte(a: Tensor, b: Tensor, selector: int) -> Tensor:
        return ((b if selector & 4 else a) >> (8 * (selector & 3))) & 0xFF

    registers: dict[str, Tensor] = {f"${results}": words & 0xFFFFFFFF}
    for line in source.strip("{}\n ").splitlines():
        if line.startswith(".reg"):
            continue
        name, to, *operands = re.split(r",? ", line.strip(" ;"))
        values = [registers[o] if o in registers else torch.full_like(words, int(o, 0)) for o in operands]
        if name == "mov.b32":
            result = values[0]
        elif name == "shr.u32":
            result = values[0] >> values[1]
        elif name == "shl.b32":
            result = values[0] << values[1] & 0xFFFFFFFF
        elif name == "and.b32":
            result = values[0] & values[1]
        elif name == "prmt.b32":
            selectors = [(int(operands[2], 0) >> (4 * i)) & 15 for i in range(4)]
            result = sum(byte(values[0], values[1], selectors[i]) << (8 * i) for i in range(4))
        elif name == "lop3.b32":
            a, b, c = values[:3]
            table, result = int(operands[3], 0), torch.zeros_like(words)
            for case in range(8):
                chosen = [v if case >> (2 - i) & 1 else ~v for i, v in enumerate((a, b, c))]
                result |= (chosen[0] & chosen[1] & chosen[2] & 0xFFFFFFFF) if table >> case & 1 else 0
        else:
            assert name == f"fma.rn.{'bf16x2' if dtype == torch.bfloat16 else 'f16x2'}"
            a, b, c = map(halves, values)
            bits = (a * b + c).to(dtype).view(torch.int16).long() & 0xFFFF
            result = bits[..., 0] | bits[..., 1] << 16
        registers[to] = result
    return [registers[f"${i}"] for i in range(results)]
