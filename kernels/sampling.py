"""From logits to the next token: repetition penalty, then greedy choice or filtered sampling.

    penalized:  logit / p if logit > 0 else logit * p        for every token already in the sequence
    scaled:     logit / temperature
    top_k:      the k most likely tokens stay                (0: all)
    top_p:      the most likely tokens stay until their probabilities, renormalized, reach p; at least one
    min_p:      tokens with at least min_p times the highest probability stay
    drawn:      the first token, from the most likely on, whose cumulative probability exceeds u * total

in this order. u is uniform in [0, 1) and comes from the caller, one per row, so a row's draw depends neither on the
rest of its batch nor on the device's random generator. Rows are independent and have their own parameters.

The Triton kernels do not sort. In the order (logit descending, token ascending), the tokens that each filter keeps are
a prefix, and so are the tokens up to the draw. Each prefix ends where a count, or a mass of exp(-s) with s = (max logit
- logit) / temperature, is reached. A histogram over s, made by many programs per row, gives the bin of that end; one
program per row gathers the tokens of this bin only, few unless the row is flat, and bisects for the logit. Tokens with
s >= 32 are left out: their total mass is less than 1 minus the largest u, so they are never drawn. The logits are read
twice, the chunks of 2048 tokens that matter up to four times more; 4 x vocab bytes per row and pass. The native kernel
uses the same bins and sorts them one by one, as far as the filters and the draw need; torch sorts the whole row or, if
every row has top_k, the tokens that top_k keeps.

Source: Keskar et al. 2019 (repetition penalty), Holtzman et al. 2019 (top-p), Nguyen et al. 2024 (min-p).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import native
from .arguments import FLOAT32, FLOATING, INT64, check_tensors
from .configs import Config, Configs
from .dispatch import Operation, on_cpu
from .row_groups import is_row_invariant
from .triton_language import tl, triton


@dataclass(frozen=True)
class SamplingRows:
    """Parameters of each row, [batch] each: float32, top_k int64."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def of(self, rows: slice) -> "SamplingRows":
        """The parameters of the given rows."""
        return SamplingRows(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])


