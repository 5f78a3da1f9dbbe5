# ruff: noqa: N803 - kernels write their constexprs in capitals
"""The audit of compiled kernels: it reads them right, counts their work right, and catches what must not ship."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import CommandLine

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from afnext.bench.codegen import audit as codegen  # noqa: E402
from afnext.bench.codegen import compiled as codegen_audit  # noqa: E402
from afnext.bench.codegen.audit import CodegenError, audit, to_dict  # noqa: E402
from afnext.bench.codegen.chips import GPUS  # noqa: E402
from afnext.bench.codegen.compiled import compile_all, compile_one, resident_blocks, violations  # noqa: E402
from afnext.bench.codegen.report import write_audit  # noqa: E402
from afnext.bench.codegen.stages import Stage  # noqa: E402
from afnext.bench.codegen.trace import Launch, recorded_launches  # noqa: E402
from afnext.kernels.activation import swiglu  # noqa: E402
from afnext.kernels.chips import CHIPS, KIB  # noqa: E402
from afnext.kernels.decode_attention import decode_attention  # noqa: E402
from afnext.kernels.kv_write import kv_write  # noqa: E402
from afnext.kernels.rotary import Rotation, rope_frequencies  # noqa: E402

META = torch.device("meta")
CONTEXT, PAGE_SIZE = 45_001, 256
HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@triton.jit
def _product(a, b, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a + i * SIZE + j), tl.load(b + i * SIZE + j), input_precision=PRECISION)
    tl.store(out + i * SIZE + j, product.to(out.dtype.element_ty))


@triton.jit
def _looped(a, b, out, steps, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(steps):
        at = step * SIZE * SIZE + i * SIZE + j
        total = tl.dot(tl.load(a + at), tl.load(b + at), total)
    tl.store(out + i * SIZE + j, total)


@triton.jit
def _greedy_with_registers(a, b, out, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x, y = tl.load(a + i * SIZE + j), tl.load(b + i * SIZE + j)
    xy, yx = tl.dot(x, y), tl.dot(y, x)
    tl.store(out + i * SIZE + j, tl.dot(xy.to(x.dtype), yx.to(x.dtype)) + xy * yx)


@triton.jit
def _sine(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.sin(tl.load(x + i, mask=i < n)), mask=i < n)


def matrices(size: int, dtype: torch.dtype, count: int = 1) -> tuple[torch.Tensor, ...]:
    out = torch.empty(size, size, device=META)
    return *(torch.empty(count, size, size, dtype=dtype, device=META) for _ in range(2)), out


def only_launch(launch: Any) -> Launch:
    """Of the one kernel that `launch()` launches."""
    with recorded_launches() as recording:
        launch()
    assert len(recording.launches) == 1
    return recording.launches[0]


def pools(dtype: torch.dtype, pages: int = 1000) -> dict[str, torch.Tensor]:
    shape = (pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    found = {name: torch.empty(shape, dtype=dtype, device=META) for name in "kv"}
    if dtype == torch.int8:
        found |= {f"{name}_scales": torch.empty(shape[:-1], device=META) for name in "kv"}
    return found


def decode(dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> None:
    """One layer's attention of a decode step, and an activation."""
    lengths = torch.empty(batch, dtype=torch.int64, device=META)
    table = torch.empty(batch, -(-CONTEXT // PAGE_SIZE), dtype=torch.int32, device=META)
    q = torch.empty(batch, 1, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=META)
    decode_attention(q, **pools(dtype), key_lengths=lengths, page_table=table)
    gate, up = (torch.empty(batch, 1, 18944, dtype=torch.bfloat16, device=META) for _ in range(2))
    swiglu(gate, up)


DECODE = Stage("decode", CONTEXT, decode)


def test_kernels_of_the_model_meet_the_bars() -> None:
    result = audit(targets=("sm_80", "sm_90"), only=[DECODE], workers=0)
    assert result.offenders == []
    assert {row.operation for row in result.rows} == {"decode_attention", "swiglu"}
    for row in result.rows:
        assert set(row.resources) == {"sm_80", "sm_90"}
        for target, resources in row.resources.items():
            assert 16 <= resources.registers <= 255
            assert 0 < resources.occupancy(target) <= 1
    (attention,) = (row for row in result.rows if row.flops("sm_90"))
    assert all(resources.has_dot and resources.instructions for resources in attention.resources.values())
    assert attention.flops("sm_80") == 4 * HEAD_DIM * HEADS * CONTEXT


def test_a_launch_is_configured_for_the_chip_it_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen, "compile_all", lambda jobs, **_: {})
    seen: list[tuple[str, Launch]] = []
    monkeypatch.setattr(codegen, "_enter", lambda rows, target, stage, found: seen.extend((target, x) for x in found))
    audit(targets=("sm_86", "sm_120"), only=[DECODE], workers=0)
    first = {target: launch.grid for target, launch in reversed(seen)}
    assert first["sm_86"] < first["sm_120"], "more multiprocessors take more parts"


def test_bytes_are_those_that_a_launch_touches() -> None:
    with recorded_launches(CONTEXT) as recording:
        decode()
    cache = 2 * CONTEXT * KV_HEADS * HEAD_DIM * 2
    assert cache < recording.launches[0].bytes < 1.05 * cache, "not the whole pool"
    with recorded_launches(CONTEXT) as recording:
        decode(torch.int8, batch=4)
    cache = 4 * 2 * CONTEXT * KV_HEADS * (HEAD_DIM + 4)
    assert cache < recording.launches[0].bytes < 1.05 * cache
    assert recording.launches[0].work.products == 4 * 4 * HEAD_DIM * HEADS * CONTEXT


def test_bytes_of_a_write_into_pages() -> None:
    q, k = (torch.empty(1, 9, heads, HEAD_DIM, dtype=torch.bfloat16, device=META) for heads in (HEADS, KV_HEADS))
    positions = torch.arange(9, device=META)[None]
    caches = {f"{name}_cache": pool for name, pool in pools(torch.bfloat16).items()}
    rotation = Rotation(positions.float(), rope_frequencies(HEAD_DIM, 1e6, META))
    launch = only_launch(lambda: kv_write(q, k, k.clone(), **caches, slots=positions, rotation=rotation))
    moved = 9 * (2 * (2 * HEADS + 4 * KV_HEADS) * HEAD_DIM)
    tables = 9 * (2 * 4 * HEAD_DIM // 2 + 8)
    assert launch.bytes == moved + tables


def test_a_tensor_given_twice_counts_once_and_a_broadcast_one_its_own_elements() -> None:
    a, b, out = matrices(16, torch.bfloat16)
    assert only_launch(lambda: _product[(1,)](a, b, out, 16, "ieee")).bytes == 2 * 16 * 16 * 2 + 16 * 16 * 4
    assert only_launch(lambda: _product[(1,)](a, a, out, 16, "ieee")).bytes == 16 * 16 * 2 + 16 * 16 * 4
    row = torch.empty(1, 16, dtype=torch.bfloat16, device=META).expand(16, 16)
    assert only_launch(lambda: _product[(1,)](a, row, out, 16, "ieee")).bytes == 17 * 16 * 2 + 16 * 16 * 4


def test_alike_launches_are_one_row_and_unaligned_ones_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen_audit, "compile_one", lambda specialization, target: codegen_audit.Resources())

    def run() -> None:
        a, b, out = matrices(16, torch.bfloat16, count=2)
        for _ in range(3):
            _product[(1,)](a[0], b[0], out, 16, "ieee")
        _product[(1,)](a.view(-1)[1:257].view(16, 16), b[0], out, 16, "ieee")
        _product[lambda meta: (meta["SIZE"],)](a[1], b[1], out, 16, PRECISION="ieee")

    result = audit(targets=("sm_80", "sm_86"), only=[Stage("one", 0, run), Stage("two", 0, run)], workers=0)
    assert [row.stages for row in result.rows] == [{"one": 4, "two": 4}, {"one": 1, "two": 1}]
    assert all(set(row.launches) == {"sm_80", "sm_86"} for row in result.rows)
    divisible = [sum(map(bool, row.launches["sm_80"].specialization.attributes.values())) for row in result.rows]
    assert divisible == [3, 2]


def test_a_sound_kernel_has_no_faults() -> None:
    launch = only_launch(lambda: _product[(1,)](*matrices(64, torch.bfloat16), 64, "ieee"))
    for target, instruction in (("sm_86", "HMMA"), ("sm_90", "HGMMA"), ("sm_120", "HMMA")):
        resources = compile_one(launch.specialization, target)
        assert violations(resources, target) == []
        assert resources.has_dot
        assert instruction in (resources.instructions or {})


def test_spills_are_caught() -> None:
    launch = only_launch(lambda: _greedy_with_registers[(1,)](*matrices(128, torch.bfloat16), 128, num_warps=4))
    resources = compile_one(launch.specialization, "sm_86")
    assert resources.spills > 0
    assert [re.sub(r"\d+", "N", fault) for fault in violations(resources, "sm_86")] == [
        "spills N bytes of registers a thread"
    ]


def test_the_array_of_an_accurate_sine_is_no_spill() -> None:
    x = torch.empty(1024, device=META)
    launch = only_launch(lambda: _sine[(4,)](x, torch.empty_like(x), 1000, BLOCK=256))
    resources = compile_one(launch.specialization, "sm_80")
    assert resources.stack > 0
    assert resources.spills == 0


def test_too_much_shared_memory_is_caught_on_the_chips_that_lack_it() -> None:
    """Three pipeline stages keep two buffers of 2 x 32 KiB: a block of sm_80 may have them, one of sm_86 may not."""
    arguments = (*matrices(128, torch.bfloat16, count=8), 8, 128)
    launch = only_launch(lambda: _looped[(1,)](*arguments, num_warps=8, num_stages=3))
    assert violations(compile_one(launch.specialization, "sm_80"), "sm_80") == []
    resources = compile_one(launch.specialization, "sm_86")
    assert resources.shared > 99 * KIB
    assert resources.blocks == 0
    assert ["shared memory" in fault for fault in violations(resources, "sm_86")] == [True]


def test_a_product_without_tensor_cores_is_caught() -> None:
    launch = only_launch(lambda: _product[(1,)](*matrices(32, torch.float32), 32, "ieee"))
    resources = compile_one(launch.specialization, "sm_80")
    assert violations(resources, "sm_80") == ["multiplies matrices without a tensor-core instruction"]


def test_the_resources_of_an_amd_chip() -> None:
    launch = only_launch(lambda: _product[(1,)](*matrices(64, torch.bfloat16), 64, "ieee"))
    resources = compile_one(launch.specialization, codegen_audit.AMD)
    assert violations(resources, codegen_audit.AMD) == []
    assert resources.has_dot
    assert all(name.startswith("mfma_f32_") for name in resources.instructions or {"": 0})
    assert 0 < resources.registers <= 512
    assert 0 < resources.occupancy(codegen_audit.AMD) <= 1
    arguments = (*matrices(128, torch.float32, count=8), 8, 128)
    looped = only_launch(lambda: _looped[(1,)](*arguments, num_warps=8, num_stages=2))
    faults = violations(compile_one(looped.specialization, codegen_audit.AMD), codegen_audit.AMD)
    assert any(re.search(r"takes \d+ bytes of shared memory, a block may have 65536", fault) for fault in faults)


def test_what_does_not_compile_is_an_offender() -> None:
    def run() -> None:
        _product[(1,)](*matrices(16, torch.bfloat16), 16, "no such precision")

    result = audit(targets=("sm_80",), only=[Stage("broken", 0, run)], workers=0)
    assert len(result.offenders) == 1
    assert "_product on sm_80 does not compile" in result.offenders[0]
    assert "in broken" in result.offenders[0]


def test_a_stage_that_fails_is_an_offender_and_the_others_go_on() -> None:
    def run() -> None:
        swiglu(torch.empty(8, device=META), torch.empty(8, device=META))
        torch.empty(1, device=META).item()

    result = audit(targets=("sm_80",), only=[Stage("halts", 0, run), DECODE], workers=0)
    assert ["halts cannot be traced" in offender for offender in result.offenders] == [True]
    assert {stage for row in result.rows for stage in row.stages} == {"halts", "decode"}


def test_results_are_remembered_until_something_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[str] = []
    resources = codegen_audit.Resources(registers=40, instructions={"HMMA": 1})

    def compile_one(specialization: Any, target: str) -> codegen_audit.Resources:
        compiled.append(target)
        return resources

    monkeypatch.setattr(codegen_audit, "compile_one", compile_one)

    def jobs(warps: int) -> list[tuple[Any, str]]:
        launch = only_launch(lambda: _product[(1,)](*matrices(16, torch.bfloat16), 16, "ieee", num_warps=warps))
        return [(launch.specialization, target) for target in ("sm_80", "sm_90")]

    first = compile_all(jobs(4), workers=0, cache=tmp_path)
    assert compile_all(jobs(4), workers=0, cache=tmp_path) == first
    assert all(found == resources for found in first.values())
    assert compiled == ["sm_80", "sm_90"]
    compile_all(jobs(8), workers=0, cache=tmp_path)
    assert len(compiled) == 4
    for file in tmp_path.iterdir():
        file.write_text("{")
    compile_all(jobs(8), workers=0, cache=tmp_path)
    assert len(compiled) == 6, "a damaged file is made anew"


def test_other_processes_compile_the_same() -> None:
    with recorded_launches() as recording:
        swiglu(*(torch.empty(4, 4096, dtype=torch.bfloat16, device=META) for _ in range(2)))
    specialization = recording.launches[0].specialization
    steps: list[tuple[int, int]] = []
    found = compile_all(
        [(specialization, "sm_80")], workers=1, progress=lambda done, total: steps.append((done, total))
    )
    assert found == {(specialization.digest, "sm_80"): compile_one(specialization, "sm_80")}
    assert steps == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("sm", "registers", "shared", "warps", "blocks"),
    [
        (80, 128, 0, 8, 2),  # 16 warps of 4096 registers
        (80, 255, 0, 4, 2),  # two warps of 8192 registers in each quarter
        (86, 32, 0, 1, 16),  # blocks
        (89, 32, 0, 1, 24),
        (86, 40, 0, 4, 12),  # warps: 48
        (80, 40, 0, 4, 12),  # registers: 12 warps of 1280 in each quarter
        (86, 32, 48 * KIB, 4, 2),  # shared memory and 1 KiB a block
        (90, 168, 227 * KIB, 4, 1),
        (86, 32, 100 * KIB, 4, 0),
        (100, 0, 0, 4, 16),
        ("gfx942", 128, 0, 4, 4),  # a register file of 512 for each thread of 4 warps
        ("gfx942", 60, 0, 4, 8),  # warps: 32
        ("gfx942", 60, 24 * KIB, 4, 2),
    ],
)
def test_resident_blocks(sm: int | str, registers: int, shared: int, warps: int, blocks: int) -> None:
    chip = CHIPS[f"sm{sm}" if isinstance(sm, int) else sm]
    assert resident_blocks(chip, registers=registers, shared=shared, warps=warps) == blocks


