"""The next token of each row, drawn without sorting the vocabulary, as torch ops.

    sample(logits, ...)            draw a token a row
    logit_threshold(logits, ...)   the smallest logit that `sample` may draw

Softmax sampling is argmax over logits / temperature + Gumbel noise. On an NVIDIA GPU that is one Triton kernel, or two
where top_k or min_p leave tokens out; on a CPU cpu.cpp's, or plain PyTorch. All draw the same tokens.
"""

import math

import torch
from torch import Tensor

from ops import cpu
from ops.common import counters, on_triton, op, pdl, tl, tlx, triton
from ops.philox import advance, gumbel, uniform_triton


@op("sample", mutates=("rng", "history", "pos"))
def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    min_p: float,
    rng: Tensor,
    history: Tensor | None = None,
    pos: Tensor | None = None,
) -> Tensor:
    """Draw a token for each row of logits fp32 (B, V): int64 (B,).

    Softmax at `temperature` over the top_k largest logits (0: all; those equal to the smallest of them stay too) whose
    probability is at least min_p of the largest one's. temperature <= 0 takes the largest logit, of equals the lowest
    token. rng int64 (2,), a seed and an offset, which advances by one, makes draws repeatable. With history int64
    (B, T) and pos int64 (B,), pos advances by one, and the token is written there.
    """
    draw = sample_triton if on_triton(logits) else cpu.sample if logits.is_cpu and cpu.ready() else sample_plain
    return draw(logits.contiguous(), temperature, top_k, min_p, rng, history, pos)


@torch.library.register_fake("gptfast::sample")
def _(logits, temperature, top_k, min_p, rng, history=None, pos=None):
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


def sample_plain(logits, temperature, top_k, min_p, rng, history=None, pos=None):
    noisy = logits
    if temperature > 0:
        row, token = (logits >= logit_threshold_plain(logits, temperature, top_k, min_p)).nonzero(as_tuple=True)
        noisy = torch.full_like(logits, -math.inf)
        noisy[row, token] = logits[row, token] / temperature + gumbel(rng, row, token)
    drawn = noisy.argmax(-1)  # the lowest index of equals
    rng[1] += 1
    if history is not None:
        history.scatter_(1, pos.add_(1)[:, None], drawn[:, None])
    return drawn


@op("logit_threshold")
def logit_threshold(logits: Tensor, temperature: float, top_k: int, min_p: float) -> Tensor:
    """The smallest logit of each row of logits fp32 (B, V) that `sample` may draw, fp32 (B, 1); temperature > 0."""
    threshold = logit_threshold_triton if on_triton(logits) else logit_threshold_plain
    return threshold(logits.contiguous(), temperature, top_k, min_p)


@torch.library.register_fake("gptfast::logit_threshold")
def _(logits, temperature, top_k, min_p):
    return logits.new_empty(len(logits), 1)


def logit_threshold_plain(logits, temperature, top_k, min_p):
    values = torch.topk(logits, min(top_k or 1, logits.shape[1])).values
    least = values[:, :1] + (temperature * math.log(min_p) if min_p > 0 else -math.inf)
    return torch.maximum(least, values[:, -1:]) if top_k else least


SETTLED, SCANNED = 512, 8192  # logits that a program takes: of one row, and at most of many
PROGRAMS = 2112  # that are wanted at most: 16 a multiprocessor


def sample_triton(logits, temperature, top_k, min_p, rng, history=None, pos=None):
    """Two launches, or one where every token is in: logits fp32 (B, V), history and pos contiguous."""
    how = (temperature, top_k, min_p, rng, 1.0) if temperature > 0 else (1.0, 0, 0.0, rng, 0.0)
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    return _sample(out, logits, *how, history, pos)


def logit_threshold_triton(logits, temperature, top_k, min_p):
    """As sample_triton, without the draw."""
    out = torch.full((len(logits), 1), -math.inf, device=logits.device)
    return _sample(out, logits, temperature, top_k, min_p) if 0 < top_k < logits.shape[1] or min_p > 0 else out