def penalize_reference(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """The specification of `penalize`."""
    out = logits.clone()
    for row in range(logits.shape[0]):
        for token in torch.nonzero(seen[row]).flatten().tolist():
            value, p = logits[row, token], penalty[row]
            out[row, token] = value / p if value > 0 else value * p
    return out


def sample_reference(logits: Tensor, rows: SamplingRows, uniform: Tensor) -> Tensor:
    """The specification of `sample`: float64, one row and one token at a time."""
    drawn = []
    for row in range(logits.shape[0]):
        scaled = logits[row].double() / rows.temperature[row].double()
        order = torch.argsort(scaled, descending=True, stable=True).tolist()
        order = order[: int(rows.top_k[row]) or None]
        probabilities = scaled[order].softmax(0).tolist()
        kept: list[tuple[int, float]] = []
        mass = 0.0
        for token, probability in zip(order, probabilities, strict=True):
            enough = mass >= float(rows.top_p[row]) or probability < float(rows.min_p[row]) * probabilities[0]
            if kept and enough:
                break
            kept.append((token, probability))
            mass += probability
        target, cumulative = float(uniform[row]) * mass, 0.0
        for token, probability in kept:  # noqa: B007 - the drawn token is the one at the break
            cumulative += probability
            if cumulative > target:
                break
        drawn.append(token)
    return torch.tensor(drawn, device=logits.device)


def greedy_reference(logits: Tensor) -> Tensor:
    """The specification of `greedy`."""
    rows = logits.double().tolist()
    return torch.tensor([row.index(max(row)) for row in rows], device=logits.device)


_penalize = Operation("penalize", penalize_reference)
_sample = Operation("sample", sample_reference)
_greedy = Operation("greedy", greedy_reference)

BINS, RANGE = 64, 32.0  # of the histogram over s; RANGE must keep vocab * exp(-RANGE) below 2**-24
_HISTOGRAM = Configs("sampling_histogram", Config({"PIECE": 128}, num_warps=8))
_DRAW = Configs("sampling_draw", Config(num_warps=8), {"sm120": Config(num_warps=16)})


@triton.jit
def _penalize_kernel(logits, seen, penalty, out, vocab, logits_stride, seen_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    x = tl.load(logits + row * logits_stride + token, mask=inside, other=0.0)
    hit = tl.load(seen + row * seen_stride + token, mask=inside, other=0) != 0
    p = tl.load(penalty + row)
    tl.store(out + row * vocab + token, tl.where(hit, tl.where(x > 0, tl.div_rn(x, p), x * p), x), mask=inside)


@triton.jit
def _chunk_best_kernel(logits, best, token_of_best, vocab, stride, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit of a chunk and the first token that has it."""
    row = tl.program_id(1).to(tl.int64)
    at = row * tl.num_programs(0) + tl.program_id(0)
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
    value, index = tl.max(x, 0, return_indices=True)
    tl.store(best + at, value)
    tl.store(token_of_best + at, tl.program_id(0) * CHUNK + index)


@triton.jit
def _best_kernel(best, token_of_best, out, chunks, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, CHUNKS)
    value = tl.load(best + row * chunks + i, mask=i < chunks, other=-float("inf"))
    _, index = tl.max(value, 0, return_indices=True)
    tl.store(out + row, tl.load(token_of_best + row * chunks + index).to(tl.int64))


@triton.jit
def _sharpness(temperature):  # type: ignore[no-untyped-def]
    """1 / temperature, limited so that very low temperatures, which draw only the largest logit, do not overflow."""
    return 1.0 / tl.maximum(tl.load(temperature), 1e-30)


@triton.jit
def _bin(x, top, sharpness, BINS: tl.constexpr, RANGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """s and its bin; BINS where s is out of range. Bins never decrease as x falls, so they follow the order."""
    s = (top - x) * sharpness
    return s, tl.where(s < RANGE, (tl.where(s < RANGE, s, 0.0) * (BINS / RANGE)).to(tl.int32), BINS)


@triton.jit
def _histogram_kernel(  # type: ignore[no-untyped-def]
    logits, best, temperature, min_p, counts, masses, likely, vocab, stride,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BINS: tl.constexpr, RANGE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """For one chunk: number and mass of the tokens in each bin, and number of tokens that min_p keeps."""
    row = tl.program_id(1).to(tl.int64)
    chunks = tl.num_programs(0)
    i = tl.arange(0, CHUNKS)
    top = tl.max(tl.load(best + row * chunks + i, mask=i < chunks, other=-float("inf")), 0)
    sharpness = _sharpness(temperature + row)
    farthest = -tl.log(tl.load(min_p + row))
    bins = tl.arange(0, BINS)
    count = tl.zeros((BINS,), tl.int32)
    mass = tl.zeros((BINS,), tl.float32)
    kept = tl.zeros((PIECE,), tl.int32)
    for start in range(0, CHUNK, PIECE):
        token = tl.program_id(0) * CHUNK + start + tl.arange(0, PIECE)
        x = tl.load(logits + row * stride + token, mask=token < vocab, other=-float("inf"))
        s, index = _bin(x, top, sharpness, BINS, RANGE)
        hit = index[None, :] == bins[:, None]
        count += tl.sum(hit.to(tl.int32), 1)
        mass += tl.sum(tl.where(hit, tl.exp(-s)[None, :], 0.0), 1)
        kept += ((index < BINS) & (s <= farthest)).to(tl.int32)
    at = row * chunks + tl.program_id(0)
    tl.store(counts + at * BINS + bins, count)
    tl.store(masses + at * BINS + bins, mass)
    tl.store(likely + at, tl.sum(kept, 0))


@triton.jit
def _gathered(logits, scratch, start, n, top, sharpness, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """For the tokens gathered from `start` on: whether there is one, its logit, its exp(-s), and the token."""
    i = start + tl.arange(0, BLOCK)
    token = tl.load(scratch + i, mask=i < n, other=0)
    x = tl.load(logits + token, mask=i < n, other=-float("inf"))
    return i < n, x, tl.exp((x - top) * sharpness), token


@triton.jit
def _prefix(  # type: ignore[no-untyped-def]
    target, by_count, strict, last_bin,
    logits, top, sharpness, count, mass, counts, scratch, vocab, chunks,
    CHUNK: tl.constexpr, BINS: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """The shortest prefix whose mass, or size if `by_count`, reaches (`strict`: exceeds) `target`.

    Returns the end of the prefix (bin, logit, number of its tokens with that logit), its mass, and the size of the bin,
    whose tokens are left in `scratch`. Sizes are float32, exact below 2**24.
    """
    bins = tl.arange(0, BINS)
    weight = tl.where(by_count, count.to(tl.float32), mass)
    weight_before = tl.sum(tl.where(bins[:, None] > bins[None, :], weight[None, :], 0.0), 1)
    through = weight_before + weight
    short = (through < target) | (strict & (through == target))
    end = tl.minimum(tl.sum(short.to(tl.int32), 0), last_bin)
    base = tl.sum(tl.where(bins == end, weight_before, 0.0), 0)
    mass_above = tl.sum(tl.where(bins < end, mass, 0.0), 0)
    n = tl.sum(tl.where(bins == end, count, 0), 0)

    tl.debug_barrier()  # all threads have read the list of the last prefix
    filled = 0
    for chunk in range(chunks):
        found = tl.load(counts + chunk * BINS + end)
        if found > 0:
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(logits + token, mask=token < vocab, other=-float("inf"))
            _, index = _bin(x, top, sharpness, BINS, RANGE)
            hit = index == end
            tl.store(scratch + filled + tl.cumsum(hit.to(tl.int32), 0) - 1, token, mask=hit)
            filled += found
    tl.debug_barrier()  # all threads have written this list

    low = top  # of the logits in the bin
    high = -float("inf")
    for start in range(0, n, CHUNK):
        inside, x, _, _ = _gathered(logits, scratch, start, n, top, sharpness, CHUNK)
        low = tl.minimum(low, tl.min(tl.where(inside, x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(inside, x, -float("inf")), 0))
    while low < high:  # the largest logit for which the prefix is long enough
        middle = low + (high - low) / 2
        middle = tl.where(middle > low, middle, high)
        reached = base
        next_low = high
        next_high = low
        for start in range(0, n, CHUNK):
            inside, x, e, _ = _gathered(logits, scratch, start, n, top, sharpness, CHUNK)
            in_prefix = inside & (x >= middle)
            reached += tl.sum(tl.where(in_prefix, tl.where(by_count, 1.0, e), 0.0), 0)
            next_low = tl.minimum(next_low, tl.min(tl.where(in_prefix, x, float("inf")), 0))
            next_high = tl.maximum(next_high, tl.max(tl.where(inside & (x < middle), x, -float("inf")), 0))
        enough = (reached > target) | ((reached == target) & (strict == 0))
        low = tl.where(enough, next_low, low)
        high = tl.where(enough, high, next_high)

    ties = 0
    share = 0.0
    for start in range(0, n, CHUNK):
        inside, x, e, _ = _gathered(logits, scratch, start, n, top, sharpness, CHUNK)
        above = inside & (x > low)
        base += tl.sum(tl.where(above, tl.where(by_count, 1.0, e), 0.0), 0)
        mass_above += tl.sum(tl.where(above, e, 0.0), 0)
        ties += tl.sum((inside & (x == low)).to(tl.int32), 0)
        share = tl.maximum(share, tl.max(tl.where(inside & (x == low), e, 0.0), 0))
    needed = tl.minimum((target - base) / tl.where(by_count, 1.0, share), vocab)
    kept = tl.where(strict, tl.floor(needed) + 1, tl.ceil(needed)).to(tl.int32)
    kept = tl.maximum(tl.minimum(kept, ties), 1)
    return end, low, kept, mass_above + kept * share, n


@triton.jit
def _draw_kernel(  # type: ignore[no-untyped-def]
    logits, best, temperature, top_k, top_p, uniform, counts, masses, likely, scratch, out, vocab, chunks, stride,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BINS: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    counts += row * chunks * BINS
    scratch += row * vocab
    chunk = tl.arange(0, CHUNKS)
    bins = tl.arange(0, BINS)
    there = chunk < chunks
    top = tl.max(tl.load(best + row * chunks + chunk, mask=there, other=-float("inf")), 0)
    sharpness = _sharpness(temperature + row)
    at = chunk[:, None] * BINS + bins[None, :]
    count = tl.sum(tl.load(counts + at, mask=there[:, None], other=0), 0)
    mass = tl.sum(tl.load(masses + row * chunks * BINS + at, mask=there[:, None], other=0.0), 0)
    total = tl.sum(count, 0).to(tl.float32)
    k = tl.load(top_k + row).to(tl.float32)
    p = tl.load(top_p + row)
    m = tl.maximum(tl.sum(tl.load(likely + row * chunks + chunk, mask=there, other=0), 0), 1).to(tl.float32)

    # The end of the shortest prefix so far, and its mass. Everything is kept at first.
    end = tl.max(tl.where(count > 0, bins, 0), 0)
    lowest = top - float("inf")
    kept = 0
    kept_mass = tl.sum(mass, 0)
    n = 0
    for stage in range(4):  # top_k, top_p, min_p, the draw
        by_count = (stage == 0) | (stage == 2)
        draws = stage == 3
        share = tl.where(draws, tl.load(uniform + row), p)
        target = tl.where(by_count, tl.where(stage == 0, k, m), share * kept_mass)
        active = tl.where(by_count, (target > 0) & (target < total), draws | (p < 1))
        if active:
            new_end, logit, ties, new_mass, n = _prefix(
                target, by_count, draws, end, logits, top, sharpness, count, mass, counts, scratch, vocab, chunks,
                CHUNK, BINS, RANGE,
            )  # fmt: skip
            # Sums round: the draw could fall just beyond the last token that was kept.
            shorter = (logit > lowest) | ((logit == lowest) & (ties < kept))
            end = tl.where(shorter, new_end, end)
            lowest = tl.where(shorter, logit, lowest)
            kept = tl.where(shorter, ties, kept)
            kept_mass = tl.where(shorter, new_mass, kept_mass)

    before = 0
    result = 0
    for start in range(0, n, CHUNK):
        inside, x, _, token = _gathered(logits, scratch, start, n, top, sharpness, CHUNK)
        tie = inside & (x == lowest)
        rank = before + tl.cumsum(tie.to(tl.int32), 0)
        result += tl.sum(tl.where(tie & (rank == kept), token, 0), 0)
        before += tl.sum(tie.to(tl.int32), 0)
    tl.store(out + row, result.to(tl.int64))  # type: ignore[attr-defined]


@_penalize.implementation("triton")
def _penalize_triton(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    batch, vocab = logits.shape
    logits, seen = _rows_of(logits), _rows_of(seen).view(torch.uint8)
    out = torch.empty((batch, vocab), device=logits.device)
    _penalize_kernel[(triton.cdiv(vocab, 1024), batch)](
        logits, seen, penalty.contiguous(), out, vocab, logits.stride(0), seen.stride(0), BLOCK=1024
    )
    return out


@_greedy.implementation("triton")
def _greedy_triton(logits: Tensor) -> Tensor:
    logits = _rows_of(logits)
    best, token = _chunk_best(logits)
    out = logits.new_empty(len(logits), dtype=torch.int64)
    chunks = best.shape[1]
    _best_kernel[(len(logits),)](best, token, out, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=1)
    return out


@_sample.implementation("triton")
def _sample_triton(logits: Tensor, rows: SamplingRows, uniform: Tensor) -> Tensor:
    batch, vocab = logits.shape
    device = logits.device
    logits = _rows_of(logits)
    best, _ = _chunk_best(logits)
    chunks = best.shape[1]
    counts = torch.empty((batch, chunks, BINS), dtype=torch.int32, device=device)
    masses = torch.empty((batch, chunks, BINS), device=device)
    likely = torch.empty((batch, chunks), dtype=torch.int32, device=device)
    scratch = torch.empty((batch, vocab), dtype=torch.int32, device=device)
    out = torch.empty(batch, dtype=torch.int64, device=device)
    temperature, top_k, top_p, min_p, uniform = (
        x.contiguous() for x in (rows.temperature, rows.top_k, rows.top_p, rows.min_p, uniform)
    )
    sizes = {"CHUNK": _chunk(vocab), "CHUNKS": triton.next_power_of_2(chunks), "BINS": BINS, "RANGE": RANGE}
    _histogram_kernel[(chunks, batch)](
        logits, best, temperature, min_p, counts, masses, likely, vocab, logits.stride(0),
        **sizes, **_HISTOGRAM.on(device).options(),
    )  # fmt: skip
    _draw_kernel[(batch,)](
        logits, best, temperature, top_k, top_p, uniform, counts, masses, likely, scratch, out,
        vocab, chunks, logits.stride(0), **sizes, **_DRAW.on(device).options(),
    )  # fmt: skip
    return out


def _rows_of(x: Tensor) -> Tensor:
    """`x` with unit stride along rows; the stride between rows may be any."""
    return x if x.stride(1) == 1 else x.contiguous()


def _chunk(vocab: int) -> int:
    """How many tokens one program takes at once."""
    return min(2048, max(128, triton.next_power_of_2(vocab)))


def _chunk_best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each chunk of each row and its token, [batch, chunks]."""
    batch, vocab = logits.shape
    chunks = triton.cdiv(vocab, _chunk(vocab))
    best = torch.empty((batch, chunks), device=logits.device)
    token = torch.empty((batch, chunks), dtype=torch.int32, device=logits.device)
    _chunk_best_kernel[(chunks, batch)](logits, best, token, vocab, logits.stride(0), CHUNK=_chunk(vocab))
    return best, token


@_sample.implementation("native")
def _sample_native(logits: Tensor, rows: SamplingRows, uniform: Tensor) -> Tensor:
    logits = _rows_of(logits)
    out = torch.empty(len(logits), dtype=torch.int64)
    parameters = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, uniform)
    native.call("sample", logits, *(x.contiguous() for x in parameters), out, *logits.shape, logits.stride(0))
    return out


@_penalize.implementation("torch")
def _penalize_torch(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    if not on_cpu(logits):  # finding the tokens seen would wait for the device
        return torch.where(seen, _penalized(logits, penalty[:, None]), logits)
    out, (rows, tokens) = logits.clone(), seen.nonzero(as_tuple=True)
    out[rows, tokens] = _penalized(logits[rows, tokens], penalty[rows])
    return out


def _penalized(logits: Tensor, penalty: Tensor) -> Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


@_greedy.implementation("torch")
def _greedy_torch(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


@_sample.implementation("torch")
def _sample_torch(logits: Tensor, rows: SamplingRows, uniform: Tensor) -> Tensor:
    if is_row_invariant() and len(logits) > 1:  # the number of logits sorted and summed depends on every row's top_k
        single = [slice(row, row + 1) for row in range(len(logits))]
        return torch.cat([_sample_torch(logits[row], rows.of(row), uniform[row]) for row in single])
    values, order = _descending(logits, rows.top_k)
    scaled = values / rows.temperature[:, None]
    rank = torch.arange(scaled.shape[-1], device=logits.device)
    top_k = torch.where(rows.top_k > 0, rows.top_k, logits.shape[-1])
    probabilities = scaled.masked_fill(rank >= top_k[:, None], -torch.inf).softmax(-1)
    mass = probabilities.cumsum(-1)
    # Relative to the actual total: a float32 softmax over a whole vocabulary adds up to 1 only within about 1e-5, so
    # top_p = 1 would cut off the tail.
    keep = mass - probabilities < rows.top_p[:, None] * mass[:, -1:]
    keep &= probabilities >= rows.min_p[:, None] * probabilities[:, :1]
    keep[:, 0] = True
    cumulative = (probabilities * keep).cumsum(-1)
    # A parallel sum rounds differently at each rank, so without `keep` a token just past the last kept one could be
    # drawn.
    choice = (keep & (cumulative > uniform[:, None] * cumulative[:, -1:])).int().argmax(-1, keepdim=True)
    return order.gather(1, choice).squeeze(1)


def _descending(logits: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """The logits in descending order and their tokens: at least the first `top_k` of each row.

    Only these are sorted where reading `top_k` does not wait for the device; padding is -inf.
    """
    if logits.device.type != "cpu" or not 0 < int(top_k.min()) <= int(top_k.max()) <= logits.shape[1] // 8:
        values, order = logits.sort(dim=-1, descending=True, stable=True)
        return values, order
    least = logits.topk(int(top_k.max()), dim=-1).values[:, -1:]
    row, token = (logits >= least).nonzero(as_tuple=True)  # by token within a row, which orders equal logits
    counts = row.bincount(minlength=len(logits))
    column = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    values = logits.new_full((len(logits), int(counts.max())), -torch.inf)
    tokens = torch.zeros_like(values, dtype=torch.int64)
    values[row, column], tokens[row, column] = logits[row, token], token
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(1, order)


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Apply each row's repetition penalty to the tokens it has seen.

    logits: [batch, vocab] float32; seen: [batch, vocab] bool; penalty: [batch] float32, 1 for none.
    Returns a tensor like logits. Raises ValueError when shapes do not fit.
    """
    _check(logits, penalty)
    if seen.shape != logits.shape:
        raise ValueError(f"seen must have the shape of the logits, {tuple(logits.shape)}, got {tuple(seen.shape)}")
    check_tensors(logits, (torch.bool,), seen=seen)
    check_tensors(logits, FLOAT32, penalty=penalty)
    return _penalize.on(logits.device)(logits, seen, penalty)


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row, the first of equal ones. logits: [batch, vocab]. Returns [batch] int64."""
    if logits.ndim != 2:
        raise ValueError(f"expected logits [batch, vocab], got {tuple(logits.shape)}")
    check_tensors(logits, FLOATING, logits=logits)
    return _greedy.on(logits.device)(logits)


def sample(logits: Tensor, rows: SamplingRows, uniform: Tensor) -> Tensor:
    """Draw one token per row.

    logits: [batch, vocab] float32, penalized; rows: the parameters, temperature > 0; uniform: [batch] float32 in
    [0, 1). Returns [batch] int64. Raises ValueError when shapes do not fit.
    """
    _check(logits, uniform, rows.temperature, rows.top_k, rows.top_p, rows.min_p)
    check_tensors(logits, FLOAT32, temperature=rows.temperature, top_p=rows.top_p, min_p=rows.min_p, uniform=uniform)
    check_tensors(logits, INT64, top_k=rows.top_k)
    return _sample.on(logits.device)(logits, rows, uniform)


def _check(logits: Tensor, *per_row: Tensor) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32 or any(x.shape != logits.shape[:1] for x in per_row):
        raise ValueError(
            f"expected float32 logits [batch, vocab] and one value a row, got {logits.dtype} {tuple(logits.shape)} "
            f"and {', '.join(str(tuple(x.shape)) for x in per_row)}"
        )
