"""The architecture, and nothing else: ModelConfig (blueprint), Transformer (weights), KVCache (run state).

Letters in shape comments: B batch, S new tokens, T cache length, H query heads, Hkv key/value heads, D head dim,
C model dim.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn import RMSNorm

import ops
from errors import UserError
from formats.config import builtin, config_fields
from linear import Linear, interleaved
from tp import TensorParallel, cut


@dataclass(frozen=True)
class ModelConfig:
    """The blueprint of a decoder-only transformer. Immutable: caches and tensor parallelism never write to it."""

    dim: int
    n_layer: int
    n_head: int
    n_local_heads: int  # key/value heads, gpt-fast's name
    head_dim: int
    intermediate_size: int
    vocab_size: int
    block_size: int = 2048  # longest context the model was trained for, in tokens
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: Mapping[str, object] = field(default_factory=dict)  # as formats/config.py reads it; {} is plain RoPE
    rotary_dim: int = 0  # leading features of a head that rotate; 0 means head_dim
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False  # the output layer is the embedding
    windows: tuple[int, ...] = ()  # sliding window of each layer, 0 is full attention; () is full everywhere
    rope_layers: tuple[bool, ...] = ()  # whether each layer rotates (SmolLM3 skips some); () is everywhere

    @classmethod
    def from_hf(cls, config: dict) -> "ModelConfig":
        """Read a Hugging Face config.json. Raises UserError naming what is unknown and what is supported."""
        return cls(**config_fields(config))

    def check_tokens(self, rows: Iterable[Iterable[int]]) -> None:
        """Raises UserError for a token id that is not in the vocabulary."""
        if bad := [token for row in rows for token in row if not 0 <= token < self.vocab_size]:
            raise UserError(f"token id {bad[0]} is outside the vocabulary of {self.vocab_size}")

    @classmethod
    def from_name(cls, name: str) -> "ModelConfig":
        """The blueprint of one of gpt-fast's model names, for directories that hold no config.json."""
        return cls.from_hf(builtin(name))


def _repeated(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let torch.compile compile a method for the first layer and reuse it for the others, when decoding a token a row
    (these regions do not take the dynamic lengths of a prefill)."""
    region = torch.compiler.nested_compile_region(method)

    @functools.wraps(method)
    def call(self: nn.Module, x: Tensor, *rest: object) -> Tensor:
        return (region if x.shape[1] == 1 else method)(self, x, *rest)

    return call


class Attention(nn.Module):
    """Grouped-query attention with rotary positions over a static cache."""

    def __init__(self, config: ModelConfig, layer: int, tp: TensorParallel):
        super().__init__()
        H, Hkv, D = config.n_head, config.n_local_heads, config.head_dim
        queries, keys = tp.heads(H, Hkv)
        parts = ((0, queries), (H, keys), (H + Hkv, keys))  # of wqkv's heads, this rank's
        rows = [range((first + own.start) * D, (first + own.stop) * D) for first, own in parts]
        self.n_head = len(queries)
        self.window = config.windows[layer] if config.windows else 0
        self.rotates = not config.rope_layers or config.rope_layers[layer]
        self.wqkv = Linear(config.dim, (H + 2 * Hkv) * D, config.qkv_bias, tp=tp, rows=rows)
        self.wo = Linear(H * D, config.dim, config.o_bias, tp=tp, columns=rows[0])
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        ops.prepare_attention(self)

    def forward(self, x: Tensor, norm: RMSNorm, input_pos: Tensor, k: Tensor, v: Tensor, rope: Tensor) -> Tensor:
        """x + attention(norm(x))"""
        qkv = self.project_in(x, norm)
        return self.project_out(ops.attention(self, qkv, k, v, input_pos, rope if self.rotates else None), x)

    @_repeated
    def project_in(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return self.wqkv(x, norm)

    @_repeated
    def project_out(self, y: Tensor, x: Tensor) -> Tensor:
        return self.wo(y, residual=x)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        size, hidden = config.intermediate_size, tp.part(config.intermediate_size, 32)
        self.w1 = Linear(config.dim, size, config.mlp_bias, tp=tp, rows=[hidden])
        self.w3 = Linear(config.dim, size, config.mlp_bias, tp=tp, rows=[hidden])
        self.w2 = Linear(size, config.dim, config.mlp_bias, tp=tp, columns=hidden)
        self.w13: Linear | None = None  # what `merge` makes of w1 and w3

    def merge(self) -> None:
        """Make w1 and w3 one layer, if they are of one kind."""
        self.w13 = interleaved(self.w1, self.w3)
        if self.w13:
            self.w1 = self.w3 = None

    @_repeated
    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x + feed_forward(norm(x))"""
        hidden = self.w13(x, norm) if self.w13 else F.silu(self.w1(x, norm)) * self.w3(x, norm)
        return self.w2(hidden, residual=x)


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, tp: TensorParallel):
        super().__init__()
        self.attention = Attention(config, layer, tp)
        self.feed_forward = FeedForward(config, tp)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, input_pos: Tensor, k: Tensor, v: Tensor, rope: Tensor) -> Tensor:
        """x: (B, S, C); k, v: this layer's caches (B, Hkv, T, D), written in place."""
        # Each part takes its norm and returns x plus its result, so that the linears beside them can fuse both.
        x = self.attention(x, self.attention_norm, input_pos, k, v, rope)
        return self.feed_forward(x, self.ffn_norm)


