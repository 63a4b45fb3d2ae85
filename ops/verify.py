"""Verify draft tokens: speculative sampling's acceptance, as a torch op.

Axes: B rows, k draft tokens a row, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.common import counters, on_triton, op, pdl, tl, tlx, triton
from ops.philox import advance, uniform, uniform_triton


@op("verify", mutates=("rng",))
def verify(logits: Tensor, thresholds: Tensor, draft_tokens: Tensor, temperature: float, rng: Tensor) -> Tensor:
    """Speculative sampling (Leviathan et al., arXiv 2211.17192): a draft token x, drawn from q, is accepted with
    probability min(1, p(x) / q(x)), and else gives way to a draw from max(0, p - q). The last token is a draw from p.

    logits fp32 (B (k + 1) + B k, V), of p and then of q, whose tokens below thresholds (.., 1) are left out;
    draft_tokens int64 (B, k); rng as `sample`'s. Returns int64 (B, k + 1).
    """
    accept = verify_triton if on_triton(logits) else verify_plain
    return accept(logits.contiguous(), thresholds, draft_tokens.contiguous(), temperature, rng)


@torch.library.register_fake("gptfast::verify")
def _(logits, thresholds, draft_tokens, temperature, rng):
    return draft_tokens.new_empty(draft_tokens.shape[0], draft_tokens.shape[1] + 1)


def verify_plain(logits, thresholds, draft_tokens, temperature, rng):
    B, k = draft_tokens.shape
    probs = torch.softmax(logits.masked_fill(logits < thresholds, -math.inf) / temperature, -1)
    p, q = probs[: B * (k + 1)].view(B, k + 1, -1), probs[B * (k + 1) :].view(B, k, -1)
    q, draft_tokens = F.pad(q, (0, 0, 0, 1)), F.pad(draft_tokens, (0, 1))  # nothing is drafted after the last
    p_x, q_x = (probs.gather(2, draft_tokens[..., None])[..., 0] for probs in (p, q))
    chance = (p_x / q_x.clamp(min=1e-30)).clamp(max=1)
    chance[:, k] = 0
    mass = (p - q).clamp(min=0).cumsum(2)
    row, place = torch.meshgrid(*(torch.arange(n, device=logits.device) for n in (B, k + 1)), indexing="ij")
    u = uniform(rng, row, place)
    rng[1] += 1
    # one draw serves both: what is left of u where it rejects the draft token is uniform again
    sought = (u - chance) / (1 - chance).clamp(min=1e-30) * mass[..., -1]
    drawn = ((mass > sought[..., None]) | (mass == mass[..., -1:])).int().argmax(2)
    return torch.where(u < chance, draft_tokens, drawn)


def verify_triton(logits, thresholds, draft_tokens, temperature, rng):
    """One launch: logits fp32 (B (k + 1) + B k, V) and draft_tokens int64 (B, k), both contiguous."""
    (B, k), V = draft_tokens.shape, logits.shape[1]
    out = torch.empty(B, k + 1, dtype=torch.int64, device=logits.device)
    block = 4096
    _verify_kernel[(B * (k + 1),)](
        out, logits, thresholds, draft_tokens, rng, counters(logits.device, 1), V, k, 1 / temperature,
        BLOCK=block, BLOCKS=triton.next_power_of_2(triton.cdiv(V, block)),
        num_warps=16, **pdl(logits.device),
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _scaled(logits, token, V, threshold, scale):
        x = tl.load(logits + token, mask=token < V, other=float("-inf"))
        return tl.where(x >= threshold, x * scale, float("-inf"))

    @triton.jit
    def _probability(logits, token, V, threshold, scale, m_i, l_i):
        return tl.exp(_scaled(logits, token, V, threshold, scale) - m_i) / l_i

    @triton.jit
    def _fold(m_i, l_i, x):
        """The running maximum, and the sum of exp(x - maximum), of each lane, with one more x in them."""
        m_new = tl.maximum(m_i, x)
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        return m_new, l_i * tl.exp(m_i - safe) + tl.exp(x - safe)

    @triton.jit
    def _verify_kernel(
        out, logits, thresholds, draft_tokens, rng, done, V, k, scale, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        """One draft token, or what follows the last, a program: see `verify` and `verify_plain`."""
        row = tl.program_id(0)
        place = row % (k + 1)
        drafted = place < k
        draft_of = row // (k + 1) * k + tl.minimum(place, k - 1)
        if PDL:
            tlx.gdc_launch_dependents()
            tlx.gdc_wait()
        p_logits = logits + row.to(tl.int64) * V
        q_row = tl.num_programs(0) + draft_of
        q_logits = logits + q_row.to(tl.int64) * V
        p_threshold = tl.load(thresholds + row)
        q_threshold = tl.where(drafted, tl.load(thresholds + q_row), float("inf"))  # no q: p is what is left
        lane = tl.arange(0, BLOCK)
        p_m = tl.full((BLOCK,), float("-inf"), tl.float32)
        q_m = p_m
        p_l = tl.zeros((BLOCK,), tl.float32)
        q_l = p_l
        for start in range(0, V, BLOCK):
            p_m, p_l = _fold(p_m, p_l, _scaled(p_logits, start + lane, V, p_threshold, scale))
            q_m, q_l = _fold(q_m, q_l, _scaled(q_logits, start + lane, V, q_threshold, scale))
        p_m_i = tl.max(p_m, 0)
        q_m_i = tl.where(drafted, tl.max(q_m, 0), 0.0)
        p_l = tl.sum(p_l * tl.exp(p_m - p_m_i), 0)
        q_l = tl.where(drafted, tl.sum(q_l * tl.exp(q_m - q_m_i), 0), 1.0)

        masses = tl.zeros((BLOCKS,), tl.float32)
        part = tl.arange(0, BLOCKS)
        for n in range(tl.cdiv(V, BLOCK)):
            p = _probability(p_logits, n * BLOCK + lane, V, p_threshold, scale, p_m_i, p_l)
            q = _probability(q_logits, n * BLOCK + lane, V, q_threshold, scale, q_m_i, q_l)
            masses = tl.where(part == n, tl.sum(tl.maximum(p - q, 0.0), 0), masses)
        x = tl.load(draft_tokens + draft_of)
        p = _probability(p_logits, x, V, p_threshold, scale, p_m_i, p_l)
        q = _probability(q_logits, x, V, q_threshold, scale, q_m_i, q_l)
        chance = tl.where(drafted, tl.minimum(p / tl.maximum(q, 1e-30), 1.0), 0.0)
        one = tl.zeros((1,), tl.int32)
        u = tl.max(uniform_triton(rng, row // (k + 1) + one, place + one), 0)
        upto = tl.cumsum(masses, 0)  # rounding may let it grow, or shrink, where there is no mass
        sought = (u - chance) / tl.maximum(1 - chance, 1e-30) * tl.max(upto, 0)
        some = masses > 0
        n = tl.min(
            tl.where(some & (upto > sought), part, tl.max(tl.where(some, part, 0), 0)), 0
        )  # the block to look in
        sought -= tl.max(tl.where(part < n, upto, 0.0), 0)
        token = n * BLOCK + lane
        p = _probability(p_logits, token, V, p_threshold, scale, p_m_i, p_l)
        q = _probability(q_logits, token, V, q_threshold, scale, q_m_i, q_l)
        rest = tl.maximum(p - q, 0.0)
        found = tl.min(tl.where((rest > 0) & (tl.cumsum(rest, 0) > sought), token, V), 0)
        last = tl.max(tl.where(rest > 0, token, 0), 0)  # which rounding may not let the sum get past
        tl.store(out + row, tl.where(u < chance, x, tl.minimum(found, last)))
        advance(rng, done)
