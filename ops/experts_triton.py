"""Mixture of experts of a decode step (1 to 16 rows) on an NVIDIA GPU: three Triton kernels, no word to the host.

    run(layer, x, norm, residual)   the backend of experts.py
    route(x, norm, ...)             RMSNorm, the router's scores and, of several rows, the top k, and which experts are
                                    used at all; of one row, `experts` going up finds them
    experts(x, weight, ...)         one product of all used experts: gate and up, with SwiGLU, or down, with their sum

Weights are those of linear_triton.py with all experts' rows below one another, and so is the product, in the same
fragments. What differs is where a tile's weights lie. Going up a tile belongs to one expert, and meets all rows of x:
a product costs the tensor cores the same for one row and for eight, and an expert is read once however many rows chose
it. Its result is weighted at once, with 0 for a row that did not choose it, so that going down is one long sum over
features of all used experts, which a program takes from the first to the last, always in the same order.

Axes: S slots, used experts in ascending order, of which there are `count`; M rows of x; of a tile those of
linear_triton.py. A warp's C chunks along K are a unit, which lies within one expert; there are U in each.
"""

import torch
from torch import Tensor, nn

from ops import experts_choice, tuning, unpacking, warps
from ops import linear_products as products
from ops.common import counters, few_rows_on_triton, op, pdl, tl, tlx, triton
from ops.linear_triton import group_of, kind_of, out_features

if triton is None:
    glu = None
