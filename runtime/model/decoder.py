"""The text decoder, Qwen2: RMSNorm, rotary GQA attention over a paged KV cache, SwiGLU.

    x += o_proj(attention(RMSNorm(x)));  x += down(silu(gate(RMSNorm(x))) * up(RMSNorm(x)))
    logits = lm_head(RMSNorm(x))

Source: Qwen2.5 technical report, arXiv:2412.15115.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from ...kernels.activation import swiglu
from ...kernels.attention import attention
from ...kernels.attention_int8 import attention_int8
from ...kernels.decode_attention import MAX_NEW_TOKENS, decode_attention
from ...kernels.int4_cache import KeyBias
from ...kernels.kv_write import kv_write
from ...kernels.norm import rms_norm
from ...kernels.pages import page_slots
from ...kernels.rotary import Rotation, rope_frequencies
from ...quant.linear import Embedding, Linear, joined
from .config import DecoderConfig
from .weights import Norm


@dataclass(frozen=True)
class CacheView:
    """The KV cache for a batch of sequences: where new tokens are written, and which tokens they attend to.

    keys, values: one pool [pages, page_size, kv_heads, head_dim] per layer; page_table: [batch, max_pages] int32;
    key_lengths: [batch] int64, tokens in the cache after the new ones are written; slots: [batch, time] int64.
    k_scales, v_scales: for int8, fp8 and int4 pools one [pages, page_size, kv_heads] float32 per layer, otherwise None.
    key_turns: for int4 pools, which are [.., head_dim / 2] uint8, the cos and sin of the angles by which keys are
    rotated, each [tokens, head_dim / 2] float32, indexed by the token's position in its sequence.
    rounds_attention: for int8 pools, whether prompts attend to them by `attention_int8`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    page_table: Tensor
    key_lengths: Tensor
    slots: Tensor
    k_scales: list[Tensor] | None = None
    v_scales: list[Tensor] | None = None
    key_turns: tuple[Tensor, Tensor] | None = None
    rounds_attention: bool = False

    @classmethod
    def of(
        cls,
        keys: list[Tensor],
        values: list[Tensor],
        page_table: Tensor,
        positions: Tensor,
        *,
        k_scales: list[Tensor] | None = None,
        v_scales: list[Tensor] | None = None,
        key_turns: tuple[Tensor, Tensor] | None = None,
        rounds_attention: bool = False,
    ) -> "CacheView":
        """The view for new tokens at the indices `positions`: [batch, time] int64, ascending by one in each row."""
        slots = page_slots(page_table, positions, keys[0].shape[1])
        lengths = positions[:, -1] + 1
        return cls(keys, values, page_table, lengths, slots, k_scales, v_scales, key_turns, rounds_attention)

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """The scales of a layer's keys and of its values."""
        if self.k_scales is None or self.v_scales is None:
            return None, None
        return self.k_scales[layer], self.v_scales[layer]


class DecoderAttention(nn.Module):
    """Causal grouped-query attention; q, k and v have biases, o has none."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_width, self.kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, self.q_width, bias=True)
        self.k_proj = Linear(config.hidden_size, self.kv_width, bias=True)
        self.v_proj = Linear(config.hidden_size, self.kv_width, bias=True)
        self.o_proj = Linear(self.q_width, config.hidden_size, bias=False)
        self._qkv: list[Linear] = []  # in a list, so that it is no submodule: it shares the weights of the three

    @property
    def projections(self) -> list[Linear]:
        """The layers that compute queries, keys and values: one for each, or one for all."""
        return self._qkv or [self.q_proj, self.k_proj, self.v_proj]

    def join(self) -> None:
        """Compute queries, keys and values by one product if their weights have the same format. The products for keys
        and values alone are too small for a GPU."""
        qkv = joined(self.q_proj, self.k_proj, self.v_proj)
        self._qkv = [] if qkv is None else [qkv]

    def forward(self, x: Tensor, rotation: Rotation, cache: CacheView, layer: int) -> Tensor:
        """x: [batch, time, hidden]. Writes keys and values into the layer's cache. Returns the inputs of `o_proj`,
        [batch, time, heads * head_dim]."""
        return self.attend(*self.project(x), self.key_bias(), rotation, cache, layer).flatten(2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x, [batch, time, heads or KV heads, head_dim]."""
        made = [projection(x) for projection in self.projections]
        if len(made) == 1:
            made = list(made[0].split([self.q_width, self.kv_width, self.kv_width], dim=-1))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in made)
        return q, k, v

    def key_bias(self) -> Tensor:
        """The bias of the keys of each KV head: [KV heads, head_dim]."""
        assert self.k_proj.bias is not None
        return self.k_proj.bias.unflatten(0, (-1, self.head_dim))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, rotation: Rotation, cache: CacheView, layer: int
    ) -> Tensor:
        """Write rotated keys and values into the layer's cache, and attend to it with rotated queries. Returns a tensor
        like q.

        key_bias: [KV heads of k, head_dim], which k includes.
        """
        keys, values = cache.keys[layer], cache.values[layer]
        left_out = None if cache.key_turns is None else KeyBias(key_bias, *cache.key_turns)
        k_scales, v_scales = cache.scales(layer)
        q = kv_write(
            q,
            k,
            v,
            k_cache=keys,
            v_cache=values,
            slots=cache.slots,
            rotation=rotation,
            k_scales=k_scales,
            v_scales=v_scales,
            k_bias=None if left_out is None else left_out.bias,
        )
        lengths, table = cache.key_lengths, cache.page_table
        if q.shape[1] <= MAX_NEW_TOKENS:
            return decode_attention(
                q,
                keys,
                values,
                key_lengths=lengths,
                page_table=table,
                k_scales=k_scales,
                v_scales=v_scales,
                key_bias=left_out,
            )
        if cache.rounds_attention and k_scales is not None and v_scales is not None:
            return attention_int8(
                q, keys, values, key_lengths=lengths, page_table=table, k_scales=k_scales, v_scales=v_scales
            )
        return attention(
            q,
            keys,
            values,
            causal=True,
            key_lengths=lengths,
            page_table=table,
            k_scales=k_scales,
            v_scales=v_scales,
            key_bias=left_out,
        )


class DecoderMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self._gate_up: list[Linear] = []  # in a list, so that it is no submodule: it shares the weights of the two

    def join(self) -> None:
        """Compute gate and up by one product if they are dense; packed ones have a kernel for the pair."""
        both = joined(self.gate_proj, self.up_proj) if self.gate_proj.scheme is None else None
        self._gate_up = [] if both is None else [both]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]. Returns the inputs of `down_proj`, [..., inner]."""
        if self._gate_up:
            return swiglu(*self._gate_up[0](x).chunk(2, dim=-1))
        return self.gate_proj(x, up=self.up_proj)


class DecoderLayer(nn.Module):
    """One layer, between two states of the residual stream.

    The products that write to the stream compute the following norm, too, so a layer takes and returns both the stream
    and its norm.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = Norm(config.hidden_size, bias=False)
        self.self_attn = DecoderAttention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, bias=False)
        self.mlp = DecoderMLP(config)

    def forward(
        self, normed: Tensor, residual: Tensor, rotation: Rotation, cache: CacheView, layer: int, following: Tensor
    ) -> tuple[Tensor, Tensor]:
        """normed: residual after `input_layernorm`; both [batch, time, hidden]; following: the weight of the norm after
        this layer. Returns (normed, residual) after this layer."""
        attended = self.self_attn(normed, rotation, cache, layer)
        norm = self.post_attention_layernorm.weight
        normed, residual = self.self_attn.o_proj.add_norm(attended, residual, norm, self.eps)
        return self.mlp.down_proj.add_norm(self.mlp(normed), residual, following, self.eps)


class Decoder(nn.Module):
    """Qwen2 with its language-model head."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = Norm(config.hidden_size, bias=False)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)

    def join(self) -> None:
        """Compute products of the same input as one, for GPUs: fewer launches, and each fills more of the device."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.self_attn.join()
            layer.mlp.join()

    @cached_property
    def frequencies(self) -> Tensor:
        """Frequencies of the rotation of queries and keys; made once, because a copy to the GPU would stall every
        step."""
        return rope_frequencies(self.config.head_dim, self.config.rope_theta, self.norm.weight.device)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings of token ids: [...] int64 to [..., hidden]."""
        return self.embed_tokens(token_ids, self.norm.weight.dtype)

    def forward(self, x: Tensor, positions: Tensor, cache: CacheView) -> Tensor:
        """Run new tokens through all layers, writing their keys and values INTO the cache.

        x: [batch, time, hidden]; positions: [batch, time] int64. Returns the normed hidden states, like x.
        """
        return self.transformed(x, self.rotation(positions), cache)

    def rotation(self, positions: Tensor) -> Rotation:
        """The rotation of queries and keys at `positions`, [batch, time] int64."""
        return Rotation(positions.float(), self.frequencies, "half")

    def transformed(self, x: Tensor, rotation: Rotation, cache: CacheView) -> Tensor:
        """Like `forward`, given the rotation of the positions."""
        norms = [layer.get_buffer("input_layernorm.weight") for layer in self.layers] + [self.norm.weight]
        normed, residual = rms_norm(x, norms[0], self.config.rms_norm_eps), x
        for index, layer in enumerate(self.layers):
            normed, residual = layer(normed, residual, rotation, cache, index, norms[index + 1])
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token. hidden: [..., hidden], normed. Returns [..., vocab] float32."""
        if self.lm_head is None:
            return self.embed_tokens.scores(hidden).float()
        return self.lm_head(hidden).float()
