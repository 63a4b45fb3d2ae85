"""Which experts one row of x meets, on an NVIDIA GPU: each program that needs them finds them by itself, from scores
that other programs have just sent, or still are to.

    supports(rows, top)                 whether this is the way
    scoreboard(device, E)               where scores are, and which have yet to come
    send, clear                         some experts' scores, for all programs; none is there any more
    choose, weigh, expert_of, weight_of the experts of all slots, greatest score first, and their weights
    choice(...), shares(...)            PTX for the two that look at scores, for Hopper

A score says by itself that it is there: its last bit is 0, where one that is missing has a 1. So a kernel that chooses
need not wait until the one that scores has ended (.4 us less a layer of Qwen3-30B-A3B, on an H200). Each warp finds the
same by itself, as whole numbers with the expert's index in the last bits, of which it has the maximum in one
instruction; other GPUs and the interpreter, where kernels wait for each other, do it in plain Triton.
"""

import functools

import torch
from torch import Tensor

from ops.common import tl, triton

if triton is None:
    send = clear = choose = weigh = expert_of = weight_of = None
else:
    COPIES = tl.constexpr(8)  # of scores, or so many warps that look for them would be in each other's way
    MISSING = tl.constexpr(1)
    OF_LANE = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;")

    @triton.jit
    def _places(board, e, E):
        """Where the scores of experts e are, (COPIES, len(e)), and which of those exist."""
        at = board + tl.arange(0, COPIES)[:, None] * E + e[None, :]
        return at, tl.broadcast_to((e < E)[None, :], at.shape)

    @triton.jit
    def send(board, score, e, E):
        """Put fp32 scores of experts e where all programs look."""
        at, there = _places(board, e, E)
        score = (score.to(tl.int32, bitcast=True) & ~MISSING).to(tl.float32, bitcast=True)
        tl.store(at, tl.broadcast_to(score[None, :], at.shape), there)

    @triton.jit
    def clear(board, E, EXPERTS: tl.constexpr):
        """From now on all are missing."""
        at, there = _places(board, tl.arange(0, EXPERTS), E)
        tl.store(at, tl.full(at.shape, MISSING, tl.int32).to(tl.float32, bitcast=True), there)

    @triton.jit
    def choose(
        board, program, E, TOP: tl.constexpr, EXPERTS: tl.constexpr, W: tl.constexpr, CHOICE: tl.constexpr
    ):  # fmt: skip
        """The greatest scores, of equal ones the first, for the functions below: each expert's slot, TOP for the
        others, its index and its score, (W, EXPERTS), or what `choice` says."""
        if CHOICE is not None:
            copy = board.to(tl.int64) + program % COPIES * (E * 4)
            slots, indices, scores = tl.inline_asm_elementwise(
                CHOICE, "=&r,=&f,=&f,l", [copy], (tl.int32, tl.float32, tl.float32), is_pure=False, pack=1
            )
        else:
            LEAST: tl.constexpr = -(2**31)
            indices = tl.broadcast_to(tl.arange(0, EXPERTS)[None, :], (W, EXPERTS))
            scores = tl.load(board + indices, indices < E, other=float("-inf"), cache_modifier=".cg")
            scores = tl.where(scores == scores, scores, float("-inf"))  # a NaN still is an expert
            key = scores.to(tl.int32, bitcast=True)
            key ^= (key >> 31) & 0x7FFFFFFF  # in the order of floats
            key = tl.where(indices < E, (key & -EXPERTS) | (EXPERTS - 1 - indices), LEAST + TOP)
            for turn in tl.static_range(TOP):
                key = tl.where(key == tl.max(key, 1)[:, None], LEAST + turn, key)
            slots = tl.where(key < LEAST + TOP, key - LEAST, TOP)
        return slots, indices, scores

    @triton.jit
    def weigh(
        slots, indices, scores, used, weights, program, TOP: tl.constexpr, RENORMALIZE: tl.constexpr,
        SHARES: tl.constexpr,
    ):  # fmt: skip
        """The weights of what `choose` has found. Program 0 also writes TOP and the experts, used int32 (1 + TOP), and
        their weights fp32 (TOP,)."""
        if SHARES is not None:
            arguments = [slots, indices, scores, used.to(tl.int64), weights.to(tl.int64), program]
            p = tl.inline_asm_elementwise(SHARES, "=&r,r,f,f,l,l,r", arguments, tl.int32, is_pure=False, pack=1)
        else:
            p = tl.exp(scores - tl.max(scores, 1)[:, None])
            p /= tl.sum(tl.where(slots < TOP, p, 0.0) if RENORMALIZE else p, 1)[:, None]
            if program == 0:
                tl.store(used, TOP)
                tl.store(used + 1 + slots, indices, slots < TOP)
                tl.store(weights + slots, p, slots < TOP)
        return p

    @triton.jit
    def expert_of(slots, indices, slot, EXPERTS: tl.constexpr, CHOICE: tl.constexpr):
        """The expert of a slot."""
        if CHOICE is not None:
            key = tl.inline_asm_elementwise(OF_LANE, "=r,r,r", [slots, slot], tl.int32, is_pure=False, pack=1)
            expert = EXPERTS - 1 - (key & (EXPERTS - 1))
        else:
            expert = tl.max(tl.max(tl.where(slots == slot, indices, 0), 1), 0)
        return expert

    @triton.jit
    def weight_of(slots, p, slot, SHARES: tl.constexpr):
        """The weight of a slot, of what `weigh` has found."""
        if SHARES is not None:
            weight = tl.inline_asm_elementwise(OF_LANE, "=r,r,r", [p, slot], tl.int32, is_pure=False, pack=1)
            weight = weight.to(tl.float32, bitcast=True)
        else:
            weight = tl.max(tl.sum(tl.where(slots == slot, p, 0.0), 1), 0)
        return weight


