"""The operations as self-contained functions of tensors and numbers, for harnesses without this package.

`export.py` copies the source of one function with those that it calls; so nothing here may use a name of another module
than torch and math. Structured arguments are flat: a rotation is its positions and frequencies, the parameters of
sampling are one tensor each. Functions compute in float32 or float64 and round to the dtype of their input at the end;
caches that the operation writes are returned. Tests compare every one with the float64 reference.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def log_mel(waveforms: Tensor, mel_bins: int, window_samples: int) -> Tensor:
    """Whisper's log-mel features. waveforms: [batch, samples]. Returns [batch, mel_bins, frames]."""
    x = waveforms.double()
    spectrum = torch.stft(
        x, 400, 160, window=torch.hann_window(400, dtype=x.dtype, device=x.device), return_complex=True
    )
    power = spectrum[..., :-1].abs().square()
    mel = (slaney_filters(mel_bins).to(x.device).T @ power).clamp_min(1e-10).log10()
    return ((torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8) + 4) / 4).float()


def slaney_filters(mel_bins: int) -> Tensor:
    """[201, mel_bins] float64: triangles on Slaney's scale, linear below 1 kHz, logarithmic above, from 0 to 8 kHz."""
    step = torch.log(torch.tensor(6.4, dtype=torch.float64)) / 27
    top = 15 + torch.log(torch.tensor(8.0, dtype=torch.float64)) / step
    mel = torch.arange(mel_bins + 2, dtype=torch.float64) * (top / (mel_bins + 1))
    edges = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * step))
    low, center, high = edges[:-2], edges[1:-1], edges[2:]
    hertz = (torch.arange(201, dtype=torch.float64) * 40)[:, None]
    triangles = torch.minimum((hertz - low) / (center - low), (high - hertz) / (high - center)).clamp_min(0)
    return triangles * (2 / (high - low))


