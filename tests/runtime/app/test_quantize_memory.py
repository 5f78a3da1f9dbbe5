"""What quantizing and loading take at most, in processes of their own, on a checkpoint of the true width.

Its weights are a hole in a file, which reads as zeros and takes no disk; where memory is counted, zeros are as good as
any numbers.
"""

import json
import os
import struct
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.runtime.model.config import ModelConfig
from afnext.runtime.model.parameters import expected_shapes

ENCODER = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 1, "num_attention_heads": 20}
DECODER = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 1,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
# Prints how much each step adds to the resident memory at most, and what the model's tensors take.
PROBE = """
import gc, sys
import torch
import afnext
from afnext.bench.core.machine import peak_rss, reset_peaks
from afnext.quant.recipe import recipe
from afnext.runtime.app.quantize import quantize

def growth(work):
    gc.collect()
    assert reset_peaks(torch.device("cpu"))
    before = peak_rss()
    result = work()
    print(peak_rss() - before)
    return result

source, out, name = sys.argv[1:]
growth(lambda: quantize(source, out, recipe(name)))
mapped = growth(lambda: afnext.load(out, device="cpu"))
packed = growth(lambda: afnext.load(source, device="cpu", quant=name))
print(sum(buffer.nbytes for buffer in packed.network.buffers()))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_random_checkpoint(tmp_path_factory.mktemp("wide"))
    config = json.loads((folder / "config.json").read_text())
    config["audio_config"] |= ENCODER
    config["text_config"] |= DECODER
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() <= config["text_config"]["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in expected_shapes(ModelConfig.from_folder(folder)).items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * prod(shape)]}
        end += 2 * prod(shape)
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the peak of resident memory")
def test_memory_of_quantizing_and_loading(wide: Path, tmp_path: Path) -> None:
    # The reference keeps no copies beside the weights, as torch on a CPU does for int4.
    environment = os.environ | {"AFNEXT_BACKEND": "reference", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROBE, str(wide), str(tmp_path / "out"), "int8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    quantizing, mapping, loading, packed = map(int, done.stdout.split())
    dense, written = ((folder / "model.safetensors").stat().st_size for folder in (wide, tmp_path / "out"))
    largest = 2 * DECODER["hidden_size"] * DECODER["intermediate_size"]
    assert packed < 0.55 * dense
    assert loading < packed + largest
    assert quantizing < 1.5 * largest
    assert written < 1.01 * packed
    assert mapping < 0.2 * packed
