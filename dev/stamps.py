# ruff: noqa
"""python stamps.py TREE: have a tree's kernels write when they start, wait, go on, have x, have summed up and end. tl.py
then prints a layer's timeline: TREE=... python tl.py MODEL:KIND (STAMPS is the address, set by it)."""
import sys
tree = sys.argv[1]
open(tree + "/ops/stamps.py", "w").write('''
import os
from ops.common import tl, triton
ADDR = tl.constexpr(int(os.environ.get("STAMPS", "0")))
MAXP = tl.constexpr(1024)
GT = tl.constexpr("mov.u64 $0, %globaltimer;")
CT = tl.constexpr("mov.u64 $0, %clock64;")
SM = tl.constexpr("mov.u32 $0, %smid;")
@triton.jit
def stamp(kid, program, n: tl.constexpr):
    if ADDR != 0:
        g = tl.inline_asm_elementwise(GT, "=l,r", [program], tl.int64, is_pure=False, pack=1)
        c = tl.inline_asm_elementwise(CT, "=l,r", [program], tl.int64, is_pure=False, pack=1)
        at = tl.full((), ADDR, tl.int64).to(tl.pointer_type(tl.int64)) + (kid * MAXP + program) * 16 + 2 * n
        tl.store(at, g, (program < MAXP) & (kid < 9))
        tl.store(at + 1, c, (program < MAXP) & (kid < 9))
        if n == 0:
            s = tl.inline_asm_elementwise(SM, "=r,r", [program], tl.int32, is_pure=False, pack=1)
            tl.store(at + 15, s.to(tl.int64), (program < MAXP) & (kid < 9))
''')
def edit(p, *pairs):
    s = open(f"{tree}/{p}").read()
    for a, b in pairs:
        assert s.count(a) == 1, (p, a, s.count(a)); s = s.replace(a, b)
    open(f"{tree}/{p}", "w").write(s)
edit('ops/linear_triton.py',
("from ops import symmetric, tuning, warps\n", "from ops import symmetric, tuning, warps\nfrom ops.stamps import stamp\n"),
("        tile = tl.program_id(0)\n        if PDL:\n            tlx.gdc_launch_dependents()\n", """        tile = tl.program_id(0)
        me = tl.program_id(0)
        if SWIGLU:
            kid = 3
        elif residual is not None:
            kid = 4 if K > 4096 else 2
            if N >= K:
                kid = 2
        else:
            kid = 0
            if N > 30000:
                kid = 9
        stamp(kid, me, 0)
        if PDL:
            tlx.gdc_launch_dependents()
"""),
("        if PDL:\n            tlx.gdc_wait()\n\n        PART: tl", "        stamp(kid, me, 1)\n        if PDL:\n            tlx.gdc_wait()\n        stamp(kid, me, 2)\n\n        PART: tl"),
("        rounds = 1\n        if PERSIST:\n            rounds", "        stamp(kid, me, 3)\n        rounds = 1\n        if PERSIST:\n            rounds"),
("            if D > 1:\n                acc = tl.sum(acc.reshape(D", "            stamp(kid, me, 4)\n            if D > 1:\n                acc = tl.sum(acc.reshape(D"),
("                tl.store(counts + n // 8, count, mask=n < N)\n", "                tl.store(counts + n // 8, count, mask=n < N)\n            stamp(kid, me, 5)\n"),
)
edit('ops/attention_triton.py',
("from ops.fragments", "from ops.stamps import stamp\nfrom ops.fragments"),
("        b = head // Hkv\n        h = head % Hkv\n        if PDL:", "        b = head // Hkv\n        h = head % Hkv\n        me = head + split * tl.num_programs(0)\n        stamp(1, me, 0)\n        if PDL:"),
("        if PDL:\n            tlx.gdc_wait()\n\n        # All that", "        stamp(1, me, 1)\n        if PDL:\n            tlx.gdc_wait()\n        stamp(1, me, 2)\n\n        # All that"),
("        last = last[None, :, None]\n", "        last = last[None, :, None]\n        stamp(1, me, 3)\n"),
("        order = in_order\n        if ONCE:\n", "        stamp(1, me, 4)\n        order = in_order\n        if ONCE:\n"),
("            tl.store(out + of_row + order[None, :], (y / l).to(out.dtype.element_ty), mask=mask)\n", "            tl.store(out + of_row + order[None, :], (y / l).to(out.dtype.element_ty), mask=mask)\n            stamp(1, me, 5)\n"),
)
edit('ops/experts_triton.py',
("    from ops.linear_triton import _axes, bytes_of\n", "    from ops.linear_triton import _axes, bytes_of\n    from ops.stamps import stamp\n"),
("        block, m = tl.program_id(0), tl.program_id(1)\n", "        block, m = tl.program_id(0), tl.program_id(1)\n        stamp(5, block, 0)\n"),
("        if PDL:\n            tlx.gdc_wait()\n            if SEND:", "        stamp(5, block, 1)\n        if PDL:\n            tlx.gdc_wait()\n            if SEND:"),
("        row = tl.load(x + m * C", "        stamp(5, block, 2)\n        row = tl.load(x + m * C"),
("            send(logits, score, e, E)\n", "            send(logits, score, e, E)\n            stamp(5, block, 4)\n"),
("        if SEND:\n            return\n", "        if SEND:\n            stamp(5, block, 5)\n            return\n"),
("        T, U = tl.cdiv(N, 8 * R), tl.cdiv(K, C * CHUNK)\n        tile = tl.program_id(0)\n", "        T, U = tl.cdiv(N, 8 * R), tl.cdiv(K, C * CHUNK)\n        tile = tl.program_id(0)\n        me = tl.program_id(0)\n        kid: tl.constexpr = 7 if DOWN else 6\n        stamp(kid, me, 0)\n"),
("        count = S\n        if COLS > 1:", "        stamp(kid, me, 1)\n        count = S\n        if COLS > 1:"),
("        squares = tl.zeros((1, 16, 16), tl.float32)\n        if WHOLE:", "        stamp(kid, me, 2)\n        squares = tl.zeros((1, 16, 16), tl.float32)\n        if WHOLE:"),
("        PART: tl.constexpr = 1 if DOWN else 2\n", "        stamp(kid, me, 3)\n        PART: tl.constexpr = 1 if DOWN else 2\n"),
("            tl.store(y + at, out.to(y.dtype.element_ty), mask=stored)\n", "            tl.store(y + at, out.to(y.dtype.element_ty), mask=stored)\n            stamp(kid, me, 5)\n"),
)