def conv_stem(mel: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor) -> Tensor:
    """Two convolutions with GELU, then positions. mel: [batch, bins, frames]. Returns [batch, positions, out]."""
    w1, b1, w2, b2 = (x.double() for x in (weight1, bias1, weight2, bias2))
    h = F.gelu(F.conv1d(mel.double(), w1, b1, padding=1))
    h = F.gelu(F.conv1d(h, w2, b2, stride=2, padding=1)).transpose(1, 2)
    return (h + positions[: h.shape[1]].double()).to(mel.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last dimension, eps 1e-5."""
    return F.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), 1e-5).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last dimension, eps 1e-6."""
    wide = x.double()
    return (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()).to(x.dtype)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm of residual + x, and that sum, rounded to the dtype of x before the norm."""
    hidden = residual + x
    return layer_norm(hidden, weight, bias), hidden


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """RMSNorm of residual + x, and that sum, rounded to the dtype of x before the norm."""
    hidden = residual + x
    return rms_norm(hidden, weight), hidden


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), exact."""
    return F.gelu(x.double()).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return (F.silu(gate.double()) * up.double()).to(gate.dtype)


def pool_norm_rotate(x: Tensor, weight: Tensor, bias: Tensor, angles: Tensor, windows: Tensor) -> Tensor:
    """Average pool by two, LayerNorm, then rotation of neighbouring channels by angles[windows]."""
    length = x.shape[1] // 2
    pooled = x[:, : 2 * length].double().unflatten(1, (length, 2)).mean(2)
    out = F.layer_norm(pooled, weight.shape, weight.double(), bias.double(), 1e-5)
    turns = angles[windows, :length].double()
    width = 2 * turns.shape[-1]
    a, b = out[..., 0:width:2].clone(), out[..., 1:width:2].clone()
    out[..., 0:width:2] = a * turns.cos() - b * turns.sin()
    out[..., 1:width:2] = b * turns.cos() + a * turns.sin()
    return out.to(x.dtype)


def rotary(x: Tensor, rotation_positions: Tensor, rotation_frequencies: Tensor, rotation_pairing: str) -> Tensor:
    """Channel pairs rotated by position * frequency. x: [batch, time, heads, head_dim]; positions: [batch, time]."""
    pairs = rotation_frequencies.numel()
    j = torch.arange(pairs, device=x.device)
    first, second = (j, j + pairs) if rotation_pairing == "half" else (2 * j, 2 * j + 1)
    angles = (rotation_positions.float()[..., None] * rotation_frequencies).double()[:, :, None]
    a, b, out = x[..., first].double(), x[..., second].double(), x.double().clone()
    out[..., first] = a * angles.cos() - b * angles.sin()
    out[..., second] = b * angles.cos() + a * angles.sin()
    return out.to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and float32 scales, one for each row: max |x| / 127."""
    wide = x.float()
    scales = wide.abs().amax(-1) / 127
    codes = torch.round(wide / torch.where(scales > 0, scales, 1.0)[..., None])
    return codes.clamp(-127, 127).to(torch.int8), scales


def kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    rotation_positions: Tensor,
    rotation_frequencies: Tensor,
    rotation_pairing: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries; caches [pages, page_size, kv_heads, head_dim] with rotated keys and values at `slots`."""
    turn = (rotation_positions, rotation_frequencies, rotation_pairing)
    k_cache, v_cache, flat = k_cache.clone(), v_cache.clone(), slots.flatten()
    k_cache.flatten(0, 1)[flat] = rotary(k, *turn).flatten(0, 1)
    v_cache.flatten(0, 1)[flat] = v.flatten(0, 1)
    return rotary(q, *turn), k_cache, v_cache


def kv_write_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    rotation_positions: Tensor,
    rotation_frequencies: Tensor,
    rotation_pairing: str,
    k_scales: Tensor,
    v_scales: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `kv_write` into int8 caches with a float32 scale for each token and head; keys are rounded from float32."""
    turn = (rotation_positions, rotation_frequencies, rotation_pairing)
    caches = [x.clone() for x in (k_cache, v_cache, k_scales, v_scales)]
    for i, x in enumerate((rotary(k.float(), *turn), v)):
        caches[i].flatten(0, 1)[slots.flatten()], caches[i + 2].flatten(0, 1)[slots.flatten()] = quantize_rows(
            x.flatten(0, 1)
        )
    return rotary(q, *turn), caches[0], caches[1], caches[2], caches[3]


def encoder_attention(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor) -> Tensor:
    """Bidirectional attention over the first key_lengths[b] keys. q, k, v: [batch, time, heads, head_dim]."""
    return torch.stack(
        [attend(q[b], k[b, :n].double(), v[b, :n].double(), False) for b, n in enumerate(key_lengths.tolist())]
    )


def attend(q: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    """One sequence. q: [queries, heads, head_dim]; keys, values: [keys, kv_heads, head_dim] float64."""
    kv_heads, outputs = keys.shape[1], []
    last = torch.arange(len(keys) - len(q), len(keys), device=q.device)
    hidden = torch.arange(len(keys), device=q.device) > last[:, None]
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // kv_heads)
        scores = q[:, head].double() @ keys[:, shared].T * q.shape[-1] ** -0.5
        scores = scores.masked_fill(hidden, -torch.inf) if causal else scores
        outputs.append(scores.softmax(-1) @ values[:, shared])
    return torch.stack(outputs, 1).to(q.dtype)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, page_table: Tensor) -> Tensor:
    """Causal attention of the last queries of each sequence over pages [pages, page_size, kv_heads, head_dim]."""
    outputs = []
    for b, length in enumerate(key_lengths.tolist()):
        pages = page_table[b, : -(-length // k.shape[1])].long()
        keys, values = (x[pages].flatten(0, 1)[:length].double() for x in (k, v))
        outputs.append(attend(q[b], keys, values, True))
    return torch.stack(outputs)


def paged_attention_int8(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, page_table: Tensor, k_scales: Tensor, v_scales: Tensor
) -> Tensor:
    """As `paged_attention` over int8 pages with a scale for each token and head, [pages, page_size, kv_heads]."""
    keys, values = (x.double() * scales.double()[..., None] for x, scales in ((k, k_scales), (v, v_scales)))
    return paged_attention(q, keys, values, key_lengths, page_table)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias. x: [rows, in]; weight: [out, in]."""
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def linear_swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x G^T) * (x U^T)."""
    wide = x.double()
    return (F.silu(wide @ gate.double().T) * (wide @ up.double().T)).to(x.dtype)


def int8_weight(codes: Tensor, scales: Tensor) -> Tensor:
    """float64 weights of int8 or e4m3 codes [out, in] with a scale for each row, or for each group of a row."""
    groups = scales.shape[1] if scales.ndim == 2 else 1
    return (codes.double().unflatten(1, (groups, -1)) * scales.double().reshape(len(codes), groups, 1)).flatten(1)


def int4_weight(codes: Tensor, scales: Tensor) -> Tensor:
    """float64 weights of two codes a byte, the even input in the low half; a code stands for code - 8."""
    bytes_ = codes.view(torch.uint8).int()
    both = torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(1)
    return ((both - 8).double().unflatten(1, (scales.shape[1], -1)) * scales.double()[..., None]).flatten(1)


def int4_bytes(packed: Tensor) -> Tensor:
    """The 64 bytes of int4 codes for each 48 of int3: the spare lowest bits of all codes are the codes of a quarter."""
    blocks = packed.view(torch.uint8).unflatten(1, (-1, 3, 16)).int()
    places = torch.tensor([2, 4, 8], device=packed.device)[:, None]
    last = ((blocks & 0x11) * places).sum(2, keepdim=True)
    return torch.cat((blocks & 0xEE, last), 2).flatten(1).byte()


def nf4_weight(codes: Tensor, scales: Tensor) -> Tensor:
    """float64 weights of two codes a byte, the even input in the high half, with a scale for each 64 inputs."""
    levels = (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
    bytes_ = codes.view(torch.uint8).long()
    both = torch.stack((bytes_ >> 4, bytes_ & 15), -1).flatten(1)
    weights = torch.tensor(levels, dtype=torch.float64, device=codes.device)[both]
    return (weights.unflatten(1, (scales.shape[1], -1)) * scales.double()[..., None]).flatten(1)


def nvfp4_weight(codes: Tensor, scales: Tensor, channels: Tensor | None) -> Tensor:
    """float64 weights of two codes in e2m1 a byte, the even input in the low half, with a scale in e4m3 for each 16
    inputs and one for each channel or, without the latter, the exponent of a power of two for each 32 inputs."""
    positive = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    bytes_ = codes.view(torch.uint8).long()
    both = torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(1)
    levels = torch.tensor((*positive, *(-level for level in positive)), dtype=torch.float64, device=codes.device)
    steps = torch.exp2(scales.view(torch.uint8).double() - 127) if channels is None else scales.double()
    weights = (levels[both].unflatten(1, (scales.shape[1], -1)) * steps[..., None]).flatten(1)
    return weights if channels is None else weights * channels.double()[:, None]


def rounded_inputs(x: Tensor, groups: int) -> Tensor:
    """x rounded to int8 with a scale for each group of a row, as float64."""
    codes, scales = quantize_rows(x.unflatten(-1, (groups, -1)))
    return (codes.double() * scales.double()[..., None]).flatten(-2)


def linear_int8(x: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with int8 weights."""
    return linear(x, int8_weight(weight_codes, weight_scales), bias)


