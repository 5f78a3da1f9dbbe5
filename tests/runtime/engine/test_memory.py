"""The memory plan against what is really allocated, and its promises: monotonic, within the budget, sound advice."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import model_configs, random_model
from support.memory import allocated_at_most

import afnext
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.kernels import rote
from afnext.quant.recipe import recipe
from afnext.quant.scheme import SchemeError
from afnext.runtime.engine.kv_cache import KVCache, page_table
from afnext.runtime.engine.memory import CHANGES, MemoryPlan, parse_bytes
from afnext.runtime.errors import MemoryPlanError
from afnext.runtime.model.config import ModelConfig
from afnext.runtime.model.published import AUDIO_FLAMINGO_NEXT

FULL = ModelConfig.from_dict(AUDIO_FLAMINGO_NEXT)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
CPU = torch.device("cpu")


@st.composite
def plans(draw: st.DrawFn, configs: st.SearchStrategy[ModelConfig] | None = None) -> MemoryPlan:
    """Plans for random models on random devices."""
    return MemoryPlan(
        draw(configs if configs is not None else model_configs()),
        draw(st.integers(10**6, 10**10)),
        gpu=draw(st.booleans()),
        dtype=draw(DTYPES),
        audio_seconds=draw(st.floats(0, 600)),
        kv=draw(st.sampled_from(["auto", "int8", "fp8", "int4"])),
        page_size=draw(st.sampled_from([16, 256])),
        chunk_size=draw(st.sampled_from([1, 256, 1024])),
        encode_batch=draw(st.integers(1, 5)),
        release_encoder=draw(st.booleans()),
        encode_ahead=draw(st.booleans()),
        new_tokens=draw(st.integers(1, 4096)),
        reserve=draw(st.sampled_from([0, 500_000_000])),
    )


def part(plan: MemoryPlan, name: str) -> int:
    return next(part.nbytes for part in plan.parts if part.name == name)


@settings(max_examples=25)
@given(plans())
def test_weights_and_pages_are_what_is_allocated(plan: MemoryPlan) -> None:
    plan = replace(plan, release_encoder=False, audio_seconds=min(plan.audio_seconds, 60))
    model = random_model(plan.config, plan.dtype)
    assert plan.weights == sum(buffer.nbytes for buffer in model.buffers())
    layers = sum(buffer.nbytes for buffer in model.encoder.layers.buffers())
    assert part(plan, "encoder layers") == layers
    assert part(plan, "decoder layers") == sum(
        buffer.nbytes for child in (model.decoder.layers, model.decoder.norm) for buffer in child.buffers()
    )
    cache = KVCache(plan.config.decoder, pages=plan.pages, page_size=plan.page_size, device=CPU, dtype=plan.kv_dtype)
    assert part(plan, "KV pages") == cache.nbytes
    turns = sum(turn.nbytes for turn in cache.key_turns or ())
    assert turns == (part(plan, "key angles") if plan.kv == "int4" else 0)
    assert plan.pages * plan.page_size >= plan.tokens > (plan.pages - 1) * plan.page_size
    embedding = model.encoder.time_embedding
    if embedding is not None and plan.audio_seconds > 0:
        windows = math.ceil(round(plan.audio_seconds * 16_000) / 480_000)
        if windows:
            assert part(plan, "RoTE table") == embedding.table(windows, CPU).nbytes


@pytest.mark.parametrize(
    "scheme", [*("dense", "int8", "int8-w8a8", "fp8", "nvfp4"), *("int4-g32", "int4-g32-zeros", "int4-g32-w4a8")]
)
def test_packed_weights_are_what_loading_allocates(scheme: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    model = afnext.load(folder, dtype="float32", quant=None if scheme == "dense" else scheme)
    plan = MemoryPlan(
        ModelConfig.from_folder(folder), 10**9, gpu=True, dtype=torch.float32, audio_seconds=0, scheme=scheme
    )
    buffers = dict(model.network.named_buffers())
    assert plan.weights == sum(buffer.nbytes for buffer in buffers.values())
    assert part(plan, "embeddings") == sum(buffers[name].nbytes for name in buffers if "embed_tokens" in name)
    packed = [buffer.nbytes for name, buffer in buffers.items() if name.endswith("weight_codes")]
    assert bool(packed) == (scheme != "dense")


@settings(max_examples=6)
@given(plans(), st.data())
def test_the_workspace_is_an_upper_bound_and_no_wild_one(plan: MemoryPlan, data: st.DataObject) -> None:
    plan = replace(plan, gpu=False, audio_seconds=data.draw(st.sampled_from([30, 61, 240])))
    model = random_model(plan.config, plan.dtype)
    rote._table.cache_clear()
    batch = plan.encode_batch
    windows = [torch.randn(480_000) for _ in range(batch)]
    encoding = allocated_at_most(
        lambda: model.encode(model.log_mel(windows), [480_000] * batch, [min(i, 7) for i in range(batch)])
    )
    cache = KVCache(plan.config.decoder, pages=plan.pages, page_size=plan.page_size, device=CPU, dtype=plan.kv_dtype)
    for pool in cache.pools:
        pool.zero_()
    chunk = min(plan.chunk_size, plan.tokens)
    pages = data.draw(st.permutations(range(plan.pages)))
    table = page_table([list(pages)], CPU)
    positions = torch.arange(plan.tokens - chunk, plan.tokens)[None]
    tokens = torch.zeros(chunk, dtype=torch.int64)

    def prefill() -> torch.Tensor:
        hidden = model.decoder(model.decoder.embed(tokens)[None], positions, cache.view(table, positions))
        return model.decoder.logits(hidden[:, -1])

    prefilling = allocated_at_most(prefill)
    planned = dict(zip(("encoding", "prefilling", "choosing", "growing"), plan.stages.values(), strict=True))
    assert encoding <= planned["encoding"] <= 3 * encoding
    assert prefilling <= planned["prefilling"]
    growing = allocated_at_most(lambda: cache.resize(plan.pages)) - cache.nbytes
    assert growing <= planned["growing"]
    assert part(plan, "workspace") == max(planned.values())


@settings(max_examples=60)
@given(plans(), st.floats(0, 600), st.integers(0, 1000))
def test_more_work_never_takes_less_memory(plan: MemoryPlan, seconds: float, more: int) -> None:
    longer = replace(plan, audio_seconds=max(plan.audio_seconds, seconds))
    assert longer.total >= plan.total
    for name in ("new_tokens", "chunk_size", "encode_batch", "reserve"):
        assert replace(plan, **{name: getattr(plan, name) + more}).total >= plan.total
    assert replace(plan, kv="int8").total <= replace(plan, kv="auto").total
    assert replace(plan, kv="fp8").page_bytes == replace(plan, kv="int8").page_bytes
    assert replace(plan, kv="int4").page_bytes < replace(plan, kv="int8").page_bytes
    assert replace(plan, memory=plan.memory + more).spare == plan.spare + more


@settings(max_examples=60)
@given(plans())
def test_the_longest_audio_fits_and_a_second_more_does_not(plan: MemoryPlan) -> None:
    longest = plan.longest_audio()
    if longest is None:
        assert not replace(plan, audio_seconds=0).fits
        with pytest.raises(MemoryPlanError, match="are there"):
            plan.largest()
        return
    assert replace(plan, audio_seconds=longest).fits
    if longest < plan.config.max_audio_seconds:
        assert not replace(plan, audio_seconds=longest + 1).fits
    largest = plan.largest()
    rest = largest.total - largest.pages * largest.page_bytes
    assert rest + largest.kv_room // largest.page_size * largest.page_bytes <= plan.memory
    assert largest.kv_room >= largest.tokens


@settings(max_examples=60)
@given(plans(st.just(FULL)))
def test_advice_works_and_asks_for_nothing_needless(plan: MemoryPlan) -> None:
    remedy = plan.remedy()
    if plan.fits or not remedy:
        assert plan.fits or not plan.changed(CHANGES).fits
        return
    assert plan.changed(remedy).fits
    for change in remedy:
        assert not plan.changed([other for other in remedy if other != change]).fits
    assert all(change in plan.advice() for change in remedy)
    for change, nbytes in plan.savings().items():
        assert plan.changed([change]).total == plan.total - nbytes


def test_the_published_model_has_its_published_bytes() -> None:
    plan = MemoryPlan(FULL, 24 * 10**9, gpu=True, dtype=torch.bfloat16, audio_seconds=1800)
    assert plan.weights == 16_534_430_720
    assert plan.page_bytes == 256 * 57_344
    assert replace(plan, kv="int8").page_bytes == 256 * 29_568
    assert replace(plan, kv="int4").page_bytes == 256 * 15_232
    assert part(plan, "embeddings") == part(plan, "lm_head") == 151_672 * 3584 * 2


def test_the_published_shape_is_the_checkpoints(shared_data: Path) -> None:
    described = json.loads((shared_data / "tokenizer" / "afnextA" / "config.json").read_text())
    ours, theirs = FULL, ModelConfig.from_dict(described)
    assert (ours.encoder, ours.decoder, ours.rote) == (theirs.encoder, theirs.decoder, theirs.rote)


def test_thirty_minutes_on_eight_gigabytes() -> None:
    plan = MemoryPlan(FULL, 8 * 10**9, gpu=True, dtype=torch.bfloat16, audio_seconds=1800, scheme="int4", kv="int8")
    assert plan.fits
    assert not replace(plan, kv="auto").fits
    assert replace(plan, kv="auto").remedy() == ("kv=int8",)


def test_thirty_minutes_on_a_card_of_six_gibibytes() -> None:
    plan = MemoryPlan(FULL, 6 << 30, gpu=True, dtype=torch.bfloat16, audio_seconds=1800)
    fitted = plan.changed(plan.changes_to_fit())
    assert fitted.fits
    assert (fitted.scheme, fitted.kv, fitted.release_encoder) == ("int4", "int4", True)
    parts = sum(part(fitted, name) for name in ("encoder", "adaptor", "embeddings", "decoder layers", "lm_head"))
    assert parts + part(fitted, "KV pages") < 5.5e9
    smallest = replace(plan, memory=6 * 10**9)
    fitted = smallest.changed(smallest.changes_to_fit())
    assert (fitted.scheme, fitted.kv, fitted.release_encoder) == ("small", "int4", False)
    assert fitted.total <= 6.0e9
    roomy = replace(plan, memory=24 * 10**9)
    assert roomy.changed(roomy.changes_to_fit()) == roomy
    with pytest.raises(
        MemoryPlanError,
        match=r"1800 s of audio do not fit into 4\.80 GB .* kv=int4 and quant=small it holds \d+ s",
    ):
        replace(plan, memory=48 * 10**8).changes_to_fit()


def test_int3_is_suggested_and_not_chosen() -> None:
    plan = MemoryPlan(FULL, 4 << 30, gpu=True, dtype=torch.bfloat16, audio_seconds=300)
    assert not plan.remedy()
    changes = plan.last_resort()
    fitted = plan.changed(changes)
    assert changes[0] == "quant=int3"
    assert fitted.fits
    assert (fitted.scheme, fitted.kv) == ("int3", "int8")
    assert not any(plan.changed([other for other in changes if other != change]).fits for change in changes)
    with pytest.raises(MemoryPlanError, match=r"quant=int3 and .* kv=int8 \(.* to spare\)\. int3 .* --calibrate"):
        plan.changes_to_fit()
    assert replace(plan, memory=8 * 10**9).changes_to_fit() == replace(plan, memory=8 * 10**9).remedy()
    assert "with quant=int3." in replace(plan, memory=4 * 10**9).advice()
    # Weights that are packed already cannot be packed again.
    stored = replace(plan, config=replace(FULL, quantization=recipe("int8")))
    assert not stored.last_resort()
    assert "int3" not in stored.advice()


def test_encoding_ahead_takes_the_memory_of_both() -> None:
    plan = MemoryPlan(FULL, 80 * 10**9, gpu=True, dtype=torch.bfloat16, audio_seconds=1800, chunk_size=4096)
    ahead = replace(plan, encode_ahead=True)
    encoding, prefilling, *_ = plan.stages.values()
    assert encoding + prefilling <= part(ahead, "workspace") <= encoding + prefilling + 3 * 4096 * 3584 * 4
    assert part(ahead, "encoder's CUDA graphs") >= encoding
    assert replace(ahead, gpu=False).total == replace(plan, gpu=False).total
    assert replace(ahead, memory=plan.total).remedy() == ("encode_ahead=False",)


SMALLER = ("dense", "int8", "int4-g32", "int4", "int4-g128", "small")


def test_smaller_schemes_take_less_and_unknown_ones_are_refused() -> None:
    plan = MemoryPlan(FULL, 8 * 10**9, gpu=True, dtype=torch.bfloat16, audio_seconds=60)
    weights = [replace(plan, scheme=scheme).weights for scheme in SMALLER]
    assert weights == sorted(weights, reverse=True)
    assert len(set(weights)) == len(weights)
    with pytest.raises(SchemeError, match="int5"):
        replace(plan, scheme="int5")
    on_cpu = replace(plan, gpu=False, scheme="int4")
    assert 3.2e9 < part(on_cpu, "int4 codes again") < 3.3e9


def test_a_scheme_that_does_not_fit_is_not_advised() -> None:
    odd = replace(FULL, decoder=replace(FULL.decoder, intermediate_size=18_945))
    plan = MemoryPlan(odd, 8 * 10**9, gpu=True, dtype=torch.bfloat16, audio_seconds=1800)
    assert not [change for change in plan.savings() if "quant" in change]
    with pytest.raises(SchemeError, match=r"down_proj.*18945"):
        replace(plan, scheme="int4")


def test_lent_layers_leave_the_device() -> None:
    plan = MemoryPlan(FULL, 8 * 10**9, gpu=True, dtype=torch.bfloat16, audio_seconds=1800)
    lent = replace(plan, release_encoder=True)
    layers = part(plan, "encoder layers")
    assert part(lent, "encoder layers") == layers
    assert plan.weights - lent.weights == layers
    two_layers = 2 * layers // FULL.encoder.layers
    assert part(lent, "workspace") - part(plan, "workspace") <= two_layers
    assert replace(lent, gpu=False).weights == plan.weights


def test_mapped_weights_beyond_the_memory_warn_and_go_on(caplog: pytest.LogCaptureFixture) -> None:
    plan = MemoryPlan(FULL, 8 * 10**9, gpu=False, dtype=torch.bfloat16, audio_seconds=0, mapped=True)
    largest = plan.largest()
    assert "read from the file" in caplog.text
    assert largest.audio_seconds > 0
    with pytest.raises(MemoryPlanError, match=r"200\.5 MB are there"):
        replace(plan, memory=200_500_000).largest()


@pytest.mark.parametrize(
    ("text", "nbytes"), [("8GB", 8 * 10**9), ("7.5 GiB", 15 * 2**29), ("512mb", 512 * 10**6), ("1T", 10**12)]
)
def test_amounts_as_people_write_them(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "8", "GB", "8 gigs", "-8GB", "1e9GB", "9" * 99 + "GB", "8GB\n8GB"])
def test_other_amounts_are_refused(text: str) -> None:
    with pytest.raises(MemoryPlanError, match="8GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_seconds": 1801}, "1801 s"),
        ({"audio_seconds": -1}, "-1 s"),
        ({"audio_seconds": math.nan}, "nan s"),
        ({"kv": "int3"}, "auto, int8, fp8, int4, not 'int3'"),
        ({"new_tokens": 131_072}, "context ends at 131072"),
        ({"page_size": 0}, "page_size is 0"),
    ],
)
def test_impossible_plans_are_refused(change: dict[str, Any], message: str) -> None:
    plan = MemoryPlan(FULL, 8 * 10**9, gpu=True, dtype=torch.bfloat16, audio_seconds=1800)
    with pytest.raises(MemoryPlanError, match=message):
        replace(plan, **change)
