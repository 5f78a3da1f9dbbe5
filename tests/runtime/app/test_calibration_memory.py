"""How much memory calibration takes: that of a layer, however many layers there are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.audio import speech_like, wav_bytes
from support.checkpoints import save_checkpoint

SCRIPT = """
import re, sys
from pathlib import Path
import afnext
from afnext.quant.recipe import recipe
from afnext.runtime.app.calibration import calibrate

def kibibytes(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

source, out, data = map(Path, sys.argv[1:])
before = kibibytes("VmRSS")
calibrate(source, out, recipe("int4-g64"), data)
print((kibibytes("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
def test_peak_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.wav").write_bytes(wav_bytes(speech_like(3.0, 1)))
    peaks, sizes = [], []
    for layers in (2, 12):
        folder = tmp_path / str(layers)
        folder.mkdir()
        sizes_of_layers = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": layers}
        save_checkpoint(folder, decoder=sizes_of_layers | {"num_attention_heads": 12, "num_key_value_heads": 2})
        command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / f"out{layers}"), str(data)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""}
        )
        peaks.append(int(re.findall(r"\d+", done.stdout)[-1]))
        sizes.append(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    # Ten layers more, and far less more than ten layers' weights.
    assert peaks[1] - peaks[0] < 0.2 * (sizes[1] - sizes[0])
