"""Prompts on several GPUs: sums over the ranks run while the products of other tokens do.

    layers(model, x, input_pos, cache)   all layers of a chunk, or None where this does not serve; model.py's `hidden`
                                         is the reference
    in_turns(model, x, input_pos, cache)

A chunk's two halves take turns: while the ranks add up what a layer's attention, or its feed-forward, makes of one
half, the other half's is computed. The second half's attention finds the first one's keys in the cache, as it does when
a prompt is read in two chunks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ops import prefill_cudnn
from ops.exchange import begin_sum

LEAST = 1024  # tokens of a chunk: with fewer, halves fill no GPU
UNIT = 128  # of which a half is a multiple


def layers(model: nn.Module, x: Tensor, input_pos: Tensor, cache) -> Tensor | None:
    """x (B, S, C) -> (B, S, C), where the host knows the positions."""
    B, S, _ = x.shape
    if model.tp.world == 1 or not x.is_cuda or input_pos.is_cuda or B * S < LEAST or S < 2 * UNIT:
        return None
    if S >= prefill_cudnn.CHUNK or model.layers[0].post_attention_norm is not None:  # cuDNN wants a whole chunk
        return None
    return in_turns(model, x, input_pos, cache)


def in_turns(model: nn.Module, x: Tensor, input_pos: Tensor, cache) -> Tensor:
    """As `layers`, for blocks without norms after their parts, which would need the sums at once."""
    half = -(-x.shape[1] // (2 * UNIT)) * UNIT
    # Of each half, what waits for its sum and returns it.
    halves = [lambda part=part: part.contiguous() for part in x.split(half, 1)]
    starts = [input_pos + half * i for i in range(len(halves))]
    with _no_sums(model):
        for layer, kv, rope in zip(model.layers, cache.layers, cache.rope):
            norms, feed = (layer.attention_norm, None), layer.block_sparse_moe or layer.feed_forward
            halves = [
                begin_sum(layer.attention(wait(), norms, at, kv, rope), turn)
                for turn, (wait, at) in enumerate(zip(halves, starts))
            ]
            halves = [begin_sum(feed(wait(), layer.ffn_norm), turn) for turn, wait in enumerate(halves)]
    return torch.cat([wait() for wait in halves], 1)


@contextmanager
def _no_sums(model: nn.Module) -> Iterator[None]:
    """Let attention and feed-forward return this rank's part of their sum."""
    feeds = [layer.feed_forward or layer.block_sparse_moe.cond_ffn for layer in model.layers]
    parts = [layer.attention.wo for layer in model.layers] + [feed.w2 for feed in feeds]
    for part in parts:
        part.reduce = "part"
    try:
        yield
    finally:
        for part in parts:
            part.reduce = "sum"
