"""Which experts one row of x meets, on an NVIDIA GPU, without a kernel for it: the linear layer whose result x is adds
up the router's scores of its own features, and each program that needs experts finds them by itself.

    Router                              what these two know of each other
    add, clear                          a program's share of all scores; none is there any more
    choose, weigh, expert_of, weight_of the experts of all slots, greatest score first, and their weights
    choice(...), shares(...)            PTX for the two that look at scores, for Hopper

Scores are sums of gate times gain times x, and become those of the norm of x when its squares are all known, which are
added up beside them. All are added as whole numbers, in whatever order, and so are the same from run to run. Each warp
finds the same experts by itself, as whole numbers with the expert's index in the last bits, of which it has the maximum
in one instruction; other GPUs and the interpreter do it in plain Triton.
"""

import functools
import struct

import torch
from torch import Tensor

from ops.common import tl, triton

COPIES = 2  # of sums, which as many programs would otherwise add to at the same place
UNIT = 2.0**-32  # of scores
# Of squares there are two sums: the first one, of small ones, is in the second one's place below a limit.
SMALL, LARGE, LIMIT = 2.0**-44, 2.0**-20, 2.0**18

if triton is None:
    add = clear = squares = choose = weigh = expert_of = weight_of = None
else:
    _COPIES, _UNIT, _SMALL, _LARGE, _LIMIT = (tl.constexpr(value) for value in (COPIES, UNIT, SMALL, LARGE, LIMIT))
    OF_LANE = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;")

    @triton.jit
    def add(sums, x, gate, gain, program, E, EXPERTS: tl.constexpr):
        """What features x (F,) add to sums (COPIES, E + 2): gate (EXPERTS, F), gain (F,)."""
        e, n = tl.arange(0, EXPERTS), tl.arange(0, 2)
        to = sums + program % _COPIES * (E + 2)
        score = tl.sum(gate.to(tl.float32) * (gain.to(tl.float32) * x)[None, :], 1)
        tl.atomic_add(to + e, (score * (1.0 / _UNIT)).to(tl.int64), e < E, sem="relaxed")
        square = tl.minimum(tl.sum(x * x, 0) * tl.where(n == 0, 1.0 / _SMALL, 1.0 / _LARGE), 2.0**62)
        tl.atomic_add(to + E + n, square.to(tl.int64), sem="relaxed")

    @triton.jit
    def clear(sums, E, EXPERTS: tl.constexpr):
        """Begin anew."""
        at = tl.arange(0, EXPERTS * 4 * _COPIES)
        tl.store(sums + at, tl.zeros(at.shape, tl.int64), at < (E + 2) * _COPIES)

    @triton.jit
    def _sum(sums, e, there, E):
        """A sum of all copies."""
        out = tl.load(sums + e, there, other=0, cache_modifier=".cg")
        for copy in tl.static_range(1, _COPIES):
            out += tl.load(sums + copy * (E + 2) + e, there, other=0, cache_modifier=".cg")
        return out.to(tl.float32)

    @triton.jit
    def squares(sums, E):
        """The sum of the row's squares."""
        large = _sum(sums, E + 1, True, E) * _LARGE
        return tl.where(large < _LIMIT, _sum(sums, E, True, E) * _SMALL, large)

    @triton.jit
    def choose(
        sums, shifts, eps, E, C, TOP: tl.constexpr, EXPERTS: tl.constexpr, W: tl.constexpr, CHOICE: tl.constexpr
    ):  # fmt: skip
        """The greatest scores of a row of C features, of equal ones the first, for the functions below: each expert's
        slot, TOP for the others, its index and its score, (W, EXPERTS), or what `choice` says. shifts fp32 (E,)."""
        if CHOICE is not None:
            biases = tl.full((), 0, tl.int64)
            if shifts is not None:
                biases = shifts.to(tl.int64)
            arguments = [sums.to(tl.int64), biases, eps.to(tl.float32)]
            slots, indices, scores = tl.inline_asm_elementwise(
                CHOICE, "=&r,=&f,=&f,l,l,f", arguments, (tl.int32, tl.float32, tl.float32), is_pure=False, pack=1
            )
        else:
            LEAST: tl.constexpr = -(2**31)
            indices = tl.broadcast_to(tl.arange(0, EXPERTS)[None, :], (W, EXPERTS))
            scores = _sum(sums, indices, indices < E, E) * (tl.rsqrt(squares(sums, E) / C + eps) * _UNIT)
            if shifts is not None:
                scores += tl.load(shifts + indices, indices < E, other=0.0)
            scores = tl.where((indices < E) & (scores == scores), scores, float("-inf"))  # a NaN still is an expert
            key = scores.to(tl.int32, bitcast=True) & -EXPERTS
            scores = key.to(tl.float32, bitcast=True)
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