def _sample(out, logits, temperature, top_k, min_p, rng=None, noise=0.0, history=None, pos=None):
    B, V = logits.shape
    device = logits.device
    k = top_k if 0 < top_k < V else V
    margin = temperature * math.log(min_p) if min_p > 0 else -math.inf
    filtered = k < V or margin > -math.inf
    block = SETTLED
    while block < SCANNED and B * triton.cdiv(V, block) > PROGRAMS:  # each looks for the same limit
        block *= 2
    # Twice as many maxima as wanted, or more, leave few tokens to settle; but every program holds all of them.
    part = 2 ** min(8, max(3, int(math.log2(max(1, V // (2 * k))))))
    blocks, count = triton.cdiv(V, block), triton.cdiv(V, part)
    maxima = torch.empty(B, count if filtered else 0, dtype=torch.float32, device=device)
    best = torch.empty(B, blocks, dtype=torch.int64, device=device)
    listed = torch.empty(B, V if filtered else 0, dtype=torch.int64, device=device)  # pairs of logit and token
    options = {"COUNT": count, **pdl(device)}
    if filtered:
        _maxima_kernel[(B, triton.cdiv(V, SETTLED))](
            logits, maxima, V, BLOCK=SETTLED, PART=part, num_warps=4, **options
        )
    _sample_kernel[(B, blocks)](
        out, logits, rng, counters(device, 2 * B + 1), maxima, best, listed, history, pos,
        0 if history is None else history.shape[1], V, k, 1 / temperature, noise, margin,
        BLOCK=block, SETTLED=SETTLED, BLOCKS=blocks, BLOCKS2=triton.next_power_of_2(blocks),
        COUNT2=triton.next_power_of_2(count), FILTER=filtered, num_warps=4, **options,
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _ordered(x):
        """fp32 as uint32 in the same order; -0 as +0."""
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)

    @triton.jit
    def _reaching(x, valid, first, second, third):
        """How many valid x reach each of three limits: three counts of 21 bits."""
        one, two, three = valid & (x >= first), valid & (x >= second), valid & (x >= third)
        return tl.sum(one.to(tl.int64) + (two.to(tl.int64) << 21) + (three.to(tl.int64) << 42), 0)

    @triton.jit
    def _apart(counts):
        return counts & 0x1FFFFF, counts >> 21 & 0x1FFFFF, counts >> 42

    @triton.jit
    def _of_highest(counts, k, none, first, second, third):
        """What belongs to the highest of three limits that k reach, or `none`."""
        one, two, three = _apart(counts)
        return tl.where(three >= k, third, tl.where(two >= k, second, tl.where(one >= k, first, none)))

    @triton.jit
    def _common(a, b):
        """The bits, uint32, above the first two in which a and b differ, and the shift of those two, which is even."""
        first = (((a ^ b) | 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # or, rounded up, the next
        shift = (tl.minimum(first, 31) // 2 * 2).to(tl.uint32)
        return a >> shift >> 2 << 2 << shift, shift.to(tl.int32)

    @triton.jit
    def _maxima_kernel(
        logits, maxima, V, BLOCK: tl.constexpr, PART: tl.constexpr, COUNT: tl.constexpr, PDL: tl.constexpr
    ):
        """The largest of each PART neighbouring logits."""
        row = tl.program_id(0)
        block = tl.program_id(1)
        if PDL:
            tlx.gdc_launch_dependents()
            tlx.gdc_wait()
        token = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row.to(tl.int64) * V + token, mask=token < V, other=float("-inf"))
        part = block * (BLOCK // PART) + tl.arange(0, BLOCK // PART)
        tl.store(maxima + row * COUNT + part, tl.max(x.reshape(BLOCK // PART, PART), 1), mask=part < COUNT)

    @triton.jit
    def _noisy(x, token, row, scale, noise, rng):
        """The score x * scale + noise * Gumbel, ordered, in the high half of an int64 and the token, reversed, in the
        low half: the largest is the sample, and of equals the lowest token. See `gumbel`."""
        u = uniform_triton(rng, row, token)
        exponential = tl.where(u < 0.01, u * (1 + u * (0.5 + u / 3)), -tl.log(1 - u))
        bits = (x * scale - noise * tl.log(exponential) + 0.0).to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        return (bits.to(tl.int64) << 32) + (0x7FFFFFFF - token).to(tl.int64)

    @triton.jit
    def _both_ends(high, low, other_high, other_low):
        return tl.maximum(high, other_high), tl.minimum(low, other_low)

    @triton.jit
    def _better(drawn, rank, other_drawn, other_rank):
        keep = drawn > other_drawn
        return tl.where(keep, drawn, other_drawn), tl.where(keep, rank, other_rank)

    @triton.jit
    def _limit(tops, there, k, COUNT: tl.constexpr):
        """The largest of the COUNT maxima that are there, and a limit that k of them reach and, as a rule, few more. So
        the k-th largest logit reaches it, too. (The k-th largest maximum itself would take three times as many steps.)
        """
        ends = tl.where(there, tops, float("-inf")), tl.where(there, tops, float("inf"))
        largest, low = tl.reduce(ends, 0, _both_ends)
        high = largest
        low = tl.maximum(low, high - 256.0)  # some may be infinite
        limit = tl.full((), float("-inf"), tl.float32)
        reached = tl.full((), COUNT, tl.int64)
        turn = 0
        while (reached > k + k // 4) & (high > low) & (turn < 16):
            step = (high - low) * 0.25
            first, second, third = low + step, low + 2 * step, low + 3 * step
            counts = _reaching(tops, there, first, second, third)
            one, two, three = _apart(counts)
            limit = _of_highest(counts, k, limit, first, second, third)
            reached = _of_highest(counts, k, reached, one, two, three)
            high = _of_highest(counts, k, first, second, third, high)
            low = _of_highest(counts, k, low, first, second, third)
            turn += 1
        return largest, limit

    @triton.jit
    def _listed(pairs):
        """Logits and tokens of a list."""
        return (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True), pairs.to(tl.int32)

    @triton.jit
    def _sample_kernel(
        out, logits, rng, counters, maxima, best, listed, history, pos, width, V, k, scale, noise, margin,
        BLOCK: tl.constexpr, SETTLED: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS2: tl.constexpr, COUNT: tl.constexpr,
        COUNT2: tl.constexpr, FILTER: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Draw from the tokens of a block or, if FILTER, list those that may be in: whose logits reach what k of the
        maxima do. The last program of a row settles the rest, SETTLED of them at a time: it draws from all that are
        listed and, where k of them have larger logits than the winner, which then was not in, again from those.
        Without rng, out is the smallest logit that is in.

        counters: two a row, how many are listed and how many programs arrived, and at the end how many rows are done.
        """
        row = tl.program_id(0)
        block = tl.program_id(1)
        if PDL:
            tlx.gdc_launch_dependents()
            tlx.gdc_wait()
        logits += row.to(tl.int64) * V
        listed += row.to(tl.int64) * V
        best += row * BLOCKS
        state = counters + row * 2
        lane = tl.arange(0, BLOCK)
        token = block * BLOCK + lane
        x = tl.load(logits + token, mask=token < V, other=float("-inf"))
        lowest = -9223372036854775807
        if FILTER:
            part = tl.arange(0, COUNT2)
            tops = tl.load(maxima + row * COUNT + part, mask=part < COUNT, other=float("-inf"))
            largest, limit = _limit(tops, part < COUNT, k, COUNT)
            kept = (token < V) & ~(x < limit) & ~(x < largest + margin)  # NaN is in, so that some token always is
            count = tl.sum(kept.to(tl.int32), 0)
            if count > 0:
                place = tl.atomic_add(state, count, sem="relaxed") + tl.cumsum(kept.to(tl.int32), 0) - 1
                pairs = (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) + token
                tl.store(listed + place, pairs, mask=kept)
        else:
            drawn = tl.where(token < V, _noisy(x, token, row, scale, noise, rng), lowest)
            tl.store(best + block, tl.max(drawn, 0))
        tl.debug_barrier()  # all of this program's stores before its arrival
        if tl.atomic_add(state + 1, 1, sem="acq_rel") != BLOCKS - 1:
            return
        tl.debug_barrier()

        at = 0
        if history is not None:
            at = tl.load(pos + row) + 1
        winner = tl.full((), lowest, tl.int64)
        if FILTER:
            n = tl.load(state, cache_modifier=".cg")
            lane = tl.arange(0, SETTLED)
            pairs = tl.load(listed + lane, mask=lane < V, other=0, cache_modifier=".cg")  # in general these are all
            x, token = _listed(pairs)
            ranks = _ordered(x)
            if rng is None:
                # the largest limit that k of them reach: of what both ends of them have in common, all do
                limit, shift = _common(_ordered(largest), _ordered(limit))
                reached = n.to(tl.int64)
                while (shift >= 0) & (reached > k):  # two bits at a time
                    step = tl.full((), 1, tl.uint32) << shift.to(tl.uint32)
                    first, second, third = limit + step, limit + 2 * step, limit + 3 * step
                    counts = _reaching(ranks, lane < n, first, second, third)
                    for i in range(SETTLED, n, SETTLED):
                        pairs = tl.load(listed + i + lane, mask=i + lane < n, other=0, cache_modifier=".cg")
                        x, _ = _listed(pairs)
                        counts += _reaching(_ordered(x), i + lane < n, first, second, third)
                    one, two, three = _apart(counts)
                    limit = _of_highest(counts, k, limit, first, second, third)
                    reached = _of_highest(counts, k, reached, one, two, three)
                    shift -= 2
                least = tl.full((), float("inf"), tl.float32)
                for i in range(0, n, SETTLED):
                    pairs = tl.load(listed + i + lane, mask=i + lane < n, other=0, cache_modifier=".cg")
                    x, _ = _listed(pairs)
                    within = (i + lane < n) & (_ordered(x) >= limit)
                    least = tl.minimum(least, tl.min(tl.where(within, x, float("inf")), 0))
                tl.store(out + row, least)
            else:
                drawn = tl.where(lane < n, _noisy(x, token, row, scale, noise, rng), lowest)
                bound, larger = tl.zeros((), tl.uint32), tl.zeros((), tl.int32) + k
                while larger >= k:
                    winner, rank = tl.reduce((tl.where(ranks > bound, drawn, lowest), ranks), 0, _better)
                    for i in range(SETTLED, n, SETTLED):
                        pairs = tl.load(listed + i + lane, mask=i + lane < n, other=0, cache_modifier=".cg")
                        x, token = _listed(pairs)
                        more = (i + lane < n) & (_ordered(x) > bound)
                        next_drawn = tl.where(more, _noisy(x, token, row, scale, noise, rng), lowest)
                        next_drawn, next_rank = tl.reduce((next_drawn, _ordered(x)), 0, _better)
                        winner, rank = _better(winner, rank, next_drawn, next_rank)
                    larger = tl.sum(((lane < n) & (ranks > rank)).to(tl.int32), 0)
                    for i in range(SETTLED, n, SETTLED):
                        pairs = tl.load(listed + i + lane, mask=i + lane < n, other=0, cache_modifier=".cg")
                        x, _ = _listed(pairs)
                        larger += tl.sum(((i + lane < n) & (_ordered(x) > rank)).to(tl.int32), 0)
                    bound = rank
            tl.store(state, 0)
        else:
            blocks = tl.arange(0, BLOCKS2)
            winner = tl.max(tl.load(best + blocks, mask=blocks < BLOCKS, other=lowest, cache_modifier=".cg"), 0)
        tl.store(state + 1, 0)
        if rng is not None:
            winner = 0x7FFFFFFF - (winner & 0xFFFFFFFF)
            tl.store(out + row, winner)
            if history is not None:
                tl.store(pos + row, at)
                tl.store(history + row * width + at, winner)
            advance(rng, counters + 2 * tl.num_programs(0))
