# Next on a card, in order. Patches: -p0 on a copy of this tree.
# 1. full.patch: rows of a full or shared tile are not clamped to N, so that they lie at constant distances, which are part of loads'
#    instructions: 16 address registers pairs and 12 of 301 instructions fewer a step (7B's w13 in int4, one row), and programs of 64
#    rows in 120 registers, four a multiprocessor, without spills (168 and three, now). nibbles.patch: int4's low nibbles are multiplied
#    where they are, 16 times afterwards: 281 of 301 with both. The same bits in the interpreter, kernels' and compile tests pass.
#    A/B by ab2.py (7B, 8B, 1B int4; int8), then joint.py on it (here.sh compiles before; P=5 too), as other configurations fit now.
#    The experts' kernel clamps likewise; tests/test_assembly.py still has the bytes before nibbles.patch.
# 2. bench.py's steps of int8 and fp8 are 1 to 2 % longer than ab2.py's (7B int8 1,677 to about 1,640), those of 16 bits are not:
#    perhaps the clock under a load of some seconds. One card, ab2.py of db75de6 and main, before and behind 5 s of replays, with
#    nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,clocks_throttle_reasons.active --format=csv -lms 200 beside it.
#    If it is the clock: joint.py has to pick behind such a load, as the table is measured so.
# 3. _sample_kernel with 1 or 2 warps (its counts then need no barrier): some 5 us of a step.
# 4. joint.py on 16 rows (88e54d0: the order of db75de6, its configurations), 8 rows of other shapes.
# 5. Eight rows of int4 without DRAM (weights at one place, from L1): 1,370 us of 1,621; int8 1,630 of 1,993; 16 bits 2,090 of 3,509:
#    so half of the gap between 8 rows and 1 is instructions and their latency, not loads of x (x of one place: 1,615).
