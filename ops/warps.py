"""What a program's warps leave for each other in its shared memory, in PTX for Hopper, with a barrier between the two.
Triton's own sums over warps meet at twice as many barriers, and once more where the result is stored.

    box(WORDS)          the address of so many words
    leave(at, x, mask)  fp32 or int32 x to addresses; leave_pairs, with fewer stores
    take(at)            fp32 from addresses
    total(x, ...)       the sum over warps, or plain Triton's; place, leave_sums, take_sums: its parts
"""

from ops.common import tl, triton

if triton is None:
    box = leave = leave_pairs = take = place = leave_sums = take_sums = total = None
else:

    @triton.constexpr_function
    def _declare(words):
        return f"{{ .shared .align 16 .b32 box[{words}]; mov.u32 $0, box; }}"

    @triton.constexpr_function
    def _pitch(W):
        """How many words apart rows of W lie, so that lanes read from different banks, four words at a time."""
        return W if W <= 4 else W + 4

    @triton.constexpr_function
    def _apart(rows, cols):
        """How many words apart those of a sum lie: side by side or, of several columns, as warps have them."""
        return 1 if cols == 1 else rows * cols

    @triton.constexpr_function
    def _adds(W, apart):
        """PTX: the sum of W words, so many of them apart."""
        n = min(W, 4) if apart == 1 else 1
        lines = [f".reg .f32 a<{W}>;"]
        for first in range(0, W, n):
            words = ", ".join(f"a{first + i}" for i in range(n))
            code = f"ld.shared.v{n}.f32 {{{words}}}" if n > 1 else f"ld.shared.f32 {words}"
            lines += [f"{code}, [$1+{4 * first * apart}];"]
        while W > 1:
            W //= 2
            lines += [f"add.f32 a{i}, a{i}, a{i + W};" for i in range(W)]
        return "{ " + " ".join([*lines, "mov.f32 $0, a0;"]) + " }"

    @triton.constexpr_function
    def _pairs(n):
        store = f"@p st.shared.v2.b32 [${n}], {{${2 * n}, ${2 * n + 1}}};"
        zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(n))
        return f"{{ .reg .pred p; setp.ne.s32 p, ${3 * n}, 0; {store} {zeros} }}"

    @triton.constexpr_function
    def _registers(n):
        return ",".join(["=&r"] * n + ["r"] * 3 * n)

    @triton.jit
    def box(WORDS: tl.constexpr):
        """The address of so many words. Boxes of one size are the same one."""
        return tl.inline_asm_elementwise(_declare(WORDS), "=r", [], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def leave(at, x, mask):
        """Words of 32 bits to addresses, where the mask says so."""
        store: tl.constexpr = "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.b32 $0, 0; }"
        arguments = [at, x.to(tl.int32, bitcast=True), mask.to(tl.int32)]
        tl.inline_asm_elementwise(store, "=r,r,r,r", arguments, tl.int32, is_pure=False, pack=1)

    @triton.jit
    def leave_pairs(at, x, mask, TWICE: tl.constexpr):
        """The same of x whose neighbours along the last axis belong to neighbouring addresses, from an even one on, and
        of one mask. TWICE: a lane has two such pairs one after the other, of which the second says the same (as 8 rows
        of a product's 16)."""
        N: tl.constexpr = 4 if TWICE else 2
        arguments = [at, x.to(tl.int32, bitcast=True), mask.to(tl.int32)]
        tl.inline_asm_elementwise(_pairs(N), _registers(N), arguments, tl.int32, is_pure=False, pack=N)

    @triton.jit
    def take(at):
        """fp32 from addresses."""
        return tl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [at], tl.float32, is_pure=False, pack=1)

    @triton.jit
    def place(W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, turn=None):
        """The addresses (ROWS, COLS) of sums over warps, other ones every second turn. To be asked for once, where
        `leave_sums` and `take_sums` are under conditions of their own."""
        PITCH: tl.constexpr = _pitch(W) if COLS == 1 else 1
        WORDS: tl.constexpr = ROWS * PITCH if COLS == 1 else W * ROWS * COLS
        row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
        at = (row * COLS + col) * (PITCH * 4)
        if turn is None:
            at += box(WORDS)
        else:
            at += box(2 * WORDS) + turn % 2 * (4 * WORDS)
        return at

    @triton.jit
    def leave_sums(at, x):
        """x (W, rows, columns) at a `place`, for `take_sums` behind a barrier."""
        W: tl.constexpr = x.shape[0]
        APART: tl.constexpr = _apart(x.shape[1], x.shape[2])
        to = at[None, :, :] + tl.arange(0, W)[:, None, None] * (APART * 4)
        leave(to, x, tl.full(x.shape, 1, tl.int1))

    @triton.jit
    def take_sums(at, W: tl.constexpr):
        """The sums over so many warps at a `place`."""
        code: tl.constexpr = _adds(W, _apart(at.shape[0], at.shape[1]))
        return tl.inline_asm_elementwise(code, "=f,r", [at], tl.float32, is_pure=False, pack=1)

    @triton.jit
    def total(x, AGAIN: tl.constexpr, ASM: tl.constexpr, turn=None):
        """x (W, rows, columns) summed over warps, in PTX if there is ASM. AGAIN: whether the program has before, which
        takes another barrier or, if it says in which turn, twice the memory."""
        W: tl.constexpr = x.shape[0]
        if ASM is None or W == 1:
            out = tl.sum(x, 0)
        else:
            if not AGAIN:
                turn = None
            at = place(W, x.shape[1], x.shape[2], turn)
            if AGAIN and turn is None:
                tl.debug_barrier()
            leave_sums(at, x)
            tl.debug_barrier()
            out = take_sums(at, W)
        return out
