"""The linear layers of a decode step (1 to 16 rows) on an NVIDIA GPU: one Triton kernel, beside a PyTorch reference.

    linear(x, weight, scales, bias, norm, eps, residual, ...)  [residual +] W rms_norm(x) [+ bias], or gated, as an op
    takes(x, weight, norm), gated, dequantize, pack_int4, unpack_int4

Weights: (N, K) bf16 or fp16; (N, K) int8 or float8_e4m3fn with `scales` (N,); int32, what `pack_int4` makes of the
portable int4 of disk, with its packed scales.

How the kernel works: at 1 to 16 rows it is a stream of weights, so everything serves keeping DRAM busy. A
program owns a few rows of W and all of K, split among its warps. Each lane loads 16 bytes of one row of W, and the K
axis of both operands is permuted (a sum does not care) so that these bytes already are a tensor-core fragment: no
shared memory, no shuffle between a load and its `mma`. W is the 16-row operand and x the 8-column one, so that 8 rows
of x read no more weights than 1. One row alone spreads K over the 8 columns, for the fewest instructions, and meets
int8 and int4 weights in products of int8: unpacked to bf16, as several rows have them, these would take longer than
they take to read.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import exchange
import products
from kernels import MAX_ROWS, fits, is_hopper, op, rms_norm, tl, tlx, triton

# ---------------------------------------------------------------------------------------------------------------------
# Reference


def nibbles(packed: Tensor) -> Tensor:
    """uint8 (N, K/2), low nibble first -> uint8 (N, K)."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def dequantize(weight: Tensor, scales: Tensor | None, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) that a stored or packed one stands for. int4: w = (q - 8) * scale + zero, as in tinygemm."""
    if weight.dtype == torch.int32:
        weight, scales, zeros = unpack_int4(weight, scales)
    if weight.dtype == torch.uint8:
        offsets = nibbles(weight).to(dtype).unflatten(1, (scales.shape[1], -1)) - 8
        return torch.addcmul(zeros[..., None], offsets, scales[..., None]).to(dtype).flatten(1)  # one rounding, not two
    return weight.to(dtype) if scales is None else (weight.to(dtype) * scales[:, None]).to(dtype)


def linear_reference(x, weight, scales=None, bias=None, norm=None, eps=0.0, residual=None, out_dtype=None, gates=False):
    h = x if norm is None else rms_norm(x, norm, eps)
    y = F.linear(h, dequantize(weight, scales, None, h.dtype)[:, : h.shape[-1]])
    if bias is not None:
        y = y + bias
    if gates:
        y = gated(y)
    if residual is not None:
        y = residual + y
    return y.to(out_dtype or x.dtype)


def gated(y: Tensor) -> Tensor:
    """silu(gate) * up (..., N / 2), gates and ups being y's features (..., N) by turns of 8."""
    gate, up = y.unflatten(-1, (-1, 2, 8)).unbind(-2)
    return (F.silu(gate) * up).flatten(-2)


# ---------------------------------------------------------------------------------------------------------------------
# int4 for the tensor cores