else:
    from ops.experts_choice import choose, clear, expert_of, send, weigh, weight_of
    from ops.linear_triton import _axes, bytes_of

    @triton.jit
    def glu(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
        """See experts.glu."""
        if LIMIT > 0:
            gate = tl.minimum(gate, LIMIT)
            up = tl.maximum(tl.minimum(up, LIMIT), -LIMIT) + 1
        return gate * up / (1 + tl.exp(-ALPHA * gate))

    @triton.jit
    def _route_kernel(
        h, logits, used, weights, done, x, gain, gate, shift, M, S, eps, C: tl.constexpr, E: tl.constexpr,
        TOP: tl.constexpr, SEND: tl.constexpr, RENORMALIZE: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
        BE: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """h (M, C) = RMSNorm of x; logits fp32 (M, E) of some experts and a row in each program. Of several rows, the
        last program to come writes count and slots, used int32 (1 + S), and their weights, fp32 (S, M), both 0 past
        count. If it is to SEND, logits are experts_choice.py's scoreboard, and all that is up's: its programs, which
        look there at once, come up when the wait here is over, as then the layer before has cleared it."""
        block, m = tl.program_id(0), tl.program_id(1)
        e, c = block * BE + tl.arange(0, BE), tl.arange(0, BC)
        if PDL and not SEND:
            tlx.gdc_launch_dependents()
        own = tl.load(gate + e[:, None] * C + c[None, :], (e < E)[:, None] & (c < C)[None, :], other=0.0)
        v = tl.load(gain + c, c < C, other=0.0).to(tl.float32)
        score = tl.zeros((BE,), tl.float32)
        if shift is not None:
            score = tl.load(shift + e, e < E, other=0.0).to(tl.float32)
        if PDL:
            tlx.gdc_wait()
            if SEND:
                tlx.gdc_launch_dependents()
        row = tl.load(x + m * C + c, c < C, other=0.0).to(tl.float32)
        v = (row * tl.rsqrt(tl.sum(row * row, 0) / C + eps) * v).to(h.dtype.element_ty)
        score += tl.sum(own.to(tl.float32) * v.to(tl.float32)[None, :], 1)
        # The last bits are for an expert's index: see experts_choice.py.
        score = (score.to(tl.int32, bitcast=True) & -EXPERTS).to(tl.float32, bitcast=True)
        if SEND:
            send(logits, score, e, E)
        else:
            tl.store(logits + m * E + e, score, e < E)
        if block == 0:
            tl.store(h + m * C + c, v, c < C)
        if SEND:
            return
        tl.debug_barrier()
        if tl.atomic_add(done, 1, sem="acq_rel") < tl.num_programs(0) * tl.num_programs(1) - 1:
            return
        tl.store(done, 0)
        rows, e = tl.arange(0, ROWS)[:, None], tl.arange(0, EXPERTS)[None, :]
        rest = tl.load(logits + rows * E + e, (rows < M) & (e < E), other=-3e38, cache_modifier=".cg")
        p = tl.exp(rest - tl.max(rest, 1, keep_dims=True))
        chosen = (rows < 0) & (e < 0)
        for _ in tl.static_range(TOP):
            best = e == tl.argmax(rest, 1, keep_dims=True)
            chosen |= best
            rest = tl.where(best, float("-inf"), rest)
        if RENORMALIZE:
            p = tl.where(chosen, p, 0.0)
        p = tl.where(chosen, p / tl.sum(p, 1, keep_dims=True), 0.0)
        met = tl.max((chosen & (rows < M) & (e < E)).to(tl.int32), 0, keep_dims=True)  # (1, EXPERTS)
        slot = tl.cumsum(met, 1) - met
        count = tl.sum(tl.sum(met, 1), 0)
        tl.store(used, count)
        tl.store(used + 1 + slot, e, (met > 0) & (slot < S))
        tl.store(used + 1 + e, 0, (e >= count) & (e < S))
        tl.store(weights + slot * M + rows, p, (met > 0) & (slot < S) & (rows < M))
        tl.store(weights + e * M + rows, 0.0, (e >= count) & (e < S) & (rows < M))

    @triton.jit
    def _unit(count, S, tile, step, T, U, DOWN: tl.constexpr, warp):
        """Of each warp at a step of a tile: its slot, its unit there, and whether it has something to do; where it has
        not, it is to read what it finds."""
        at = step + warp
        if DOWN:
            live = at < count * U
            at = tl.minimum(at, count * U - 1)
            slot, unit = at // U, at % U
        else:
            live = at < U
            unit = tl.minimum(at, U - 1)
            slot = tl.minimum(tile // T, S - 1) + 0 * unit
        return slot, unit, live

    @triton.jit
    def _expert(used, slot):
        """The expert of a slot, as memory has it."""
        return tl.load(used + 1 + slot, cache_modifier=".cg").to(tl.int64)

    @triton.jit
    def _weights(
        w, s, used, expert, count, S, tile, step, wanted, T, U, N, K, KIND: tl.constexpr, GROUP: tl.constexpr,
        COLS: tl.constexpr, DOWN: tl.constexpr, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr,
    ):  # fmt: skip
        """The words of a tile at a step of W units and, for int4, its scales and zeros; for kinds of 8 bits going down,
        each warp's scales of rows (W, 8 R). expert int64 is up's; down, each unit has its own."""
        FOUR: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
        PER_WORD: tl.constexpr = 2 if KIND == "fp" else 1 if FOUR else 4  # 4 bits' words lie 8 rows together
        j, i, warp, r, u = _axes(W, R)
        slot, unit, _ = _unit(count, S, tile, step, T, U, DOWN, warp)
        if DOWN:
            expert = _expert(used, slot)
        chunk = unit * C + tl.arange(0, C)[None, None, None, None, :, None]
        here = tile if DOWN else tile % T
        pair = 0.0
        if FOUR:
            blocks = tl.cdiv(K, 128) if GROUP < 256 else tl.cdiv(K, 256) * 2
            row8 = expert * (N // 8) + tl.minimum(here * R + r, N // 8 - 1)
            words = row8 * (blocks * 128) + (chunk * 128 + i * 16 + j * 4 + u)
            inside = chunk < blocks
        if KIND == "mxfp4":
            pair = products.load(
                s, row8 * (blocks * 32) + bytes_of(chunk, i, j, W, C, COLS), 0, inside, EVEN, None, wanted
            )
        elif KIND == "int4":
            pairs = i * (256 // GROUP) + chunk // 2 * (8 * 256 // GROUP)
            if GROUP < 256:
                pairs += chunk % 2 * (128 // GROUP)
            if COLS == 1:  # lane j has a group of 32
                pairs = pairs + j // (GROUP // 32)
            else:
                GROUPS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1
                pairs = tl.broadcast_to(pairs, (1, 8, W, 1, C, GROUPS))
                pairs += tl.arange(0, GROUPS)[None, None, None, None, None, :]
            pairs = row8 * (tl.cdiv(K, 256) * (8 * 256 // GROUP)) + pairs
            s = s.to(tl.pointer_type(tl.int32))
            pair = products.load(s, pairs, 0, inside, EVEN, None, wanted)
        if not FOUR:
            row = expert * N + tl.minimum((here * R + r) * 8 + i, N - 1)
            words = row * (K // PER_WORD) + (chunk * 16 + j * 4 + u)
            inside = (chunk * 16 + j * 4) * PER_WORD < K
            if DOWN and KIND != "fp":
                slot, _, _ = _unit(count, S, tile, step, T, U, DOWN, tl.arange(0, W)[:, None])
                n = tile * (R * 8) + tl.arange(0, R * 8)[None, :]
                of_rows = _expert(used, slot) * N + n
                pair = tl.load(s + of_rows, n < N, other=0.0).to(tl.float32)
        ONCE: tl.constexpr = None if KIND == "fp" else "evict_first"
        return products.load(w, words, 0, inside, EVEN, ONCE, wanted), pair

    @triton.jit
    def _rows(
        xs, kx, count, S, tile, step, T, U, M, K, COLS: tl.constexpr, DOWN: tl.constexpr, SPAN: tl.constexpr,
        X: tl.constexpr, W: tl.constexpr,
    ):  # fmt: skip
        """The words of x that meet `_weights`; kx are those of a unit, of SPAN words."""
        B: tl.constexpr = (COLS + 7) // 8
        warp = tl.arange(0, W)[None, None, :, None, None, None]
        slot, unit, live = _unit(count, S, tile, step, T, U, DOWN, warp)
        at = unit * SPAN + kx
        inside = live & (at < K // 2)
        row = 0 * slot
        if DOWN:
            row = slot * M
        if COLS > 1:  # columns past M hold the last row again
            i = tl.arange(0, 8)[None, :, None, None, None, None]
            row = row + tl.minimum(tl.arange(0, B)[None, None, None, :, None, None] * 8 + i, M - 1)
            at = tl.broadcast_to(at, (4, 8, W, B, X, 4))
        return products.load(xs, row.to(tl.int64) * (K // 2) + at, 0, inside, False)

    @triton.jit
    def _times(
        acc, w, s, b, scale, KIND: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
        C: tl.constexpr, W: tl.constexpr, COLS: tl.constexpr, DOWN: tl.constexpr, ASM: tl.constexpr,
        DTYPE: tl.constexpr,
    ):  # fmt: skip
        """acc and a tile's product; going down, weights of 8 bits have scales of their own in each expert."""
        if DOWN and (KIND == "int8" or KIND == "fp8"):
            D: tl.constexpr = acc.shape[0] // W
            own = tl.zeros(acc.shape, tl.float32)
            own = products.multiply(own, w, 0, b, scale, KIND, GROUP, False, S, R, C, W, COLS, ASM, DTYPE)
            s = tl.broadcast_to(s[None, :, :], (D, W, R * 8)).reshape(D * W, R * 8)
            acc += own * s[:, :, None]
        else:
            acc = products.multiply(acc, w, s, b, scale, KIND, GROUP, KIND == "int4", S, R, C, W, COLS, ASM, DTYPE)
        return acc

    @triton.jit
    def _experts_kernel(
        y, x, w, s, bias, residual, used, weights, logits, S, M, end, E: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
        KIND: tl.constexpr, GROUP: tl.constexpr, DOWN: tl.constexpr, TOP: tl.constexpr, RENORMALIZE: tl.constexpr,
        EXPERTS: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, COLS: tl.constexpr, R: tl.constexpr,
        C: tl.constexpr, W: tl.constexpr, WHOLE: tl.constexpr, PERSIST: tl.constexpr, EVEN: tl.constexpr,
        CLEAR: tl.constexpr, CHOICE: tl.constexpr, SHARES: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Up: y (S, M, N / 2) = weights * SwiGLU of W x [+ bias], of x (M, K). DOWN: y (M, N) = [residual +] the sum
        over slots of W x [+ weights * bias], of x (S, M, K). M is at most COLS. See linear_triton._linear_kernel.

        Up, kernels that depend on this one may start when its wait is over, so that going down may look for the used
        experts, and ask for its first weights, before it waits itself. Of one row each program finds the used experts
        by itself, from `logits`, see experts_choice.py, and the first one writes them down for that; going down clears
        those. With CHOICE that comes before the wait, so that up asks for its first weights before it, too.
        """
        FOUR: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
        P: tl.constexpr = 2 if KIND == "fp" else 8 if FOUR else 4  # values in a word
        CHUNK: tl.constexpr = 16 * P
        X: tl.constexpr = C * CHUNK // 32
        B: tl.constexpr = (COLS + 7) // 8
        DTYPE: tl.constexpr = x.dtype.element_ty
        PAIR: tl.constexpr = s.dtype.element_ty if GROUP > 0 else None  # int4's scales and zeros are of it
        SMALL: tl.constexpr = products.small(KIND, GROUP, COLS, ASM)
        IN_INT8: tl.constexpr = products.in_int8(KIND, GROUP, COLS)
        UNIT: tl.constexpr = products.unit(KIND, SMALL, IN_INT8, ASM)
        D: tl.constexpr = (C if C < 8 // R else 8 // R) if P == 4 and COLS == 8 else 1
        SPAN: tl.constexpr = C * CHUNK // 2
        j, i, _, _, u = _axes(W, R)
        if IN_INT8:  # see linear_triton.py
            PARTS: tl.constexpr = 4 if X > 4 else X
            part = tl.minimum(i // 2, PARTS - 1) + tl.arange(0, X // PARTS)[None, None, None, None, :, None] * PARTS
        elif COLS == 1:
            tl.static_assert(X <= 8)
            part = tl.minimum(i, X - 1)
        else:
            part = tl.arange(0, X)[None, None, None, None, :, None]
        if P == 4:
            kx = (part // 2) * 32 + j * 8 + (part % 2) * 4 + u
        else:
            kx = part * 16 + j * 4 + u
        xs = x.to(tl.pointer_type(tl.int32))

        T, U = tl.cdiv(N, 8 * R), tl.cdiv(K, C * CHUNK)
        tile = tl.program_id(0)
        if PDL:
            if DOWN:
                tlx.gdc_launch_dependents()
            elif CHOICE is None:
                tlx.gdc_wait()
        if not DOWN and CHOICE is None:
            t = _rows(xs, kx, S, S, tile, 0, T, U, M, K, COLS, DOWN, SPAN, X, W)
        if TOP > 0:
            slots, indices, scores = choose(logits, tile, E, TOP, EXPERTS, W, CHOICE)
        count = S
        if COLS > 1:  # one row uses as many experts as there may be
            count = tl.load(used, cache_modifier=".cg")
        tiles, units = count * T, end
        if DOWN:
            tiles, units = T, count * U
        if COLS > 1 and tile >= tiles:
            return
        wanted, expert = None, None
        if TOP > 0:
            expert = expert_of(slots, indices, tile // T, EXPERTS, CHOICE).to(tl.int64)
        elif not DOWN:
            expert = _expert(used, tile // T)
        w_now, s_now = _weights(
            w, s, used, expert, count, S, tile, 0, wanted, T, U, N, K, KIND, GROUP, COLS, DOWN, R, C, W, EVEN
        )  # fmt: skip
        if CHOICE is not None:
            tlx.gdc_wait()
            t = _rows(xs, kx, S, S, tile, 0, T, U, M, K, COLS, DOWN, SPAN, X, W)
        if TOP > 0:
            shares = weigh(slots, indices, scores, used, weights, tile, TOP, RENORMALIZE, SHARES)
        if PDL and not DOWN:
            tlx.gdc_launch_dependents()
        if DOWN:
            if PDL:
                tlx.gdc_wait()
            t = _rows(xs, kx, count, S, tile, 0, T, U, M, K, COLS, DOWN, SPAN, X, W)
            if CLEAR and tile == 0:
                clear(logits, E, EXPERTS)
        squares = tl.zeros((1, 16, 16), tl.float32)
        if WHOLE:
            b, x_scale, squares = products.operand(squares, t, None, KIND, GROUP, R, C, W, COLS, D, ASM, DTYPE)
        PART: tl.constexpr = 1 if DOWN else 2
        outputs = N // PART
        col = tl.arange(0, COLS)
        rounds = 1
        if PERSIST:
            rounds = tl.cdiv(tiles - tile, tl.num_programs(0))
        for turn in range(rounds):
            here = tile if DOWN else tile % T
            slot = 0 if DOWN else tile // T
            n = here * (R * 8) + tl.arange(0, R * 8)
            of_y = here * (R * 8 // PART) + tl.arange(0, R * 8 // PART)
            stored = (of_y < outputs)[:, None] & (col < M)[None, :]
            if not DOWN:
                if TOP > 0:
                    weight = weight_of(slots, shares, slot, SHARES) + tl.zeros((COLS,), tl.float32)
                else:
                    weight = tl.load(weights + slot * M + col, col < M, other=0.0)
                if P == 4:
                    scale = tl.load(s + expert * N + n, n < N, other=0.0).to(tl.float32)
                if bias is not None:
                    shift = tl.load(bias + expert * N + n, n < N, other=0.0).to(tl.float32)
            at = (slot * M + col[None, :]).to(tl.int64) * outputs + of_y[:, None]
            if residual is not None:
                before = tl.load(residual + at, mask=stored, other=0.0).to(tl.float32)
            acc = tl.zeros((D * W, R * 8, 4 if IN_INT8 else B * 8), tl.float32)
            if not WHOLE:
                b, x_scale, squares = products.operand(squares, t, None, KIND, GROUP, R, C, W, COLS, D, ASM, DTYPE)
                for step in range(W, units, W):
                    t = _rows(xs, kx, count, S, tile, step, T, U, M, K, COLS, DOWN, SPAN, X, W)
                    acc = _times(acc, w_now, s_now, b, x_scale, KIND, GROUP, PAIR, R, C, W, COLS, DOWN, ASM, DTYPE)
                    w_now, s_now = _weights(
                        w, s, used, expert, count, S, tile, step, wanted, T, U, N, K,
                        KIND, GROUP, COLS, DOWN, R, C, W, EVEN,
                    )  # fmt: skip
                    b, x_scale, squares = products.operand(squares, t, None, KIND, GROUP, R, C, W, COLS, D, ASM, DTYPE)
            acc = _times(acc, w_now, s_now, b, x_scale, KIND, GROUP, PAIR, R, C, W, COLS, DOWN, ASM, DTYPE)
            tile += tl.num_programs(0)
            if PERSIST:
                if TOP > 0:
                    expert = expert_of(slots, indices, tl.minimum(tile // T, S - 1), EXPERTS, CHOICE).to(tl.int64)
                elif not DOWN:
                    expert = _expert(used, tl.minimum(tile // T, S - 1))
                w_now, s_now = _weights(
                    w, s, used, expert, count, S, tile, 0, tile < tiles, T, U, N, K,
                    KIND, GROUP, COLS, DOWN, R, C, W, EVEN,
                )  # fmt: skip
                if not WHOLE:
                    t = _rows(xs, kx, count, S, tile, 0, T, U, M, K, COLS, DOWN, SPAN, X, W)

            if D > 1:
                acc = tl.sum(acc.reshape(D, W, R * 8, B * 8), 0)
            if COLS == 1:
                acc = tl.sum(acc, 2, keep_dims=True)
            out = warps.total(acc, PERSIST, ASM, turn if COLS == 1 else None)  # (rows of W, rows of x)
            out *= UNIT
            if DOWN:
                if bias is not None:
                    for slot in range(count):
                        weight = tl.load(weights + slot * M + col, col < M, other=0.0)
                        of_rows = _expert(used, slot) * N + n
                        shift = tl.load(bias + of_rows, n < N, other=0.0).to(tl.float32)
                        out += shift[:, None] * weight[None, :]
            else:
                if P == 4:
                    out *= scale[:, None]
                if bias is not None:
                    out += shift[:, None]
                gate, up = tl.split(out.reshape(R // 2, 2, 8, COLS).permute(0, 2, 3, 1))
                out = glu(gate, up, LIMIT, ALPHA).reshape(R * 4, COLS)
                out = tl.where((weight != 0)[None, :], out * weight[None, :], 0.0)
            if residual is not None:
                out += before
            tl.store(y + at, out.to(y.dtype.element_ty), mask=stored)


@op("route", ("h", "logits"))
def route(
    h: Tensor,
    logits: Tensor,
    x: Tensor,
    norm: Tensor,
    eps: float,
    gate: Tensor,
    bias: Tensor | None,
    top_k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """Which experts rows x (M, C) are sent to by the router `gate` (E, C): used int32 (1 + S), their number and then
    their indices in ascending order, and weights fp32 (S, M), 0 where a row is not sent there. S is as many as there
    may be, min(E, M k). h (M, C) becomes the RMSNorm of x, logits fp32 (M, E) the scores. Of one row, logits are the
    scoreboard where experts_choice.py supports that, and used and weights are left to `experts` going up."""
    (M, C), E = x.shape, len(gate)
    S = min(E, M * top_k)
    used = torch.empty(1 + S, dtype=torch.int32, device=x.device)
    weights = torch.empty(S, M, dtype=torch.float32, device=x.device)
    BE = max(1, triton.next_power_of_2(E) // 64)  # and 4 warps: measured on an H200
    _route_kernel[(triton.cdiv(E, BE), M)](
        h, logits, used, weights, counters(x.device, 1), x, norm, gate, bias, M, S, eps, C, E,
        TOP=top_k, SEND=experts_choice.supports(M, top_k), RENORMALIZE=renormalize, ROWS=triton.next_power_of_2(M),
        EXPERTS=triton.next_power_of_2(E), BE=BE, BC=triton.next_power_of_2(C), num_warps=4, **pdl(x.device),
    )  # fmt: skip
    return used, weights


@torch.library.register_fake("gptfast::route")
def _(h, logits, x, norm, eps, gate, bias, top_k, renormalize):
    S = min(len(gate), len(x) * top_k)
    return x.new_empty(1 + S, dtype=torch.int32), x.new_empty(S, len(x), dtype=torch.float32)


@op("experts", ("used", "weights", "logits"))
def experts(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    used: Tensor,
    weights: Tensor,
    residual: Tensor | None,
    down: bool,
    limit: float = 0.0,
    alpha: float = 1.0,
    logits: Tensor | None = None,
    renormalize: bool = False,
) -> Tensor:
    """One product of the used experts, see `route`, in one launch; n: experts whose rows the weight has.

    Up: x (M, K) -> weights * SwiGLU of W x [+ bias], (S, M, N / 2). Down: x (S, M, K) -> [residual +] the sum over
    experts of W x [+ weights * bias], (M, N). In x's dtype; bias (E, N). `used` and `weights` are `route`'s; of one row
    going up writes them, from the scoreboard `logits`, which is cleared going down.
    """
    (M, K), S = x.shape[-2:], len(weights)
    N, kind = out_features(weight) // n, kind_of(weight)
    group, _ = group_of(K, kind, scales)
    how = tuning.experts(kind, N, K, M, S, down, x.device)
    R, C, W = how.tile_rows // 8, how.k_repeat, how.num_warps
    launch, processors = pdl(x.device), tuning.processors(x.device)
    hopper, units = launch["PDL"], triton.cdiv(K, C * tuning.CHUNK[kind])
    tiles = triton.cdiv(N, how.tile_rows) * (1 if down else S)
    programs = min(tiles, how.ctas_per_sm * processors or tiles)
    top, E2 = 0 if down or logits is None else S, triton.next_power_of_2(n)
    ahead = hopper and top > 0
    y = torch.empty(*((M, N) if down else (S, M, N // 2)), dtype=x.dtype, device=x.device)
    _experts_kernel[(programs,)](
        y, x, weight.view(torch.int32), scales, bias, residual, used, weights, logits, S, M, units, n, N, K,
        KIND=kind, GROUP=group, DOWN=down, TOP=top,
        RENORMALIZE=renormalize, EXPERTS=E2, LIMIT=limit, ALPHA=alpha,
        COLS=tuning.columns(M), R=R, C=C, W=W, WHOLE=not down and units <= W, PERSIST=programs < tiles,
        EVEN=K % (C * tuning.CHUNK[kind]) == 0, CLEAR=down and logits is not None,
        CHOICE=experts_choice.choice(top, E2, n) if ahead else None,
        SHARES=experts_choice.shares(top, E2, renormalize) if ahead else None,
        ASM=unpacking.assembly(kind, group == 0) if hopper and (x.dtype == torch.bfloat16 or kind == "fp") else None,
        num_warps=W, num_stages=1, **launch, **({"maxnreg": how.maxnreg} if hopper else {}),
    )  # fmt: skip
    return y


@torch.library.register_fake("gptfast::experts")
def _(
    x, weight, scales, bias, n, used, weights, residual, down, limit=0.0, alpha=1.0, logits=None, renormalize=False
):  # fmt: skip
    M, N = x.shape[-2], out_features(weight) // n
    return x.new_empty((M, N) if down else (len(weights), M, N // 2))


def run(layer, x: Tensor, norm: nn.RMSNorm, residual: Tensor | None) -> Tensor | None:
    """This rank's result, for a few rows of x."""
    if not few_rows_on_triton(x) or norm.weight.dtype != x.dtype:
        return None
    rows, up, down, gate = x.reshape(-1, x.shape[-1]).contiguous(), layer.cond_ffn.w13, layer.cond_ffn.w2, layer.gate
    h, E = torch.empty_like(rows), len(gate.weight)
    board = experts_choice.scoreboard(x.device, E) if experts_choice.supports(len(rows), layer.top_k) else None
    logits = board if board is not None else torch.empty(len(rows), E, dtype=torch.float32, device=x.device)
    router = (norm.weight, norm.eps, gate.weight, gate.bias, layer.top_k, layer.renormalize)
    used, weights = route(h, logits, rows, *router)
    clamp = (layer.limit, layer.alpha, board, layer.renormalize)
    hidden = experts(h, up.weight, up.scales, up.bias, E, used, weights, None, False, *clamp)
    residual = None if residual is None else residual.reshape(rows.shape).contiguous()
    y = experts(hidden, down.weight, down.scales, down.bias, E, used, weights, residual, True, *clamp)
    return y.view(x.shape)
