"""The architecture, and nothing else: ModelConfig (blueprint), Transformer (weights), KVCache (run state).

Letters in shape comments: B batch, S new tokens, T cache length, H query heads, Hkv key/value heads, D head dim,
C model dim.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

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
    pre_norms: bool = True  # x + f(norm(x));
    post_norms: bool = False  # x + norm(f(x)), or both
    unit_offset: bool = False  # norms' weights are 1 + w, and fp32: bf16 has no 1 + w for small w
    activation: str = "silu"  # of gated feed-forwards; ACTIVATIONS has them
    embedding_scale: float = 1.0
    output_soft_cap: float = 0.0  # logits l become cap tanh(l / cap); 0 is none
    soft_cap: float = 0.0  # and so do attention's scores
    attention_scale: float = 0.0  # of scores; 0 is head_dim^-0.5
    rope_base: float = 10000.0
    rope_scaling: Mapping[str, object] = field(default_factory=dict)  # as formats/config.py reads it; {} is plain RoPE
    local_rope: Mapping[str, object] = field(default_factory=dict)  # what differs of these two in layers with a window
    rotary_dim: int = 0  # leading features of a head that rotate; 0 means head_dim
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # of each query and key head
    qk_norm_whole: bool = False  # of all query heads together, and of all key heads (OLMo 2)
    tied: bool = False  # the output layer is the embedding
    n_expert: int = 0  # experts of a mixture, in place of the feed-forward; 0 is none
    n_expert_used: int = 0  # of which each token meets so many
    expert_size: int = 0  # each one's intermediate_size
    shared_size: int = 0  # that of an expert which all tokens meet; 0 is none
    norm_topk: bool = False  # the weights of the experts that a token meets sum to one
    router_bias: bool = False
    glu_limit: float = 0.0  # experts clamp gate and up (gpt-oss's SwiGLU, see ops/experts.py); 0 is SwiGLU
    glu_alpha: float = 1.0
    sinks: bool = False  # attention heads have a logit in the softmax's denominator alone
    dense_layers: tuple[int, ...] = ()  # layers that have a feed-forward all the same
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


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


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
        # Of the scores; 0 is no cap.
        self.scale, self.soft_cap = config.attention_scale or D**-0.5, config.soft_cap
        self.sink = Gains(H, queries) if config.sinks else None
        self.wqkv = Linear(config.dim, (H + 2 * Hkv) * D, config.qkv_bias, tp=tp, rows=rows)
        self.wo = Linear(H * D, config.dim, config.o_bias, tp=tp, columns=rows[0])
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.whole_norm = WholeNorm(config, queries, keys, tp) if config.qk_norm_whole else None
        self.growth = config.rope_scaling.get("llama_4_scaling_beta", 0.0)
        self.original = config.rope_scaling.get("original_max_position_embeddings", 1)
        ops.prepare_attention(self)

    @property
    def sinks(self) -> Tensor | None:
        return self.sink.weight if self.sink else None

    def forward(
        self, x: Tensor, norms: tuple, input_pos: Tensor, kv: tuple[Tensor, ...], rope: Tensor | None
    ) -> Tensor:
        """x + post_norm(attention(norm(x))), norms being (norm, post_norm), either perhaps None."""
        norm, post_norm = norms
        qkv = self.project_in(x, norm)
        if self.whole_norm:
            qkv = self.whole_norm(qkv)
        if self.growth:
            qkv = self.grown(qkv, input_pos)
        return self.project_out(ops.attention(self, qkv, kv, input_pos, rope), x, post_norm)

    @_repeated
    def project_in(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        return self.wqkv(x, norm)

    def grown(self, qkv: Tensor, input_pos: Tensor) -> Tensor:
        """Queries times 1 + beta log(1 + position // original context) (Llama 4's, and Ministral 3's)."""
        positions = input_pos.to(qkv.device)[:, None] + torch.arange(qkv.shape[1], device=qkv.device)
        growth = 1 + self.growth * torch.log1p((positions // self.original).float())
        queries = self.wo.in_features
        return torch.cat((qkv[..., :queries] * growth[..., None].to(qkv.dtype), qkv[..., queries:]), -1)

    @_repeated
    def project_out(self, y: Tensor, x: Tensor, post_norm: RMSNorm | None) -> Tensor:
        return add(x, self.wo, y, post_norm)


def add(x: Tensor, layer: Linear, y: Tensor, post_norm: RMSNorm | None) -> Tensor:
    """x + post_norm(layer(y))"""
    return ops.add_norm(x, layer(y), post_norm) if post_norm else layer(y, residual=x)


class Gains(nn.Module):
    """A norm's weights, or other ones of features or heads, of which a rank holds a part."""

    def __init__(self, size: int, part: range):
        super().__init__()
        self.shape, self.part = (size,), part
        self.weight = nn.Parameter(torch.empty(len(part)))

    def shard(self, weight: Tensor) -> Tensor:
        """This rank's part of the whole."""
        return cut(weight, 0, self.part)


class WholeNorm(nn.Module):
    """RMSNorm of queries and of keys, each over all heads together, of all ranks (OLMo 2, arXiv 2501.00656)."""

    def __init__(self, config: ModelConfig, queries: range, keys: range, tp: TensorParallel):
        super().__init__()
        D = config.head_dim
        self.queries = Gains(config.n_head * D, range(queries.start * D, queries.stop * D))
        self.keys = Gains(config.n_local_heads * D, range(keys.start * D, keys.stop * D))
        self.eps, self.tp = config.norm_eps, tp

    def forward(self, qkv: Tensor) -> Tensor:
        gains = (self.queries.weight, self.keys.weight)
        *parts, values = qkv.split((len(gains[0]), len(gains[1]), len(gains[1])), -1)
        squares = torch.cat([part.float().square().mean(-1, keepdim=True) for part in parts], -1)  # (B, S, 2)
        if self.tp.world > 1:  # ranks hold equally many, so that the mean of their means is that of all
            squares = ops.all_reduce(squares, False, self.tp.rank, self.tp.world) / self.tp.world
        scales = torch.rsqrt(squares + self.eps).split(1, -1)
        normed = [(part.float() * by * gain.float()).to(qkv.dtype) for part, by, gain in zip(parts, scales, gains)]
        return torch.cat((*normed, values), -1)


class FeedForward(nn.Module):
    """Gated linear units (arXiv 2002.05202): w2(act(w1 x) * w3 x), with silu SwiGLU. With `experts`, so
    many of them."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, size: int = 0, experts: int = 0):
        super().__init__()
        size = size or config.intermediate_size
        hidden = tp.part(size, 32)
        self.w1 = Linear(config.dim, size, config.mlp_bias, tp=tp, rows=[hidden], experts=experts)
        self.w3 = Linear(config.dim, size, config.mlp_bias, tp=tp, rows=[hidden], experts=experts)
        self.w2 = Linear(size, config.dim, config.mlp_bias, tp=tp, columns=hidden, experts=experts)
        self.act = ACTIVATIONS[config.activation]
        self.w13: Linear | None = None  # what `merge` makes of w1 and w3

    def merge(self) -> None:
        """Make w1 and w3 one layer, if they are of one kind and SwiGLU's."""
        self.w13 = interleaved(self.w1, self.w3) if self.act is F.silu else None
        if self.w13:
            self.w1 = self.w3 = None

    @property
    def first(self) -> Linear:
        return self.w13 or self.w1

    @_repeated
    def forward(self, x: Tensor, norm: RMSNorm | None, post_norm: RMSNorm | None = None) -> Tensor:
        """x + post_norm(feed_forward(norm(x)))"""
        return add(x, self.w2, self.hidden(x, norm), post_norm)

    def hidden(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        return self.w13(x, norm) if self.w13 else self.act(self.w1(x, norm)) * self.w3(x, norm)


class Mixture(nn.Module):
    """Mixture of experts (Mixtral, arXiv 2401.04088): of `cond_ffn`'s feed-forwards each token meets the few that its
    router, `gate`, scores highest, weighted by their scores, and perhaps one that all tokens share."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.top_k, self.renormalize, self.rank, self.world = config.n_expert_used, config.norm_topk, tp.rank, tp.world
        self.gate = nn.Linear(config.dim, config.n_expert, config.router_bias)
        self.cond_ffn = FeedForward(config, tp, config.expert_size, config.n_expert)
        self.limit, self.alpha = config.glu_limit, config.glu_alpha
        self.shared_expert = FeedForward(config, tp, config.shared_size) if config.shared_size else None
        self.shared_expert_gate = nn.Linear(config.dim, 1, bias=False) if config.shared_size else None
        if self.shared_expert:
            self.shared_expert.w2.reduce = ""  # ops.mixture sums over the ranks
        self.backends: tuple[Callable, ...] = ()

    def pack(self, dtype: torch.dtype) -> None:
        ops.prepare_mixture(self, dtype)

    @_repeated
    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x + mixture(norm(x))"""
        own = x if self.world == 1 else None  # which ops.mixture adds to a sum over ranks
        if self.shared_expert:
            h = norm(x)
            hidden = self.shared_expert.hidden(h, None) * self.shared_expert_gate(h).sigmoid()
            own = self.shared_expert.w2(hidden, residual=own)
        return ops.mixture(self, x, norm, own)


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, tp: TensorParallel):
        super().__init__()
        self.attention = Attention(config, layer, tp)
        mixed = config.n_expert > 0 and layer not in config.dense_layers
        self.feed_forward = None if mixed else FeedForward(config, tp)
        self.block_sparse_moe = Mixture(config, tp) if mixed else None  # gpt-fast's name
        for name in ("attention_norm", "ffn_norm"):
            setattr(self, name, RMSNorm(config.dim, config.norm_eps) if config.pre_norms else None)
            setattr(self, f"post_{name}", RMSNorm(config.dim, config.norm_eps) if config.post_norms else None)

    def forward(self, x: Tensor, input_pos: Tensor, kv: tuple[Tensor, ...], rope: Tensor | None) -> Tensor:
        """x: (B, S, C); kv: this layer's part of the cache, written in place; rope: its rotary table, if any."""
        # Each part takes its norms and returns x plus its result, so that the linears beside them can fuse both.
        x = self.attention(x, (self.attention_norm, self.post_attention_norm), input_pos, kv, rope)
        if self.block_sparse_moe:
            return self.block_sparse_moe(x, self.ffn_norm)
        return self.feed_forward(x, self.ffn_norm, self.post_ffn_norm)


class Embedding(nn.Module):
    """Token ids to features; a rank holds some rows of the table (V, C)."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.shape = (config.vocab_size, config.dim)  # of the whole table
        self.tp, self.rows, self.scale = tp, tp.part(config.vocab_size, 16), config.embedding_scale
        self.weight = nn.Parameter(torch.empty(len(self.rows), config.dim), requires_grad=False)

    def shard(self, table: Tensor) -> Tensor:
        """This rank's part of the whole table."""
        return cut(table, 0, self.rows) if self.tp.world > 1 else table

    def forward(self, tokens: Tensor, start: Tensor | None = None, length: int = 0) -> Tensor:
        """tokens int64 (B, S) -> (B, S, C). With start int64 (B,): tokens hold one for each position, of which
        those from start on are wanted, `length` a row."""
        alone = self.tp.world == 1
        x = ops.embed(self.weight, tokens, start, length or tokens.shape[1], None if alone else self.rows.start)
        return self.scaled(x if alone else ops.all_reduce(x, False, self.tp.rank, self.tp.world))

    def scaled(self, x: Tensor) -> Tensor:
        """Rows of the table times the model's scale, which is of their dtype (Gemma's 55.4 is 55.5 in bf16)."""
        return x if self.scale == 1 else x * torch.tensor(self.scale, dtype=x.dtype)


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

    @property
    def dtype(self) -> torch.dtype:
        """Activations'."""
        return self.tok_embeddings.weight.dtype

    def pack(self, dtype: torch.dtype) -> None:
        """Lay the weights out for the device they are on and activations of `dtype`. Called once, after loading."""
        later = None
        for layer in reversed(self.layers):
            for module in [m for m in layer.modules() if isinstance(m, FeedForward)]:
                module.merge()
            for module in [m for m in layer.modules() if isinstance(m, (Linear, Mixture))]:
                module.pack(dtype)
            soon = layer.feed_forward and layer.feed_forward.first.weight
            ops.prepare_attention(layer.attention, layer is self.layers[0], soon, later)
            later = layer.attention.wqkv.weight
            if self.norm.weight.is_cuda:
                torch.cuda.empty_cache()  # the tensors replaced leave holes that none of the new ones fits
        self.output.pack(dtype)
        ops.prepare_layers(self, dtype)

    def cache(self, batch_size: int, length: int, kind: str | None = None) -> "KVCache":
        """Run state for so many rows of so many tokens, in the activations' dtype or 8 bits: "int8" or "fp8"."""
        like = {"dtype": self.dtype, "device": self.norm.weight.device}
        return KVCache(self.config, batch_size, length, kind=kind, shards=self.tp.world, **like)

    def hidden(self, x: Tensor, input_pos: Tensor, cache: "KVCache") -> Tensor:
        """What the output layer reads (before the last norm) of new tokens' embeddings x (B, S, C), whose keys and
        values enter the cache: (B, S, C). input_pos: (B,) int, the position of each row's first new token.

        Positions past a row's end may hold padding: what it writes is overwritten before a real token can see it.
        """
        if (y := ops.layers(self, x, input_pos, cache)) is not None:
            return y
        for layer, kv, rope in zip(self.layers, cache.layers, cache.rope):
            x = layer(x, input_pos, kv, rope)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The output layer: (..., C) -> fp32 (..., V)."""
        logits, cap = self.output(x, self.norm), self.config.output_soft_cap
        return cap * torch.tanh(logits / cap) if cap else logits

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
    """Run state: each layer's keys and values (B, Hkv, T, D), in 8 bits their scales (B, Hkv, T), and its rotary table,
    if any. Allocated once. Raises UserError for a kind that is not known.

    limit: tokens of a sequence for which the tables hold. Longrope's are the long factors' where sequences are as long
    as the cache, until `fit` says.

    Rolling back is a matter of position alone: what lies at or past a row's position is rewritten before it is read.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        length: int,
        *,
        dtype: torch.dtype,
        device,
        kind: str | None = None,
        shards: int = 1,
    ):
        if kind not in (None, *ops.CACHE_KINDS):
            raise UserError(f"kv_cache is {kind!r}; accepted: {', '.join(ops.CACHE_KINDS)}")
        shape = (batch_size, max(1, config.n_local_heads // shards), length, config.head_dim)
        self.length, self.kind = length, kind
        self.layers = [ops.new_cache(shape, dtype, kind, device) for _ in range(config.n_layer)]
        self.config, self.rope, self.limit = config, rope_tables(config, length, device), math.inf

    def fit(self, length: int) -> bool:
        """Let the tables hold for sequences of so many tokens. Returns whether that changed them: what the cache holds
        has to be read again then."""
        original = self.config.rope_scaling.get("original_max_position_embeddings", 0)
        if self.config.rope_scaling.get("rope_type") != "longrope" or self.length <= original:
            return False
        before, self.limit = self.limit, original if length <= original else math.inf
        if before != self.limit:
            for old, new in zip(self.rope, rope_tables(self.config, self.length, "cpu", length)):
                old.copy_(new)
        return before != self.limit

    @property
    def k(self) -> list[Tensor]:
        return [layer[0] for layer in self.layers]

    @property
    def v(self) -> list[Tensor]:
        return [layer[1] for layer in self.layers]

    @property
    def tensors(self) -> list[Tensor]:
        """Keys, values and scales of all layers, (B, Hkv, T, ...) each."""
        return [t for layer in self.layers for t in layer]

    def select(self, *index: slice | Tensor) -> "KVCache":
        """Rows, heads and positions of it, sharing memory where slices tell which."""
        part = copy.copy(self)
        part.layers = [tuple(t[index] for t in layer) for layer in self.layers]
        part.length = part.layers[0][0].shape[2]
        return part

    def first(self, length: int) -> "KVCache":
        """The first positions of it, sharing memory: what lies beyond costs nothing then."""
        return self.select(slice(None), slice(None), slice(length))

    @property
    def bytes_per_position(self) -> int:
        """Bytes that one position of one row takes in all layers, keys and values together."""
        return sum(t[:1, :, :1].nbytes for t in self.tensors)


def rope_tables(config: ModelConfig, length: int, device, longest: int = 0) -> list[Tensor | None]:
    """Each layer's `rope_table`, None where it does not rotate. Layers that rotate alike share one."""
    table = local = rope_table(config, length, longest).to(device)
    if config.local_rope:
        local = rope_table(replace(config, **config.local_rope), length, longest).to(device)
    windows = config.windows or (0,) * config.n_layer
    rotate = config.rope_layers or (True,) * config.n_layer
    return [(local if window else table) if rotates else None for window, rotates in zip(windows, rotate)]


def rope_table(config: ModelConfig, length: int, longest: int = 0) -> Tensor:
    """Rotary cosines and sines, fp32 (length, rotary_dim / 2, 2), positions 0..length-1 (RoFormer, arXiv 2104.09864).

    Scalings: linear (arXiv 2306.15595); llama3 (Llama 3.1's reference code); yarn (arXiv 2309.00071); longrope
    (arXiv 2402.13753), whose long factors serve sequences of more tokens than the original context. longest: how many
    the sequences have, by default as many as the table.
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
        factors = scaling["long_factor" if (longest or length) > original else "short_factor"]
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