def pack_int4(weight: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Lay portable int4 (uint8 (N, K/2); scales, zeros bf16 (N, K/G)) out for the kernels; N must divide by 8.

    Returns words int32 (N/8, K'/128, 8, 4, 4), K' being K padded to a multiple of max(128, G), and
    (scale, zero) pairs of bf16 as int32 (N/8, K''/256, 8, 256/G), K'' being K padded to a multiple of 256.
    Word [n8, b, i, j, c] holds q[8 n8 + i, 128 b + 32 c + 8 j + 2 a + e] in nibble a + 4 e: 16 bytes of a lane are 8
    weights of each of 4 groups of 32, and one `lop3` turns nibbles a and a + 4 into two adjacent bf16 of a fragment.
    """
    N, group = weight.shape[0], 2 * weight.shape[1] // scales.shape[1]
    if N % 8 or group not in (32, 64, 128, 256):
        raise ValueError(
            f"int4 kernels take rows by 8 and groups of 32, 64, 128 or 256; got {N} rows, groups of {group}"
        )
    q = F.pad(nibbles(weight), (0, -2 * weight.shape[1] % max(128, group)), value=8)
    q = q.view(N // 8, 8, -1, 4, 4, 4, 2).permute(0, 2, 1, 4, 3, 6, 5).flatten(-2).int()  # n8 b i j c (e a)
    words = (q << torch.arange(0, 32, 4, device=q.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    pairs = torch.stack((scales, zeros), dim=-1).bfloat16()  # the scale in the low half
    pairs = F.pad(pairs, (0, 0, 0, -scales.shape[1] % (256 // group))).view(torch.int32)
    return words, pairs.view(N // 8, 8, -1, 256 // group).transpose(1, 2).contiguous()


def unpack_int4(words: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of pack_int4, but for K, which stays padded (with q = 8, scale = zero = 0)."""
    q = words[..., None] >> torch.arange(0, 32, 4, device=words.device) & 15  # n8 b i j c (e a)
    q = q.unflatten(-1, (2, 4)).permute(0, 2, 1, 4, 3, 6, 5).flatten(2).flatten(0, 1).to(torch.uint8)  # N, K'
    pairs = pairs.transpose(1, 2).flatten(2).flatten(0, 1)[:, : q.shape[1] * pairs.shape[3] // 256]  # N, K'/G
    scales, zeros = pairs[..., None].contiguous().view(torch.bfloat16).unbind(-1)
    return q[:, ::2] | q[:, 1::2] << 4, scales.contiguous(), zeros.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Triton kernels. ASM and PDL are off in the interpreter and on GPUs before Hopper, where plain Triton does the same.

if triton is not None:
    FEATURES = tl.constexpr(exchange.MAX_FEATURES)
    SLOTS = tl.constexpr(exchange.MAX_FEATURES * MAX_ROWS)

    @triton.jit
    def _weights(
        w, s, tile, k, N, K, KIND: tl.constexpr, GROUP: tl.constexpr, COLS: tl.constexpr, R: tl.constexpr,
        C: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, PERSIST: tl.constexpr,
    ):  # fmt: skip
        """The words of a tile of W at k and, for int4, its scales and zeros."""
        PER_WORD: tl.constexpr = 2 if KIND == "fp" else 1 if KIND == "int4" else 4  # int4 words lie 8 rows together
        j, i, warp, r, u = _axes(W, R)
        chunk = warp * C + tl.arange(0, C)[None, None, None, None, :, None]
        wanted = None
        if PERSIST:
            wanted = tile * (8 * R) < N
        pair = 0
        if KIND == "int4":
            blocks = tl.cdiv(K, 128) if GROUP < 256 else tl.cdiv(K, 256) * 2
            row8 = tl.minimum(tile * R + r, N // 8 - 1).to(tl.int64)
            words = row8 * (blocks * 128) + (chunk * 128 + i * 16 + j * 4 + u)
            inside = chunk * 128 < K - k
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
            pair = products.load(s, pairs, k // GROUP * 8, inside, EVEN, False, wanted)  # k is a multiple of 256
        else:
            row = tl.minimum((tile * R + r) * 8 + i, N - 1)
            words = row.to(tl.int64) * (K // PER_WORD) + chunk * 16 + j * 4 + u
            inside = (chunk * 16 + j * 4) * PER_WORD < K - k
        # Weights leave the L2 cache first, which gains up to 10 %, but not in 16 bits.
        return products.load(w, words, k // PER_WORD, inside, EVEN, KIND != "fp", wanted), pair

    @triton.jit
    def _axes(W: tl.constexpr, R: tl.constexpr):
        j = tl.arange(0, 4)[:, None, None, None, None, None]
        i = tl.arange(0, 8)[None, :, None, None, None, None]
        warp = tl.arange(0, W)[None, None, :, None, None, None]
        r = tl.arange(0, R)[None, None, None, :, None, None]
        return j, i, warp, r, tl.arange(0, 4)[None, None, None, None, None, :]

    @triton.jit(do_not_specialize=["rank"])  # all ranks run the same code, and so sum in the same order
    def _linear_kernel(
        y, x, w, s, bias, norm, residual, boxes, counts, rank, M, N, K, eps,
        KIND: tl.constexpr, GROUP: tl.constexpr, GATES: tl.constexpr, COLS: tl.constexpr, WORLD: tl.constexpr,
        GATHER: tl.constexpr, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr, WHOLE: tl.constexpr,
        PERSIST: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """y (M, N) = [residual +] W n(x) [+ bias], or if GATES the `gated` (M, N / 2) of it; M <= COLS rows of x.
        If WORLD is not 1, W n(x) [+ bias] is summed over so many ranks before that, each tile by itself (exchange.py),
        or if GATHER the ranks' results, without a residual, are put side by side.

        A program has 8 R rows of W or, if it is to PERSIST, as many such tiles as it takes, in steps along K; if WHOLE,
        one step is all of K, and x is made ready once. Weights are asked for as soon as those before are used up, and
        the first ones before the wait for x.

        Tiles have axes j (4 lanes along K), i (8 lanes along rows), W (warps along K), R and C (repetitions along rows
        and K), and last the lane's 16 bytes: with `flat`, Triton hands out lanes and warps to the axes in this order.

        COLS is 8 or 16, or 1: then the 8 columns of a fragment of x take parts of 32 values along K, each with zeros
        for the others, so that a lane loads x once and each part's products stay apart.
        """
        P: tl.constexpr = 2 if KIND == "fp" else 8 if KIND == "int4" else 4  # values in a word
        CHUNK: tl.constexpr = 16 * P  # values along K that 4 lanes hold
        STEP: tl.constexpr = W * C * CHUNK
        X: tl.constexpr = C * CHUNK // 32  # parts of x in a warp's step, of which a lane holds 8 values each
        B: tl.constexpr = (COLS + 7) // 8
        DTYPE: tl.constexpr = x.dtype.element_ty
        SMALL: tl.constexpr = KIND == "int4" and COLS > 1 and ASM is not None
        UNIT: tl.constexpr = 2.0**69 if SMALL else 64.0 if KIND == "int8" and COLS > 1 and ASM is not None else 1.0
        IN_INT8: tl.constexpr = COLS == 1 and (KIND == "int8" or KIND == "int4")
        # Products that add up in the same registers wait for each other: 4 sums, where they are the longest.
        D: tl.constexpr = (C if C < 8 // R else 8 // R) if P == 4 and COLS == 8 else 1
        j, i, warp, _, u = _axes(W, R)
        if IN_INT8:  # other lanes have the same parts again
            PARTS: tl.constexpr = 4 if X > 4 else X
            part = tl.minimum(i // 2, PARTS - 1) + tl.arange(0, X // PARTS)[None, None, None, None, :, None] * PARTS
        elif COLS == 1:
            part = tl.minimum(i, X - 1)  # X is at most 8
        else:
            part = tl.arange(0, X)[None, None, None, None, :, None]
        if P == 4:  # a lane's 16 values of 8 bits meet two loads of x, which is also read in words
            kx = warp * (C * CHUNK // 2) + (part // 2) * 32 + j * 8 + (part % 2) * 4 + u
        else:
            kx = warp * (C * CHUNK // 2) + part * 16 + j * 4 + u
        xs = x.to(tl.pointer_type(tl.int32))
        at_x = kx
        if COLS > 1:  # columns past M hold the last row again
            kx = tl.broadcast_to(kx, (4, 8, W, B, X, 4))
            row = tl.minimum(tl.arange(0, B)[None, None, None, :, None, None] * 8 + i, M - 1)
            at_x += row.to(tl.int64) * (K // 2)

        gains = norm
        if norm is not None:
            gains = norm.to(tl.pointer_type(tl.int32))

        if WORLD > 1:
            RANKS: tl.constexpr = triton.next_power_of_2(WORLD)
            source = tl.arange(0, RANKS)[:, None, None]
            theirs, mine = exchange.addresses(boxes, source, rank, WORLD, SLOTS)
        tile = tl.program_id(0)
        if PDL:
            tlx.gdc_launch_dependents()
        w_now, s_now = _weights(w, s, tile, 0, N, K, KIND, GROUP, COLS, R, C, W, EVEN, PERSIST)
        if PDL:
            tlx.gdc_wait()

        PART: tl.constexpr = 2 if GATES else 1
        outputs = N // PART
        col = tl.arange(0, COLS)
        last = (K - 1) // STEP * STEP
        t = products.load(xs, at_x, 0, kx < K // 2, EVEN)
        squares = tl.zeros((B * W, 16, 16), tl.float32)
        if norm is not None and COLS == 1:  # here, where weights are on their way
            of_row = products.squares_of_row(xs, K, W * 128, DTYPE)
            factor = 0.0 if IN_INT8 else tl.rsqrt(tl.sum(of_row, 0) / K + eps)
        if WHOLE:
            b, x_scale, squares = products.operand(
                squares, t, gains, kx, 0, K, KIND, GROUP, R, C, W, COLS, D, EVEN, ASM, DTYPE
            )
        rounds = 1
        if PERSIST:
            rounds = tl.cdiv(tl.cdiv(N, 8 * R) - tile, tl.num_programs(0))
        for turn in range(rounds):
            n = tile * (R * 8) + tl.arange(0, R * 8)
            of_y = tile * (R * 8 // PART) + tl.arange(0, R * 8 // PART)
            stored = (of_y < outputs)[:, None] & (col < M)[None, :]
            at = col[None, :].to(tl.int64) * outputs + of_y[:, None]
            if P == 4:
                scale = tl.load(s + n, mask=n < N, other=0.0)
            if bias is not None:
                shift = tl.load(bias + n, mask=n < N, other=0.0)
            if residual is not None:
                before = tl.load(residual + at, mask=stored, other=0.0)
            if WORLD > 1:
                count = tl.load(counts + n // 8, mask=n < N, other=0, cache_modifier=".cg") + 1
            acc = tl.zeros((D * W, R * 8, 4 if IN_INT8 else B * 8), tl.float32)
            if not WHOLE:
                squares = tl.zeros(squares.shape, tl.float32)
                for k in range(STEP, K, STEP):
                    t_next = products.load(xs, at_x, k // 2, kx < (K - k) // 2, EVEN)
                    b, x_scale, squares = products.operand(
                        squares, t, gains, kx, k - STEP, K, KIND, GROUP, R, C, W, COLS, D, EVEN, ASM, DTYPE
                    )
                    acc = products.multiply(acc, w_now, s_now, b, x_scale, KIND, GROUP, R, C, W, COLS, ASM)
                    w_now, s_now = _weights(w, s, tile, k, N, K, KIND, GROUP, COLS, R, C, W, EVEN, PERSIST)
                    t = t_next
                b, x_scale, squares = products.operand(
                    squares, t, gains, kx, last, K, KIND, GROUP, R, C, W, COLS, D, EVEN, ASM, DTYPE
                )
            acc = products.multiply(acc, w_now, s_now, b, x_scale, KIND, GROUP, R, C, W, COLS, ASM)
            tile += tl.num_programs(0)
            if PERSIST:
                w_now, s_now = _weights(w, s, tile, 0, N, K, KIND, GROUP, COLS, R, C, W, EVEN, PERSIST)
                if not WHOLE:
                    t = products.load(xs, at_x, 0, kx < K // 2, EVEN)

            if D > 1:
                acc = tl.sum(acc.reshape(D, W, R * 8, B * 8), 0)
            if COLS == 1:
                acc = tl.sum(acc, 2, keep_dims=True)
            out = tl.sum(acc, 0)  # (rows of W, rows of x)
            out *= UNIT  # see products._unpack
            if norm is not None:
                if COLS > 1:
                    half = tl.arange(0, 16)
                    total = tl.sum(tl.where(half[:, None] == half[None, :], squares, 0.0), 1)
                    if SMALL:  # see products.operand
                        total *= tl.where(half < 8, 2.0**-64, 2.0**-60)[None, :]
                    total = tl.sum(tl.sum(total.reshape(B, W, 2, 8), 2), 1).reshape(1, COLS)
                    factor = tl.rsqrt(total / K + eps)
                elif IN_INT8 and turn == 0:  # warps meet when the next weights are on their way: faster in int8
                    factor = tl.rsqrt(tl.sum(of_row, 0) / K + eps)
                out *= factor
            if P == 4:
                out *= scale.to(tl.float32)[:, None]
            if bias is not None:
                out += shift.to(tl.float32)[:, None]
            if GATES:
                gate, up = tl.split(out.reshape(R // 2, 2, 8, COLS).permute(0, 2, 3, 1))
                out = (gate * up / (1 + tl.exp(-gate))).reshape(R * 4, COLS)
            if WORLD > 1:
                slot = (col[None, :] * FEATURES + n[:, None])[None, :, :]
                sent = stored[None, :, :] & (source < WORLD)
                out = out.to(tl.int32, bitcast=True)[None, :, :]
                out = exchange.deliver(out, theirs, mine, slot, sent, count[None, :, None], WORLD, SLOTS)
                out = out.to(tl.float32, bitcast=True)
                if GATHER:
                    at = (col[None, :] * WORLD + source).to(tl.int64) * outputs + of_y[None, :, None]
                    stored = sent
                else:
                    out = tl.sum(out, 0)
            if residual is not None:
                out += before.to(tl.float32)
            tl.store(y + at, out.to(y.dtype.element_ty), mask=stored)
            if WORLD > 1:
                tl.debug_barrier()  # every thread has read the count
                tl.store(counts + n // 8, count, mask=n < N)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _kind(weight: Tensor) -> str:
    return {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.int32: "int4"}.get(weight.dtype, "fp")


def _out_features(weight: Tensor) -> int:
    return weight.shape[0] * (8 if weight.dtype == torch.int32 else 1)


def _columns(M: int) -> int:
    """The columns of a product that M rows of x take."""
    return 1 if M == 1 else 8 if M <= 8 else 16


CHUNK = {"fp": 32, "int8": 64, "fp8": 64, "int4": 128}  # values along K that 4 lanes of the linear kernel hold
# R, C, W, registers and programs a multiprocessor (0: as many as there are tiles) of the linear kernel, see there.
# Registers are a bound that ptxas would undercut, at the price of delaying loads until their values are needed. The
# pick of 60 to 240 each on an H100, in a step of Llama 7B, 8B and 1B with 1, 6 and 16 rows of x. By the kind of weight
# and the columns that x takes; where tiles of 16 rows of the weight fill the multiprocessors once, twice, three or four
# times, or more often:
CONFIGURATIONS = {
    ("fp", 1): ((2, 8, 8, 128, 2),) * 5,
    ("fp8", 1): ((2, 2, 16, 96, 0), (2, 4, 8, 128, 0), (2, 2, 8, 80, 0), (2, 4, 4, 128, 0), (2, 2, 4, 96, 0)),
    ("int8", 1): ((4, 2, 16, 120, 1),) * 2 + ((4, 2, 8, 128, 0),) * 2 + ((4, 2, 4, 128, 0),),
    ("int4", 1): ((4, 2, 8, 128, 0), (4, 1, 16, 128, 1)) + ((4, 2, 8, 128, 0),) * 2 + ((4, 1, 4, 128, 0),),
    ("fp", 8): ((2, 8, 4, 240, 2), (2, 4, 8, 128, 0), (4, 4, 4, 240, 0), (2, 4, 4, 128, 0), (2, 4, 4, 168, 0)),
    ("int8", 8): ((2, 2, 8, 128, 0), (2, 2, 8, 128, 0), (2, 2, 4, 128, 0), (2, 2, 4, 128, 0), (4, 2, 4, 168, 0)),
    ("int4", 8): ((2, 2, 8, 168, 1), (2, 1, 8, 128, 0), (2, 2, 4, 168, 0), (2, 1, 4, 128, 0), (4, 1, 4, 168, 0)),
    ("fp", 16): ((2, 4, 8, 240, 1), (2, 8, 4, 240, 2), (2, 2, 4, 168, 3), (2, 2, 4, 168, 3), (4, 4, 2, 240, 4)),
    ("int8", 16): ((2, 4, 8, 240, 1), (2, 4, 4, 240, 2), (4, 2, 4, 240, 2), (4, 2, 4, 240, 2), (4, 2, 2, 240, 0)),
    ("int4", 16): ((2, 2, 8, 240, 1), (2, 2, 4, 240, 2), (2, 1, 4, 168, 3), (2, 1, 4, 168, 3), (4, 1, 2, 168, 0)),
}
TUNED = {  # where another one is better for weights (N, K), or of N rows; scripts/tune.py looks for such
    ("fp", 1): {
        **dict.fromkeys(((2048, 8192), (4096, 14336), 12288), (2, 4, 16, 120, 1)),
        **dict.fromkeys((6144, 22016, 28672, 32000, (3072, 4096), (128256, 4096)), (2, 8, 16, 120, 1)),
        (4096, 11008): (2, 2, 16, 64, 2),
        (4096, 4096): (2, 4, 8, 80, 3),
        (4096, 1024): (2, 8, 4, 128, 4),
        3072: (4, 4, 16, 120, 1),
        5504: (2, 4, 4, 128, 4),
        11008: (4, 4, 8, 200, 1),
        16384: (4, 4, 4, 200, 2),
        49152: (4, 2, 4, 128, 0),
    },
    ("fp8", 1): {22016: (2, 2, 2, 96, 0), 28672: (2, 2, 4, 128, 0)},
    ("int8", 1): {
        (2048, 8192): (2, 8, 16, 120, 1),
        (3072, 2048): (2, 4, 8, 128, 2),
        (4096, 4096): (2, 2, 16, 64, 0),
        **dict.fromkeys(((4096, 1024), (4096, 2752)), (4, 4, 8, 200, 1)),
        **dict.fromkeys((11008, 22016), (2, 2, 4, 96, 0)),
        49152: (4, 2, 2, 128, 0),
    },
    ("int4", 1): {
        (2048, 8192): (2, 1, 16, 128, 1),
        (4096, 1024): (4, 2, 4, 128, 0),
        (4096, 2048): (4, 2, 8, 128, 0),
        (4096, 4096): (4, 4, 8, 240, 1),
        (8192, 7168): (8, 1, 8, 168, 1),
        **dict.fromkeys(((3072, 4096), (4096, 2752)), (4, 2, 16, 120, 1)),
        5504: (2, 2, 8, 80, 0),
        6144: (4, 1, 8, 128, 2),
        11008: (4, 1, 8, 80, 3),
        12288: (4, 1, 4, 240, 0),
        22016: (8, 1, 4, 168, 3),
        (28672, 4096): (4, 2, 4, 128, 0),
        32000: (2, 2, 16, 128, 1),
        (128256, 2048): (4, 2, 4, 168, 0),
        (128256, 4096): (4, 2, 8, 128, 0),
        49152: (8, 1, 2, 168, 0),
    },
    ("fp", 8): {
        (2048, 8192): (2, 8, 8, 240, 1),
        **dict.fromkeys(((4096, 4096), (4096, 14336)), (2, 8, 4, 240, 2)),
        **dict.fromkeys((3072, 16384, 32000), (4, 4, 4, 240, 0)),
        12288: (2, 4, 2, 168, 0),
        49152: (4, 2, 4, 128, 0),
    },
    ("int8", 8): {
        (2048, 2048): (2, 4, 4, 240, 1),
        (2048, 8192): (2, 4, 8, 240, 0),
        (4096, 4096): (2, 4, 4, 168, 3),
        (3072, 2048): (2, 8, 4, 240, 2),
        (16384, 2048): (4, 2, 2, 240, 0),
        (128256, 2048): (2, 8, 4, 168, 0),
        12288: (4, 2, 4, 128, 4),
        22016: (4, 2, 2, 168, 6),
        28672: (4, 4, 2, 240, 4),
        32000: (2, 2, 2, 240, 0),
        (6144, 4096): (2, 4, 2, 240, 3),
        (128256, 4096): (8, 2, 2, 240, 0),
    },
    ("int4", 8): {
        **dict.fromkeys(((2048, 2048), (16384, 2048), (128256, 2048)), (2, 4, 4, 240, 2)),
        (2048, 8192): (2, 2, 8, 240, 1),
        (3072, 2048): (2, 4, 4, 240, 0),
        (4096, 4096): (2, 2, 4, 240, 2),
        (4096, 14336): (2, 4, 4, 240, 0),
        (128256, 4096): (2, 4, 8, 240, 1),
        6144: (2, 1, 4, 168, 3),
        22016: (4, 1, 2, 168, 6),
        **dict.fromkeys((28672, 32000), (8, 1, 2, 240, 4)),
    },
    ("fp", 16): {
        (2048, 2048): (2, 8, 4, 240, 1),
        (3072, 2048): (2, 4, 4, 240, 0),
        (4096, 11008): (2, 4, 8, 128, 0),
        (128256, 2048): (2, 8, 2, 240, 0),
        12288: (2, 4, 2, 168, 6),
        16384: (4, 4, 2, 240, 0),
        22016: (4, 4, 4, 240, 2),
        49152: (4, 2, 4, 128, 0),
    },
    ("int8", 16): {
        (2048, 2048): (2, 4, 4, 240, 1),
        (3072, 2048): (2, 8, 4, 240, 0),
        (4096, 11008): (2, 2, 8, 128, 0),
        (4096, 14336): (4, 4, 8, 240, 1),
        22016: (4, 2, 2, 168, 6),
    },
    ("int4", 16): {
        (2048, 2048): (2, 4, 4, 240, 1),
        (4096, 11008): (2, 1, 8, 128, 0),
        (4096, 14336): (4, 1, 8, 240, 1),
        12288: (4, 1, 4, 168, 0),
        16384: (4, 1, 2, 240, 4),
        22016: (4, 1, 2, 168, 6),
        28672: (4, 2, 2, 240, 0),
        32000: (8, 1, 2, 240, 4),
    },
}


def _table(kind: str, M: int) -> tuple[str, int]:
    """The key in CONFIGURATIONS and TUNED for M rows of x; several meet fp8 as they meet int8."""
    return "int8" if kind == "fp8" and M > 1 else kind, _columns(M)


def _configuration(kind: str, N: int, K: int, M: int, processors: int) -> tuple[int, int, int, int, int]:
    """R, C, W, registers and programs of the linear kernel: a weight (N, K), M rows, so many multiprocessors."""
    key = _table(kind, M)
    tuned, by_fill = TUNED[key], CONFIGURATIONS[key][min((-(-N // 16) - 1) // processors, 4)]
    R, C, W, registers, programs = tuned.get((N, K)) or tuned.get(N, by_fill)
    step = CHUNK[kind] * W * C
    while step >= 2 * K and W * C > 1:  # a step that covers K is the best of all, one that is twice as long is not
        W, C, step = (W, C // 2, step // 2) if C > 1 else (W // 2, C, step // 2)
    return R, C, W, registers, programs


@op("linear")
def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    gates: bool = False,
    rank: int = 0,
    world: int = 1,
    gather: bool = False,
) -> Tensor:
    """[residual +] W rms_norm(x) [+ bias]: x (..., K) -> (..., N) in x's dtype or `out_dtype`, in one launch; with
    `gates` its `gated` (..., N / 2). See `takes` for what it takes, besides CPU tensors in Triton's interpreter.

    norm (K,) is RMSNorm's gain and `eps` its epsilon, without `norm` x is taken as it is; bias (N,); residual like the
    result. With several ranks in `world`, which have some columns each, W x [+ bias] is the sum of theirs; to gather,
    they have rows, and results without a residual lie side by side, (..., world N).
    """
    K, N, kind = x.shape[-1], _out_features(weight), _kind(weight)
    rows = x.reshape(-1, K).contiguous()
    M = len(rows)
    R, C, W, registers, programs = _configuration(kind, N, K, M, _processors(x.device))
    hopper = is_hopper(x.device)
    boxes = exchange.mailbox(x.device) if world > 1 and N <= exchange.MAX_FEATURES else None
    if world > 1 and boxes is None:
        residual = residual if rank == 0 else None
    step = W * C * CHUNK[kind]
    tiles = triton.cdiv(N, 8 * R)
    programs = min(tiles, programs * _processors(x.device) or tiles)
    width = (N // 2 if gates else N) * (world if gather and boxes else 1)
    y = torch.empty(*x.shape[:-1], width, dtype=out_dtype or x.dtype, device=x.device)
    _linear_kernel[(programs,)](
        y, rows, weight.view(torch.int32), scales, bias, norm, None if residual is None else residual.contiguous(),
        *(boxes[1] if boxes else (None, None)), rank, M, N, K, eps,
        KIND=kind, GROUP=256 // scales.shape[-1] if kind == "int4" else 0, GATES=gates,
        COLS=_columns(M), WORLD=world if boxes else 1,
        GATHER=gather and boxes is not None, R=R, C=C, W=W,
        WHOLE=step >= K, PERSIST=programs < tiles, EVEN=K % step == 0,
        ASM=products.assembly(kind) if hopper and (x.dtype == torch.bfloat16 or kind == "fp") else None,
        PDL=hopper, num_warps=W, num_stages=1, **({"launch_pdl": True, "maxnreg": registers} if hopper else {}),
    )  # fmt: skip
    return y if world == 1 or boxes else exchange.exchange(y, gather, rank, world)


@torch.library.register_fake("gptfast::linear")
def _(
    x, weight, scales=None, bias=None, norm=None, eps=0.0, residual=None, out_dtype=None, gates=False, rank=0, world=1,
    gather=False,
):  # fmt: skip
    width = (_out_features(weight) // 2 if gates else _out_features(weight)) * (world if gather else 1)
    return x.new_empty((*x.shape[:-1], width), dtype=out_dtype or x.dtype)


def takes(x: Tensor, weight: Tensor, norm: Tensor | None = None) -> bool:
    """Whether `linear` takes these rows and this weight, as the module describes them. (In fp16, x times a norm's gain
    has to stay finite.)"""
    return (
        fits(x)
        and x.shape[-1] % 32 == 0
        and weight.dtype in (x.dtype, torch.int8, torch.float8_e4m3fn, torch.int32)
        and weight.is_contiguous()
        and (norm is None or norm.dtype == x.dtype)
    )
