"""`python tests/fuzz [NAME ...]`: runs the fuzzers of this folder, one after another, within `--seconds` in all.

A fuzzer is a module NAME.py in this folder with two functions:

    def cases(rng: random.Random) -> Iterator[tuple[str, bytes]]:
        '''Endless inputs drawn from `rng`, each with a few words on how it was made.'''

    def check(data: bytes) -> None:
        '''Feeds one input to the code under test. Returns where the outcome is right, a refusal with AfnextError
        included; any exception that leaves it is a finding, as are a crash, a hang and memory beyond the limit.'''

`data` is all that `check` gets, so that a finding can be repeated from its file: a module whose input is more than one
string of bytes packs it (JSON, a zip). Limits of one case, both optional, stand in the module as

    SECONDS = 20.0  # of CPU time in one process, and a tenth of what the clock on the wall may show
    MEGABYTES = 1024  # of private memory, beyond what the process holds before

`cases` runs in the process that forks a child for each `check`, so it must start no threads (load no model) and see
nothing of what `check` does. `afnext` and `support` can be imported; torch has one thread. Findings go to a folder: the
input as NAME-SEED-INDEX.bin, how it was made and what happened as .txt beside it. The exit code is 1 if there are any.

    python tests/fuzz audio --repeat build/fuzz/audio-17-203.bin    # in this process, under a debugger if need be
"""

import argparse
import importlib
import math
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
SECONDS, MEGABYTES = 20.0, 1024
WALL = 10  # how many times its seconds a case may take on a busy machine, or asleep


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the fuzzers of this folder.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones; all without a name")
    parser.add_argument("--seconds", type=float, default=1200.0, help="for all of them together")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--findings", type=Path, default=HERE.parents[1] / "build" / "fuzz", help="folder")
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="check this one input, with the one NAME given")
    options = parser.parse_args()
    known = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))
    names = options.names or known
    if unknown := set(names) - set(known):
        parser.error(f"there is no fuzzer {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.append(str(HERE.parent))
    if options.repeat:
        if len(names) != 1:
            parser.error("--repeat needs the one NAME of the fuzzer")
        importlib.import_module(names[0]).check(options.repeat.read_bytes())
        return
    options.findings.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}", flush=True)
    failed = False
    for name in names:
        seconds = options.seconds / len(names)
        code, _ = in_child(partial(fuzz, name, options.seed, seconds, options.findings), None)
        failed |= code != 0
    raise SystemExit(failed)


def fuzz(name: str, seed: int, seconds: float, findings: Path) -> None:
    """Checks cases of the module `name` for `seconds` and exits with 1 if there are findings."""
    module = importlib.import_module(name)
    limit = getattr(module, "SECONDS", SECONDS)
    end = time.monotonic() + seconds
    count = found = 0
    slowest = 0.0
    for how, data in module.cases(random.Random(f"{name} {seed}")):
        if time.monotonic() > end:
            break
        start = time.monotonic()
        code, output = in_child(partial(check, module, data, limit), WALL * limit)
        slowest = max(slowest, time.monotonic() - start)
        if code:
            found += 1
            stem = findings / f"{name}-{seed}-{count}"
            ending = {0: "", 1: ""}.get(code, f"ended by {code if code > 0 else signal.Signals(-code).name}")
            if code in (-signal.SIGKILL, -signal.SIGXCPU):
                ending = f"not done after {limit if code == -signal.SIGXCPU else WALL * limit:g} s"
            stem.with_suffix(".bin").write_bytes(data)
            stem.with_suffix(".txt").write_text(f"{how}\n{ending}\n{output}", "utf-8")
            print(f"{stem}.bin: {how}: {ending or (output.strip().splitlines() or ['?'])[-1]}", flush=True)
        count += 1
    print(f"{name}: seed {seed}, {count} cases, {found} findings, the slowest case {slowest:.1f} s", flush=True)
    raise SystemExit(found > 0)


def check(module: ModuleType, data: bytes, seconds: float) -> None:
    """`module.check` within its limits of memory and of CPU time."""
    used = sum(os.times()[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds), resource.RLIM_INFINITY))
    status = Path("/proc/self/status")
    if status.exists():
        held = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmData"))
        most = (held << 10) + (int(getattr(module, "MEGABYTES", MEGABYTES)) << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module.check(data)


def in_child(work: Callable[[], None], limit: float | None) -> tuple[int, str]:
    """Exit code of a child that does `work`, negative for a signal, and what it wrote to stderr where `limit` is given;
    after `limit` seconds it is killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            if limit is not None:
                os.dup2(writing, 2)
            work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    output = bytearray()
    end = time.monotonic() + (limit or 0)
    try:
        while limit is None or (left := end - time.monotonic()) > 0:
            if not select.select([reading], [], [], None if limit is None else left)[0]:
                continue
            if not (piece := os.read(reading, 1 << 16)):
                break
            output = (output + piece)[-20_000:]
        else:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except KeyboardInterrupt:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(reading)
    return code, output.decode("utf-8", "replace")


if __name__ == "__main__":
    main()
