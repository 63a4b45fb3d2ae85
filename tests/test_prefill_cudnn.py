"""Attention in pieces: everything but cuDNN itself, for which plain attention stands in."""

import pytest
import torch
from test_kernels import CUDA, DEVICE, error

from ops import prefill, prefill_cudnn


def attend(q, k, v, causal, scale):
    """As prefill_cudnn._attend, in fp32."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(groups, 1) for t in (k, v))
    scores = q.float() @ k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).to(q.dtype), scores.logsumexp(-1, keepdim=True)


@pytest.mark.parametrize("chunks", [0, 1, 3, 7, 11])  # pieces of all sizes, the largest more than once
def test_pieces_make_the_whole(chunks, monkeypatch):
    S, H, Hkv, D = 24, 4, 2, 64
    monkeypatch.setattr(prefill_cudnn, "PIECES", (4, 2, 1))
    monkeypatch.setattr(prefill_cudnn, "_attend", attend)
    q = torch.randn(1, S, H, D, device=DEVICE).half()
    k, v = torch.randn(2, 1, Hkv, S * (chunks + 1) + 5, D, device=DEVICE).half()
    out = prefill_cudnn.attention(q, k, v, S * chunks, 0.2)
    seen = torch.arange(S * (chunks + 1), device=DEVICE)
    scores = q.double().transpose(1, 2) @ k.double().repeat_interleave(2, 1)[:, :, : len(seen)].mT * 0.2
    scores = scores.masked_fill(seen[None, :] > S * chunks + seen[:S, None], -torch.inf)
    expected = scores.softmax(-1) @ v.double().repeat_interleave(2, 1)[:, :, : len(seen)]
    assert error(out, expected.transpose(1, 2)) < 2e-3


def test_which_chunks_are_planned(monkeypatch):
    monkeypatch.setattr(prefill_cudnn, "CHUNK", 16)
    q, cache = torch.zeros(1, 16, 4, 64), torch.zeros(1, 2, 64, 64)
    assert not prefill_cudnn.supports(q, cache, 16)
    monkeypatch.setattr(prefill_cudnn, "_planned", {prefill_cudnn._key(q, 2)})
    assert prefill_cudnn.supports(q, cache, 48)
    others = [(q, 49), (q, 64), (q, None), (q[:, :15], 16), (q[..., :32], 16), (q.repeat(2, 1, 1, 1), 16)]
    for other, start in others:
        assert not prefill_cudnn.supports(other, cache, start)


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="needs cuDNN")
@pytest.mark.parametrize("start", [0, 8192, 7 * 8192])
def test_cudnn_equals_our_kernel(start, monkeypatch):
    """One of the eight heads is compared, at the start and the end of the chunk."""
    H, Hkv, D = 8, 2, 128

    class Layer:
        n_head, window, soft_cap, scale = H, 0, 0.0, 0.1

    qkv = torch.randn(1, 8192, (H + 2 * Hkv) * D, device=DEVICE, dtype=torch.bfloat16)
    caches = torch.randn(2, 1, Hkv, 8 * 8192 + 3, D, device=DEVICE, dtype=torch.bfloat16)
    rest = (torch.tensor([start]), None, None, None, 0.0, H, 0, 0.1)
    monkeypatch.setattr(prefill_cudnn, "_planned", set())
    ours = prefill.attention_prefill(qkv, *caches, *rest)
    prefill_cudnn.plan(Layer, caches[0])
    theirs = prefill.attention_prefill(qkv, *caches, *rest)
    assert not torch.equal(ours, theirs) and error(theirs, ours.double()) < 1e-2