def supports(rows: int, top: int) -> bool:
    """Whether this is how so many rows find so many experts each."""
    return rows == 1 and top <= 32  # a warp's lanes


@functools.cache
def scoreboard(device: torch.device, E: int) -> Tensor:
    """fp32 (COPIES, E), on which all scores are missing before a layer and after it. One stream of a device may use it
    at a time."""
    missing = torch.full((COPIES.value, E), MISSING.value, dtype=torch.int32, device=device)
    return missing.view(torch.float32)


@functools.cache
def choice(top: int, experts: int, E: int) -> str:
    """PTX that waits for the scores at $3 of E experts, `experts` being the next power of two. Of the `top` greatest it
    gives lane i the key of slot i, $0, and all lanes the greatest score, $2. $1 is a lane's part of the sum of e to the
    power of scores less that one. Lane i has experts i, i + 32, ..."""
    n = max(1, experts // 32)
    lines = [f".reg .pred p; .reg .b32 k<{n}>, m, t, lane; .reg .f32 v<{n}>; .reg .b64 at;"]
    lines += ["mov.u32 lane, %laneid; mad.wide.s32 at, lane, 4, $3; again: mov.b32 t, 0;"]
    for i in range(n):
        load = f"@p ld.relaxed.gpu.global.b32 k{i}, [at+{128 * i}];"
        lines += [f"setp.lt.s32 p, lane, {E - 32 * i}; mov.b32 k{i}, 0xff800000; {load}"]
    lines += [f"or.b32 t, t, k{i};" for i in range(n)]
    # All lanes leave together, or ptxas makes all that follows twice, for warps whose lanes did not.
    lines += ["redux.sync.or.b32 t, t, 0xffffffff; and.b32 t, t, 1; setp.ne.s32 p, t, 0; @p bra again;"]
    for i in range(n):  # see `choose`
        lines += [
            f"mov.b32 v{i}, k{i}; setp.nan.f32 p, v{i}, v{i}; @p mov.f32 v{i}, 0fff800000; mov.b32 k{i}, v{i};",
            f"shr.s32 t, k{i}, 31; and.b32 t, t, 0x7fffffff; xor.b32 k{i}, k{i}, t; and.b32 k{i}, k{i}, {-experts};",
            f"sub.s32 t, {experts - 1 - 32 * i}, lane; or.b32 k{i}, k{i}, t;",
            f"setp.ge.s32 p, lane, {E - 32 * i}; @p mov.b32 k{i}, 0x80000000;",
        ]
    lines += ["mov.b32 $0, 0x80000000;"]
    for turn in range(top):
        lines += ["mov.b32 t, k0;", *(f"max.s32 t, t, k{i};" for i in range(1, n))]
        lines += [f"redux.sync.max.s32 m, t, 0xffffffff; setp.eq.s32 p, lane, {turn}; @p mov.b32 $0, m;"]
        lines += [f"setp.eq.s32 p, k{i}, m; @p mov.b32 k{i}, 0x80000000;" for i in range(n)]
        if turn == 0:
            lines += [_score("$2", "m", experts), "mov.f32 $1, 0f00000000;"]
    lines += [f"sub.f32 v{i}, v{i}, $2; {_exp(f'v{i}')} add.f32 $1, $1, v{i};" for i in range(n)]
    return "{ " + " ".join(lines) + " }"


@functools.cache
def shares(top: int, experts: int, renormalize: bool) -> str:
    """PTX that gives lane i the weight of slot i, $0, of what `choice` has found, $1 to $3. Program $6 = 0 also writes
    used at $4 and weights at $5, before kernels that depend on this one."""
    low = experts - 1
    lines = [
        ".reg .pred p, q; .reg .b32 t, lane; .reg .f32 w, u, sum; .reg .b64 at; mov.u32 lane, %laneid;",
        f"{_score('w', '$1', experts)} sub.f32 w, w, $3; {_exp('w')} setp.lt.s32 q, lane, {top};",
        f"@!q mov.f32 w, 0f00000000; mov.f32 sum, {'w' if renormalize else '$2'};",
        *(f"shfl.sync.bfly.b32 u, sum, {1 << i}, 31, 0xffffffff; add.f32 sum, sum, u;" for i in range(5)),
        "div.full.f32 $0, w, sum; setp.eq.s32 p, $6, 0; and.pred q, p, q;",
        f"and.b32 t, $1, {low}; sub.s32 t, {low}, t; mad.wide.s32 at, lane, 4, $4; @q st.global.b32 [at+4], t;",
        "mad.wide.s32 at, lane, 4, $5; @q st.global.f32 [at], $0;",
        # Each warp does, as the first one that goes on has other kernels come up.
        f"mov.b32 t, {top}; setp.eq.and.s32 q, lane, 0, q; @q st.global.b32 [$4], t; @p fence.acq_rel.gpu;",
    ]
    return "{ " + " ".join(lines) + " }"


def _score(to: str, key: str, experts: int) -> str:
    """PTX: the score that a key is of."""
    return (
        f"{{ .reg .b32 s, u; shr.s32 s, {key}, 31; and.b32 u, s, {experts - 1}; lop3.b32 u, {key}, {-experts}, u, 0xea;"
        f"and.b32 s, s, 0x7fffffff; xor.b32 u, u, s; mov.b32 {to}, u; }}"
    )


def _exp(x: str) -> str:
    """PTX: x = e to the power of x."""
    return f"mul.f32 {x}, {x}, 0f3fb8aa3b; ex2.approx.f32 {x}, {x};"