class Embedding(nn.Module):
    """Token ids to features; a rank holds some rows of the table (V, C)."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.shape = (config.vocab_size, config.dim)  # of the whole table
        self.tp, self.rows = tp, tp.part(config.vocab_size, 16)
        self.weight = nn.Parameter(torch.empty(len(self.rows), config.dim), requires_grad=False)

    def shard(self, table: Tensor) -> Tensor:
        """This rank's part of the whole table."""
        return cut(table, 0, self.rows) if self.tp.world > 1 else table

    def forward(self, tokens: Tensor, start: Tensor | None = None, length: int = 0) -> Tensor:
        """tokens int64 (B, S) -> (B, S, C). With start int64 (B,): tokens hold one for each position, of which
        those from start on are wanted, `length` a row."""
        alone = self.tp.world == 1
        x = ops.embed(self.weight, tokens, start, length or tokens.shape[1], None if alone else self.rows.start)
        return x if alone else ops.all_reduce(x, False, self.tp.rank, self.tp.world)


class Transformer(nn.Module):
    """A Llama-family decoder, or a rank's part. Build it under torch.device("meta") and let checkpoint.py fill it."""

    def __init__(self, config: ModelConfig, tp: TensorParallel | None = None):
        super().__init__()
        self.config, self.tp = config, tp or TensorParallel()
        self.tok_embeddings = Embedding(config, self.tp)
        self.layers = nn.ModuleList(TransformerBlock(config, layer, self.tp) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        rows = [self.tok_embeddings.rows]
        self.output = Linear(config.dim, config.vocab_size, tp=self.tp, rows=rows, gather=True, fp32=True)
        if config.tied:
            self.output.weight = self.tok_embeddings.weight
        self.requires_grad_(False)

    def pack(self, dtype: torch.dtype) -> None:
        """Lay the weights out for the device they are on and activations of `dtype`. Called once, after loading."""
        if self.norm.weight.is_meta:
            return
        for i, layer in enumerate(self.layers):
            layer.feed_forward.merge()
            for module in layer.modules():
                if isinstance(module, Linear):
                    module.pack(dtype)
            following = layer.feed_forward.w13 or layer.feed_forward.w1
            ops.prepare_attention(layer.attention, first_layer=i == 0, following=following.weight)
            if self.norm.weight.is_cuda:
                torch.cuda.empty_cache()  # the tensors replaced leave holes that none of the new ones fits
        self.output.pack(dtype)
        ops.prepare_layers(self, dtype)

    def cache(self, batch_size: int, length: int) -> "KVCache":
        """Run state for so many rows of so many tokens."""
        like = {"dtype": self.norm.weight.dtype, "device": self.norm.weight.device}
        return KVCache(self.config, batch_size, length, shards=self.tp.world, **like)

    def hidden(self, x: Tensor, input_pos: Tensor, cache: "KVCache") -> Tensor:
        """What the output layer reads (before the last norm) of new tokens' embeddings x (B, S, C), whose keys and
        values enter the cache: (B, S, C). input_pos: (B,) int, the position of each row's first new token.

        Positions past a row's end may hold padding: what it writes is overwritten before a real token can see it.
        """
        if (y := ops.layers(self, x, input_pos, cache)) is not None:
            return y
        for layer, k, v in zip(self.layers, cache.k, cache.v):
            x = layer(x, input_pos, k, v, cache.rope)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The output layer: (..., C) -> fp32 (..., V)."""
        return self.output(x, self.norm)

    def forward(
        self,
        tokens: Tensor,
        input_pos: Tensor,
        cache: "KVCache",
        *,
        last: Tensor | None = None,
        all_logits: bool = False,
    ) -> Tensor:
        """Logits of new tokens int64 (B, S) at input_pos (see `hidden`): fp32 (B, 1, V), or (B, S, V) with all_logits.

        last: (B,) int, the index in S whose logits are wanted, by default the last.
        """
        x = self.hidden(self.tok_embeddings(tokens), input_pos, cache)
        if not all_logits:
            x = x[:, -1:] if last is None else x[torch.arange(len(x), device=x.device), last].unsqueeze(1)
        return self.logits(x)


class KVCache:
    """Run state: each layer's keys and values (B, Hkv, T, D) and the rotary table. Allocated once.

    Rolling back is a matter of position alone: what lies at or past a row's position is rewritten before it is read.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, length: int, *, dtype: torch.dtype, device, shards: int = 1
    ):
        shape = (batch_size, max(1, config.n_local_heads // shards), length, config.head_dim)
        self.length = length
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.rope = rope_table(config, length).to(device)

    def first(self, length: int) -> "KVCache":
        """The first positions of it, sharing memory: what lies beyond costs nothing then."""
        part = copy.copy(self)
        part.length = min(length, self.length)
        part.k, part.v = ([t[:, :, : part.length] for t in own] for own in (self.k, self.v))
        return part

    @property
    def bytes_per_position(self) -> int:
        """Bytes that one position of one row takes in all layers, keys and values together."""
        return 2 * sum(k.element_size() * k.shape[1] * k.shape[3] for k in self.k)


def rope_table(config: ModelConfig, length: int) -> Tensor:
    """Rotary cosines and sines, fp32 (length, rotary_dim / 2, 2), positions 0..length-1 (RoFormer, arXiv 2104.09864).

    Scalings: linear (arXiv 2306.15595); llama3 (Llama 3.1's reference code); yarn (arXiv 2309.00071); longrope
    (arXiv 2402.13753), whose long factors serve a run whose cache is longer than the original context.
    """
    dim = config.rotary_dim or config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    freqs, magnitude = config.rope_base**-exponents, 1.0
    kind = (scaling := config.rope_scaling).get("rope_type", "default")
    if kind == "linear":
        freqs = freqs / scaling["factor"]
    elif kind == "llama3":
        freqs = _llama3_frequencies(freqs, scaling)
    elif kind == "yarn":
        freqs, magnitude = _yarn(freqs, config.rope_base, dim, scaling)
    elif kind == "longrope":
        original = scaling["original_max_position_embeddings"]
        factor = scaling["factor"] or scaling["max_position_embeddings"] / original
        factors = scaling["long_factor" if length > original else "short_factor"]
        freqs = freqs / torch.tensor(factors, dtype=torch.float64)
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        magnitude = scaling["attention_factor"] or magnitude
    angles = torch.outer(torch.arange(length, dtype=torch.float64), freqs)
    return (torch.stack((angles.cos(), angles.sin()), -1) * magnitude).float()


def _llama3_frequencies(freqs: Tensor, scaling: Mapping) -> Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)  # rotations over the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (smooth + (1 - smooth) / scaling["factor"])


def _yarn(freqs: Tensor, base: float, dim: int, scaling: Mapping) -> tuple[Tensor, float]:
    """YaRN's frequencies and the factor on cos and sin that stands for its attention temperature."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:  # the feature pair that turns this often over the original context
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1

    over, under = scaling["mscale"], scaling["mscale_all_dim"]
    magnitude = temperature(over) / temperature(under) if over and under else temperature(1.0)
    return freqs * (1 - ramp) + freqs / factor * ramp, scaling["attention_factor"] or magnitude