def test_every_projected_gpu_has_a_chip_and_peaks() -> None:
    for gpu in GPUS:
        assert f"sm{gpu.sm}" in CHIPS
        assert gpu.device.source
        assert set(gpu.peaks) >= {"bfloat16", "float16", "int8", "float32"}


def test_the_least_time_is_set_by_memory_or_by_compute() -> None:
    h100 = next(gpu for gpu in GPUS if gpu.name.startswith("H100"))
    assert h100.least_seconds(0, 3.35e12, "bfloat16") == (pytest.approx(1.0), "memory")
    assert h100.least_seconds(2 * 989.4e12, 1.0, "bfloat16") == (pytest.approx(2.0), "compute")
    assert h100.least_seconds(1978.9e12 / 2, 3.35e12, "int8") == (pytest.approx(1.0), "memory")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(CodegenError, match="sm_75"):
        audit(targets=("sm_75",), only=[DECODE])
    with pytest.raises(CodegenError, match="knitting"):
        audit(operations=("knitting",), only=[DECODE], targets=("sm_80",))


def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFNEXT_BACKEND", "torch")
    with pytest.raises(CodegenError, match="AFNEXT_BACKEND"):
        audit(only=[DECODE])


def test_the_page_and_the_data_say_the_same(tmp_path: Path) -> None:
    result = audit(targets=("sm_80", codegen_audit.AMD), operations=("swiglu",), only=[DECODE], workers=0)
    page, data = write_audit(result, tmp_path)
    assert json.loads(data.read_text()) == json.loads(json.dumps(to_dict(result)))
    (row,) = json.loads(data.read_text())["rows"]
    assert set(row["projected_seconds"]) == {"A100 SXM"}, "only chips that were compiled for"
    assert row["targets"][codegen_audit.AMD]["compiles"]
    text = page.read_text()
    assert "The audit passes" in text
    assert f"{row['targets']['sm_80']['registers']} r" in text
    assert "projected" in text.lower()
    assert "measured" not in text.replace("not measured", "")