def linear_int8_swiglu(
    x: Tensor, gate_codes: Tensor, gate_scales: Tensor, up_codes: Tensor, up_scales: Tensor
) -> Tensor:
    """`linear_swiglu` with int8 weights."""
    return linear_swiglu(x, int8_weight(gate_codes, gate_scales), int8_weight(up_codes, up_scales))


def linear_int8_groups(x: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with int8 weights in groups."""
    return linear(x, int8_weight(weight_codes, weight_scales), bias)


def linear_w8a8(x: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with int8 weights of inputs rounded to int8."""
    return linear(rounded_inputs(x, 1), int8_weight(weight_codes, weight_scales), bias).to(x.dtype)


def linear_w8a8_swiglu(
    x: Tensor, gate_codes: Tensor, gate_scales: Tensor, up_codes: Tensor, up_scales: Tensor
) -> Tensor:
    """`linear_swiglu` with int8 weights of inputs rounded to int8."""
    return linear_int8_swiglu(rounded_inputs(x, 1), gate_codes, gate_scales, up_codes, up_scales).to(x.dtype)


def fp8_inputs(x: Tensor) -> Tensor:
    """x as float64; more than 64 rows are rounded to e4m3 with a scale for each row."""
    if len(x) <= 64:
        return x.double()
    wide = x.float()
    scales = wide.abs().amax(-1, keepdim=True) / 448
    codes = (wide / torch.where(scales > 0, scales, 1.0)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.double() * scales.double()


def linear_fp8(x: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with e4m3 weights; more than 64 rows of inputs are rounded to e4m3, too."""
    return linear(fp8_inputs(x), int8_weight(weight_codes, weight_scales), bias).to(x.dtype)


def linear_fp8_swiglu(
    x: Tensor, gate_codes: Tensor, gate_scales: Tensor, up_codes: Tensor, up_scales: Tensor
) -> Tensor:
    """`linear_swiglu` with e4m3 weights; more than 64 rows of inputs are rounded to e4m3, too."""
    weights = int8_weight(gate_codes, gate_scales), int8_weight(up_codes, up_scales)
    return linear_swiglu(fp8_inputs(x), *weights).to(x.dtype)


def linear_int4(x: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with int4 weights in groups."""
    return linear(x, int4_weight(weight_codes, weight_scales), bias)


def linear_int4_swiglu(
    x: Tensor, gate_codes: Tensor, gate_scales: Tensor, up_codes: Tensor, up_scales: Tensor
) -> Tensor:
    """`linear_swiglu` with int4 weights in groups."""
    return linear_swiglu(x, int4_weight(gate_codes, gate_scales), int4_weight(up_codes, up_scales))


def linear_int3(x: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with int3 weights in groups."""
    return linear(x, int4_weight(int4_bytes(weight_codes), weight_scales), bias)


def linear_int3_swiglu(
    x: Tensor, gate_codes: Tensor, gate_scales: Tensor, up_codes: Tensor, up_scales: Tensor
) -> Tensor:
    """`linear_swiglu` with int3 weights in groups."""
    return linear_int4_swiglu(x, int4_bytes(gate_codes), gate_scales, int4_bytes(up_codes), up_scales)


def linear_norm(
    x: Tensor, weight_codes: Tensor, weight_scales: Tensor, residual: Tensor, norm: Tensor, product: str
) -> tuple[Tensor, Tensor]:
    """RMSNorm of residual + `linear_int4`, rounded to the dtype of x before the norm, and that sum."""
    return add_rms_norm(linear_int4(x, weight_codes, weight_scales), residual, norm)


def linear_w4a8(x: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with int4 weights of inputs rounded to int8 in the same groups."""
    return linear_int4(rounded_inputs(x, weight_scales.shape[1]), weight_codes, weight_scales, bias).to(x.dtype)


def linear_w4a8_swiglu(
    x: Tensor, gate_codes: Tensor, gate_scales: Tensor, up_codes: Tensor, up_scales: Tensor
) -> Tensor:
    """`linear_swiglu` with int4 weights of inputs rounded to int8 in the same groups."""
    rounded = rounded_inputs(x, gate_scales.shape[1])
    return linear_int4_swiglu(rounded, gate_codes, gate_scales, up_codes, up_scales).to(x.dtype)


def linear_nf4(x: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with nf4 weights."""
    return linear(x, nf4_weight(weight_codes, weight_scales), bias)


def linear_nf4_swiglu(
    x: Tensor, gate_codes: Tensor, gate_scales: Tensor, up_codes: Tensor, up_scales: Tensor
) -> Tensor:
    """`linear_swiglu` with nf4 weights."""
    return linear_swiglu(x, nf4_weight(gate_codes, gate_scales), nf4_weight(up_codes, up_scales))


def linear_nvfp4(
    x: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    weight_zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`linear` with nvfp4 weights, whose scales of channels are in the place of zeros, or mxfp4 weights."""
    return linear(x, nvfp4_weight(weight_codes, weight_scales, weight_zeros), bias)


def linear_nvfp4_swiglu(
    x: Tensor,
    gate_codes: Tensor,
    gate_scales: Tensor,
    up_codes: Tensor,
    up_scales: Tensor,
    gate_zeros: Tensor | None = None,
    up_zeros: Tensor | None = None,
) -> Tensor:
    """`linear_swiglu` with nvfp4 or mxfp4 weights."""
    weights = nvfp4_weight(gate_codes, gate_scales, gate_zeros), nvfp4_weight(up_codes, up_scales, up_zeros)
    return linear_swiglu(x, *weights)


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Repetition penalty of the tokens seen."""
    p = penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / p, logits * p), logits)


def greedy(logits: Tensor) -> Tensor:
    """The first of the largest logits of each row, [batch] int64."""
    return logits.max(-1).indices


def sample(
    logits: Tensor,
    rows_temperature: Tensor,
    rows_top_k: Tensor,
    rows_top_p: Tensor,
    rows_min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    """Top-k, top-p and min-p, then the first token whose cumulative probability exceeds uniform * total."""
    tokens = []
    for row in range(len(logits)):
        scaled, order = (logits[row].double() / rows_temperature[row].double()).sort(descending=True, stable=True)
        kept = scaled[: int(rows_top_k[row]) or None].softmax(0)
        before = kept.cumsum(0) - kept
        keep = (before < rows_top_p[row].double()) & (kept >= rows_min_p[row].double() * kept[0])
        keep[0] = True
        mass = (kept * keep).cumsum(0)
        tokens.append(order[int((mass <= uniform[row].double() * mass[-1]).sum().clamp_max(len(mass) - 1))])
    return torch.stack(tokens)
