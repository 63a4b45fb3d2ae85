"""How the next token is drawn: the Sampler, and sampling as torch ops (gptfast::sample, floor and judge).

Softmax sampling is argmax over logits / temperature + Gumbel noise. On an NVIDIA GPU that is one Triton kernel, or two
where top_k or min_p leave tokens out, without sorting the vocabulary; otherwise the plain PyTorch reference beside it.
Both draw the same tokens. top_p sorts what top_k leaves, in PyTorch.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from kernels import is_hopper, op, tl, tlx, triton, zeros


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn. temperature 0 is argmax; the filters apply in the order of the fields."""

    repetition_penalty: float = 1.0  # CTRL's (arXiv 1909.05858), over the prompt and the answer
    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float | None = None  # nucleus sampling (arXiv 1904.09751)
    min_p: float | None = None  # tokens at least min_p times as likely as the likeliest (arXiv 2407.01082)

    def __post_init__(self):
        for name, value, low, high in (
            ("temperature", self.temperature, 0, 100),
            ("top_k", self.top_k, 1, 2**31 - 1),
            ("top_p", self.top_p, 1e-9, 1),
            ("min_p", self.min_p, 0, 1),
            ("repetition_penalty", self.repetition_penalty, 1e-3, 100),
        ):
            if value is not None and not low <= value <= high:
                raise UserError(f"{name} is {value}; accepted: {low} to {high}")
        if self.temperature < 1e-6:  # by which no logits could be divided
            object.__setattr__(self, "temperature", 0.0)

    def __call__(self, logits: Tensor, history: Tensor, pos: Tensor, rng: Tensor) -> Tensor:
        """Draw a token for each row, write it behind the row's position and advance that. logits: fp32 (B, V); history:
        (B, T) int64, tokens known at positions 0..pos; pos: (B,) int64; rng: int64 (2,), seed and offset, which
        advances. Returns (B,) int64.
        """
        return self.draw(self.penalized(logits, history, pos), rng, history, pos)

    def penalized(self, logits: Tensor, history: Tensor, pos: Tensor) -> Tensor:
        """The logits after the repetition penalty; arguments and result as above."""
        if self.repetition_penalty == 1.0:
            return logits
        known = torch.arange(history.shape[1], device=history.device) <= pos[:, None]
        index = torch.where(known, history, history[:, :1])
        score = logits.gather(1, index)
        score = torch.where(score < 0, score * self.repetition_penalty, score / self.repetition_penalty)
        return logits.scatter(1, index, score)

    def draw(self, logits: Tensor, rng: Tensor, history: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """Draw a token (B,) for each row of penalised logits (B, V); see `sample`."""
        top_k, min_p = self.top_k or 0, self.min_p or 0.0
        if (self.top_p or 1) < 1 and self.temperature > 0:  # the floor is that of all filters
            logits, top_k, min_p = logits.masked_fill(logits < self._floor(logits), -torch.inf), 0, 0.0
        return sample(logits, self.temperature, top_k, min_p, rng, history, pos)

    def judge(self, logits: Tensor, draft_logits: Tensor, guesses: Tensor, rng: Tensor) -> Tensor:
        """Judge guesses int64 (B, k), drawn by `draw` from draft_logits (B, k, V), by penalised logits (B (k + 1), V):
        int64 (B, k + 1), each guess or what is drawn in its place, and a token that follows them. Temperature > 0.
        """
        both = torch.cat((logits, draft_logits.flatten(0, 1)))
        return judge(both, self._floor(both), guesses, self.temperature, rng)

    def _floor(self, logits: Tensor) -> Tensor:
        """The smallest logit (B, 1) that the filters keep: min_p's, top_k's, and top_p's among the top_k."""
        least = floor(logits, self.temperature, self.top_k or 0, self.min_p or 0.0)
        if (self.top_p or 1) < 1:
            values = torch.topk(logits, min(self.top_k or logits.shape[1], logits.shape[1])).values
            probs = torch.softmax(values / self.temperature, -1)
            inside = probs.cumsum(-1) - probs < self.top_p  # the token that crosses top_p belongs to it
            least = torch.maximum(least, values.gather(1, inside.sum(-1, keepdim=True) - 1))
        return least


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
    if triton is None or not logits.is_cuda:
        return sample_reference(logits, temperature, top_k, min_p, rng, history, pos)
    return sample_triton(logits.contiguous(), temperature, top_k, min_p, rng, history, pos)


@torch.library.register_fake("gptfast::sample")
def _(logits, temperature, top_k, min_p, rng, history=None, pos=None):
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


def sample_reference(logits, temperature, top_k, min_p, rng, history=None, pos=None):
    noisy = logits
    if temperature > 0:
        row, token = (logits >= floor_reference(logits, temperature, top_k, min_p)).nonzero(as_tuple=True)
        noisy = torch.full_like(logits, -math.inf)
        noisy[row, token] = logits[row, token] / temperature + gumbel(rng, row, token)
    drawn = noisy.argmax(-1)  # the lowest index of equals
    rng[1] += 1
    if history is not None:
        history.scatter_(1, pos.add_(1)[:, None], drawn[:, None])
    return drawn


@op("floor")
def floor(logits: Tensor, temperature: float, top_k: int, min_p: float) -> Tensor:
    """The smallest logit of each row of logits fp32 (B, V) that `sample` may draw, fp32 (B, 1); temperature > 0."""
    if triton is None or not logits.is_cuda:
        return floor_reference(logits, temperature, top_k, min_p)
    return floor_triton(logits.contiguous(), temperature, top_k, min_p)


@torch.library.register_fake("gptfast::floor")
def _(logits, temperature, top_k, min_p):
    return logits.new_empty(len(logits), 1)


def floor_reference(logits, temperature, top_k, min_p):
    values = torch.topk(logits, min(top_k or 1, logits.shape[1])).values
    least = values[:, :1] + (temperature * math.log(min_p) if min_p > 0 else -math.inf)
    return torch.maximum(least, values[:, -1:]) if top_k else least


@op("judge", mutates=("rng",))
def judge(logits: Tensor, floors: Tensor, guesses: Tensor, temperature: float, rng: Tensor) -> Tensor:
    """Speculative sampling (Leviathan et al., arXiv 2211.17192): a guess x, drawn from q, holds with probability
    min(1, p(x) / q(x)), and else gives way to a draw from max(0, p - q); after the guesses comes a draw from p.

    logits fp32 (B (k + 1) + B k, V), of p and then of q, whose tokens below floors (.., 1) are left out; guesses int64
    (B, k); rng as `sample`'s. Returns int64 (B, k + 1).
    """
    if triton is None or not logits.is_cuda:
        token = judge_reference(logits, floors, guesses, temperature, rng)
        rng[1] += 1
        return token
    return judge_triton(logits.contiguous(), floors, guesses.contiguous(), temperature, rng)


@torch.library.register_fake("gptfast::judge")
def _(logits, floors, guesses, temperature, rng):
    return guesses.new_empty(guesses.shape[0], guesses.shape[1] + 1)


def judge_reference(logits, floors, guesses, temperature, rng):
    B, k = guesses.shape
    probs = torch.softmax(logits.masked_fill(logits < floors, -math.inf) / temperature, -1)
    p, q = probs[: B * (k + 1)].view(B, k + 1, -1), probs[B * (k + 1) :].view(B, k, -1)
    q, guesses = F.pad(q, (0, 0, 0, 1)), F.pad(guesses, (0, 1))  # nothing is guessed after the last
    chance = (p.gather(2, guesses[..., None]) / q.gather(2, guesses[..., None]).clamp(min=1e-30)).clamp(max=1)[..., 0]
    chance[:, k] = 0
    mass = (p - q).clamp(min=0).cumsum(2)
    row, place = torch.meshgrid(*(torch.arange(n, device=logits.device) for n in (B, k + 1)), indexing="ij")
    u = uniform(rng, row, place)
    # one draw serves both: what is left of u where it refuses the guess is uniform again
    sought = (u - chance) / (1 - chance).clamp(min=1e-30) * mass[..., -1]
    drawn = ((mass > sought[..., None]) | (mass == mass[..., -1:])).int().argmax(2)
    return torch.where(u < chance, guesses, drawn)


def gumbel(rng: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise of each (row, token) under rng (seed, offset): softmax sampling is argmax(logits + it)."""
    u = uniform(rng, row, token)
    # -log(1 - u), but exact where u is small, which is where the large noise comes from
    return -torch.log(torch.where(u < 0.01, u * (1 + u * (0.5 + u / 3)), -torch.log(1 - u)))


def uniform(rng: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """Uniform numbers fp32 above 0 and below 1, one for each (row, token) under rng (seed, offset).

    Philox4x32-10 (Salmon et al., SC 2011), keyed by the seed and counting (token, row, offset), so that the GPU and the
    CPU draw the same tokens and a draw does not depend on how the work is split.
    """
    low32 = 0xFFFFFFFF
    seed, offset = rng.tolist()
    k0, k1 = seed & low32, seed >> 32 & low32
    c0, c1 = (t.cpu().numpy().astype(np.uint64) for t in (token, row))  # PyTorch has no arithmetic on uint64
    c2, c3 = (np.full_like(c0, word) for word in (offset & low32, offset >> 32 & low32))
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & low32, p0 >> 32 ^ c3 ^ k1, p0 & low32
        k0, k1 = k0 + 0x9E3779B9 & low32, k1 + 0xBB67AE85 & low32
    u = (torch.from_numpy(c0.astype(np.int64)).to(token.device).float() + 0.5) * 2.0**-32
    return u.clamp(max=1 - 2.0**-24)


def sample_triton(logits, temperature, top_k, min_p, rng, history=None, pos=None):
    """Two launches, or one where every token is in: logits fp32 (B, V), history and pos contiguous."""
    how = (temperature, top_k, min_p, rng, 1.0) if temperature > 0 else (1.0, 0, 0.0, rng, 0.0)
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    return _sample(out, logits, *how, history, pos)


def floor_triton(logits, temperature, top_k, min_p):
    """As sample_triton, without the draw."""
    out = torch.full((len(logits), 1), -math.inf, device=logits.device)
    return _sample(out, logits, temperature, top_k, min_p) if 0 < top_k < logits.shape[1] or min_p > 0 else out


def _sample(out, logits, temperature, top_k, min_p, rng=None, noise=0.0, history=None, pos=None):
    B, V = logits.shape
    device, hopper = logits.device, is_hopper(logits.device)
    k = top_k if 0 < top_k < V else V
    margin = temperature * math.log(min_p) if min_p > 0 else -math.inf
    filtered = k < V or margin > -math.inf
    block = 1024
    # Twice as many maxima as wanted, or more, leave few tokens to settle; but every program holds all of them.
    part = 2 ** min(8, max(3, int(math.log2(max(1, V // (2 * k))))))
    blocks, count = triton.cdiv(V, block), triton.cdiv(V, part)
    maxima = torch.empty(B, count if filtered else 0, dtype=torch.float32, device=device)
    best = torch.empty(B, blocks, dtype=torch.int64, device=device)
    listed = torch.empty(B, V if filtered else 0, dtype=torch.int32, device=device)
    options = {"BLOCK": block, "COUNT": count, "PDL": hopper, **({"launch_pdl": True} if hopper else {})}
    if filtered:
        _maxima_kernel[(B, blocks)](logits, maxima, V, PART=part, num_warps=4, **options)
    _sample_kernel[(B, blocks)](
        out, logits, rng, zeros(device, 2 * B + 1), maxima, best, listed, history, pos,
        0 if history is None else history.shape[1], V, k, 1 / temperature, noise, margin,
        BLOCKS=blocks, BLOCKS2=triton.next_power_of_2(blocks), COUNT2=triton.next_power_of_2(count), FILTER=filtered,
        num_warps=8, **options,
    )  # fmt: skip
    return out


def judge_triton(logits, floors, guesses, temperature, rng):
    """One launch: logits fp32 (B (k + 1) + B k, V) and guesses int64 (B, k), both contiguous."""
    (B, k), V, hopper = guesses.shape, logits.shape[1], is_hopper(logits.device)
    out = torch.empty(B, k + 1, dtype=torch.int64, device=logits.device)
    block = 4096
    _judge_kernel[(B * (k + 1),)](
        out, logits, floors, guesses, rng, zeros(logits.device, 1), V, k, 1 / temperature,
        BLOCK=block, BLOCKS=triton.next_power_of_2(triton.cdiv(V, block)), PDL=hopper,
        num_warps=16, **({"launch_pdl": True} if hopper else {}),
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _ordered(x):
        """fp32 as uint32 in the same order; -0 as +0."""
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)

    @triton.jit
    def _reaching(ranks, valid, limit, shift):
        """How many valid ranks reach the limit with 1, 2 or 3 in the two bits at `shift`: three counts of 21 bits."""
        step = tl.full((), 1, tl.uint32) << shift
        one = (valid & (ranks >= limit + step)).to(tl.int64)
        two = (valid & (ranks >= limit + 2 * step)).to(tl.int64)
        three = (valid & (ranks >= limit + 3 * step)).to(tl.int64)
        return tl.sum(one + (two << 21) + (three << 42), 0)

    @triton.jit
    def _raised(limit, reached, counts, k, shift):
        """The limit with the most in its two bits at `shift` that k ranks still reach, and how many do; reached: how
        many reach the limit as it is."""
        ONE: tl.constexpr = 0x1FFFFF
        one, two, three = counts & ONE, counts >> 21 & ONE, counts >> 42
        most = (one >= k).to(tl.uint32) + (two >= k).to(tl.uint32) + (three >= k).to(tl.uint32)
        reached = tl.where(three >= k, three, tl.where(two >= k, two, tl.where(one >= k, one, reached)))
        return limit + (most << shift), reached

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
    def _uniform(rng, row, token):
        offset = tl.load(rng + 1)
        zero = token * 0
        low = (offset & 0xFFFFFFFF).to(tl.uint32) + zero.to(tl.uint32)
        high = (offset >> 32 & 0xFFFFFFFF).to(tl.uint32) + zero.to(tl.uint32)
        word, _, _, _ = tl.philox(tl.load(rng), token.to(tl.uint32), (row + zero).to(tl.uint32), low, high)
        return tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)

    @triton.jit
    def _noisy(x, token, row, scale, noise, rng):
        """The score x * scale + noise * Gumbel, ordered, in the high half of an int64 and the token, reversed, in the
        low half: the largest is the sample, and of equals the lowest token. See `gumbel`."""
        u = _uniform(rng, row, token)
        exponential = tl.where(u < 0.01, u * (1 + u * (0.5 + u / 3)), -tl.log(1 - u))
        bits = (x * scale - noise * tl.log(exponential) + 0.0).to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        return (bits.to(tl.int64) << 32) + (0x7FFFFFFF - token).to(tl.int64)

    @triton.jit
    def _sample_kernel(
        out, logits, rng, counters, maxima, best, listed, history, pos, width, V, k, scale, noise, margin,
        BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS2: tl.constexpr, COUNT: tl.constexpr, COUNT2: tl.constexpr,
        FILTER: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Draw from the tokens of a block or, if FILTER, list those that may be in: at least as large as the k-th
        largest of the maxima, which is at most the k-th largest logit. The last program of a row settles the rest.
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
            largest = tl.max(tops, 0)
            floor = largest + margin  # min_p's limit
            largest = _ordered(largest)
            tops = _ordered(tops)
            # the largest limit that k of them reach, in its upper 16 bits
            limit, shift = _common(largest, tl.min(tl.where(part < COUNT, tops, largest), 0))
            reached = tl.full((), COUNT, tl.int64)
            limit = tl.where(reached < k, tl.zeros((), tl.uint32), limit)  # too few to tell: all may be in
            while (shift >= 16) & (reached > k):
                counts = _reaching(tops, part < COUNT, limit, shift.to(tl.uint32))
                limit, reached = _raised(limit, reached, counts, k, shift.to(tl.uint32))
                shift -= 2
            kept = (token < V) & (_ordered(x) >= limit) & (x >= floor)
            count = tl.sum(kept.to(tl.int32), 0)
            if count > 0:
                place = tl.atomic_add(state, count, sem="relaxed") + tl.cumsum(kept.to(tl.int32), 0) - 1
                tl.store(listed + place, token, mask=kept)
        else:
            drawn = tl.where(token < V, _noisy(x, token, row, scale, noise, rng), lowest)
            tl.store(best + block, tl.max(drawn, 0))
        tl.debug_barrier()  # all of this program's stores before its arrival
        if tl.atomic_add(state + 1, 1, sem="acq_rel") != BLOCKS - 1:
            return
        tl.debug_barrier()

        if FILTER:
            n = tl.load(state, cache_modifier=".cg")
            token = tl.load(listed + lane, mask=lane < n, other=0, cache_modifier=".cg")  # in general these are all
            x = tl.load(logits + token)
            ranks = _ordered(x)
            limit, shift = _common(largest, limit)  # which all of them reach
            reached = n.to(tl.int64)
            while (shift >= 0) & (reached > k):
                counts = _reaching(ranks, lane < n, limit, shift.to(tl.uint32))
                for i in range(BLOCK, n, BLOCK):
                    more = tl.load(listed + i + lane, mask=i + lane < n, other=0, cache_modifier=".cg")
                    counts += _reaching(_ordered(tl.load(logits + more)), i + lane < n, limit, shift.to(tl.uint32))
                limit, reached = _raised(limit, reached, counts, k, shift.to(tl.uint32))
                shift -= 2
            winner = tl.full((), lowest, tl.int64)
            least = tl.full((), float("inf"), tl.float32)
            for i in range(0, n, BLOCK):
                more = tl.load(listed + i + lane, mask=i + lane < n, other=0, cache_modifier=".cg")
                x = tl.load(logits + more)
                kept = (i + lane < n) & (_ordered(x) >= limit)
                if rng is None:
                    least = tl.minimum(least, tl.min(tl.where(kept, x, float("inf")), 0))
                else:
                    drawn = tl.where(kept, _noisy(x, more, row, scale, noise, rng), lowest)
                    winner = tl.maximum(winner, tl.max(drawn, 0))
            tl.store(state, 0)
            if rng is None:
                tl.store(out + row, least)
        else:
            blocks = tl.arange(0, BLOCKS2)
            winner = tl.max(tl.load(best + blocks, mask=blocks < BLOCKS, other=lowest, cache_modifier=".cg"), 0)
        tl.store(state + 1, 0)
        if rng is not None:
            winner = 0x7FFFFFFF - (winner & 0xFFFFFFFF)
            tl.store(out + row, winner)
            if history is not None:
                at = tl.load(pos + row) + 1
                tl.store(pos + row, at)
                tl.store(history + row * width + at, winner)
            _advance(rng, counters + 2 * tl.num_programs(0))

    @triton.jit
    def _advance(rng, done):
        """Count a draw, when the last of program_id(0) is through."""
        if tl.atomic_add(done, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.store(done, 0)
            tl.store(rng + 1, tl.load(rng + 1) + 1)

    @triton.jit
    def _scaled(logits, token, V, floor, scale):
        x = tl.load(logits + token, mask=token < V, other=float("-inf"))
        return tl.where(x >= floor, x * scale, float("-inf"))

    @triton.jit
    def _probability(logits, token, V, floor, scale, top, total):
        return tl.exp(_scaled(logits, token, V, floor, scale) - top) / total

    @triton.jit
    def _fold(top, total, x):
        """The running maximum, and the sum of exp(x - maximum), of each lane, with one more x in them."""
        new_top = tl.maximum(top, x)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        return new_top, total * tl.exp(top - safe) + tl.exp(x - safe)

    @triton.jit
    def _judge_kernel(
        out, logits, floors, guesses, rng, done, V, k, scale, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        """One guess, or what follows the last, a program: see `judge` and `judge_reference`."""
        row = tl.program_id(0)
        place = row % (k + 1)
        guessed = place < k
        guess_of = row // (k + 1) * k + tl.minimum(place, k - 1)
        if PDL:
            tlx.gdc_launch_dependents()
            tlx.gdc_wait()
        p_logits = logits + row.to(tl.int64) * V
        q_row = tl.num_programs(0) + guess_of
        q_logits = logits + q_row.to(tl.int64) * V
        p_floor = tl.load(floors + row)
        q_floor = tl.where(guessed, tl.load(floors + q_row), float("inf"))  # no q: p is what is left
        lane = tl.arange(0, BLOCK)
        p_top = tl.full((BLOCK,), float("-inf"), tl.float32)
        q_top = p_top
        p_total = tl.zeros((BLOCK,), tl.float32)
        q_total = p_total
        for start in range(0, V, BLOCK):
            p_top, p_total = _fold(p_top, p_total, _scaled(p_logits, start + lane, V, p_floor, scale))
            q_top, q_total = _fold(q_top, q_total, _scaled(q_logits, start + lane, V, q_floor, scale))
        p_max = tl.max(p_top, 0)
        q_max = tl.where(guessed, tl.max(q_top, 0), 0.0)
        p_total = tl.sum(p_total * tl.exp(p_top - p_max), 0)
        q_total = tl.where(guessed, tl.sum(q_total * tl.exp(q_top - q_max), 0), 1.0)

        masses = tl.zeros((BLOCKS,), tl.float32)
        part = tl.arange(0, BLOCKS)
        for n in range(tl.cdiv(V, BLOCK)):
            p = _probability(p_logits, n * BLOCK + lane, V, p_floor, scale, p_max, p_total)
            q = _probability(q_logits, n * BLOCK + lane, V, q_floor, scale, q_max, q_total)
            masses = tl.where(part == n, tl.sum(tl.maximum(p - q, 0.0), 0), masses)
        guess = tl.load(guesses + guess_of)
        p = _probability(p_logits, guess, V, p_floor, scale, p_max, p_total)
        q = _probability(q_logits, guess, V, q_floor, scale, q_max, q_total)
        chance = tl.where(guessed, tl.minimum(p / tl.maximum(q, 1e-30), 1.0), 0.0)
        one = tl.zeros((1,), tl.int32)
        u = tl.max(_uniform(rng, row // (k + 1) + one, place + one), 0)
        upto = tl.cumsum(masses, 0)  # rounding may let it grow, or shrink, where there is no mass
        sought = (u - chance) / tl.maximum(1 - chance, 1e-30) * tl.max(upto, 0)
        some = masses > 0
        n = tl.min(
            tl.where(some & (upto > sought), part, tl.max(tl.where(some, part, 0), 0)), 0
        )  # the block to look in
        sought -= tl.max(tl.where(part < n, upto, 0.0), 0)
        token = n * BLOCK + lane
        p = _probability(p_logits, token, V, p_floor, scale, p_max, p_total)
        q = _probability(q_logits, token, V, q_floor, scale, q_max, q_total)
        rest = tl.maximum(p - q, 0.0)
        found = tl.min(tl.where((rest > 0) & (tl.cumsum(rest, 0) > sought), token, V), 0)
        last = tl.max(tl.where(rest > 0, token, 0), 0)  # which rounding may not let the sum get past
        tl.store(out + row, tl.where(u < chance, guess, tl.minimum(found, last)))
        _advance(rng, done)