def test_launches_of_the_same_code_share_a_line_of_resources(tmp_path: Path) -> None:
    four = Stage("four", CONTEXT, lambda: decode(batch=4))
    result = audit(targets=("sm_80",), operations=("swiglu",), only=[DECODE, four], workers=0)
    text = write_audit(result, tmp_path)[0].read_text()
    assert [row.stages for row in result.rows] == [{"decode": 1}, {"four": 1}]
    assert text.count("| swiglu._swiglu_kernel |") == 2 + 1 + 2, "launches, resources, projected times"
    assert "| 1, 2 | swiglu._swiglu_kernel |" in text


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs `afnext bench codegen ...` on a decode step alone."""
    monkeypatch.setattr(codegen, "full_size_model", lambda: None)
    monkeypatch.setattr(codegen, "stages", lambda model: [DECODE])
    return CommandLine(monkeypatch, capsys, ("bench", "codegen"))


def test_command(run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--target", "sm_80", "--operation", "swiglu", "--workers", 0)
    done = run(*options, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["offenders"] == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"codegen.md", "codegen.json"}
    done = run(*options)
    assert "swiglu" in done.stdout
    assert "A100" in done.stdout
    monkeypatch.setattr(codegen, "violations", lambda resources, target: ["is ugly"])
    done = run(*options, "--json")
    assert done.returncode == 1
    assert "on sm_80 is ugly" in " ".join(done.stderr.split())
    assert len(json.loads(done.stdout)["offenders"]) == 1


def test_command_explains_itself(run: CommandLine) -> None:
    done = run("--help")
    assert "Example: afnext bench codegen" in " ".join(done.stdout.split())
    done = run("--target", "sm_75")
    assert done.returncode == 1
    assert "sm_75" in done.stderr
    assert "Traceback" not in done.stderr