MOST = 32  # experts that are found so: a warp's lanes


@functools.cache
def _sums(device: torch.device, E: int) -> Tensor:
    """int64 (COPIES, E + 2), zero between layers. One stream of a device may use them at a time."""
    return torch.zeros(COPIES, E + 2, dtype=torch.int64, device=device)


class Router:
    """What a linear layer is told of the mixture that reads its result."""

    def __init__(self, gate: Tensor, bias: Tensor | None, gain: Tensor):
        self.gate, self.gain, self.shifts = gate, gain, None if bias is None else bias.float()
        self.sums, self.scored = _sums(gate.device, len(gate)), False

    def start(self) -> None:
        """A kernel is about to be launched that adds."""
        if self.scored:  # and nobody has looked
            self.sums.zero_()
        self.scored = True

    def take(self) -> bool:
        """Whether the last launch has added, and nobody has taken that."""
        scored, self.scored = self.scored, False
        return scored


@functools.cache
def choice(top: int, experts: int, E: int, C: int, biased: bool) -> str:
    """PTX that makes scores of sums at $3, of C features and E experts, `experts` being the next power of two, with
    biases at $4 and the norm's epsilon $5. Of the `top` greatest it gives lane i the key of slot i, $0, and all lanes
    the greatest score, $2. $1 is a lane's part of the sum of e to the power of scores less that one. Lane i has experts
    i, i + 32, ..."""
    n, width = max(1, experts // 32), 8 * (E + 2)
    lines = [f".reg .pred p; .reg .b32 k<{n}>, m, t, lane; .reg .f32 v<{n}>, u, r;"]
    lines += [f".reg .b64 a<{n + 2}>, b<{n + 2}>, at;"]
    lines += ["mov.u32 lane, %laneid; mad.wide.s32 at, lane, 8, $3;"]
    places = [("at", 256 * i, f"setp.lt.s32 p, lane, {E - 32 * i};", "@p ") for i in range(n)]
    places += [("$3", 8 * E, "", ""), ("$3", 8 * E + 8, "", "")]
    for i, (base, offset, test, on) in enumerate(places):
        lines += [f"mov.b64 a{i}, 0; {test} {on}ld.relaxed.gpu.global.b64 a{i}, [{base}+{offset}];"]
        for copy in range(1, COPIES):
            other = f"[{base}+{offset + width * copy}]"
            lines += [f"mov.b64 b{i}, 0; {on}ld.relaxed.gpu.global.b64 b{i}, {other}; add.s64 a{i}, a{i}, b{i};"]
    lines += [
        f"cvt.rn.f32.s64 u, a{n}; mul.f32 u, u, {_float(SMALL)}; cvt.rn.f32.s64 r, a{n + 1};",
        f"mul.f32 r, r, {_float(LARGE)}; setp.lt.f32 p, r, {_float(LIMIT)}; @p mov.f32 r, u;",
        f"fma.rn.f32 r, r, {_float(1 / C)}, $5; rsqrt.approx.f32 r, r; mul.f32 r, r, {_float(UNIT)};",
    ]
    if biased:
        lines += ["mad.wide.s32 at, lane, 4, $4;"]
    for i in range(n):  # see `choose`
        lines += [f"cvt.rn.f32.s64 v{i}, a{i}; mul.f32 v{i}, v{i}, r; setp.lt.s32 p, lane, {E - 32 * i};"]
        if biased:
            lines += [f"mov.b32 u, 0; @p ld.global.f32 u, [at+{128 * i}]; add.f32 v{i}, v{i}, u;"]
        lines += [
            f"@!p mov.f32 v{i}, 0fff800000; setp.nan.f32 p, v{i}, v{i}; @p mov.f32 v{i}, 0fff800000;",
            f"mov.b32 k{i}, v{i}; and.b32 k{i}, k{i}, {-experts}; mov.b32 v{i}, k{i};",
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


def _float(x: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', x))[0]:08x}"


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
