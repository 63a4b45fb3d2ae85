# Next on a card, in order. What was measured on cards in this session stands in the closing note.
# 1. blocks.patch (git apply; on this tree): a block's graph hands out the tokens that it drew, where now a gather is launched by itself
#    between two graphs. That launch costs 2 us a step by itself (1B int4: a block 299.6, the whole decode 301.5), and see 2. On a CPU the tests
#    pass (generate, batches, speculate, ahead, model). A/B: states.py's "whole" with and without it (7B int8, 1B int8, 1B int4).
# 2. A card has two states behind an engine (7B int8: 1,647 and 1,677 us a step; 8 rows 1,949 and 2,048): an eager kernel before a graph's
#    replay sets the slow one, a copy to the host the fast one, and replays alone leave it as it is. It is not the clock, not the L2 fetch
#    granularity (cuCtxGetLimit says 128 in both; 64 is 1,691), not carve-outs' preference (-1, 8, 16 % alike), not the token, position or cache.
#    Without an engine an eager kernel does not set it. int4 has 3 us of it, 1B 1 to 2. states.py has the kernels' parts in both.
#    7B int8's w13 and wqkv are the only ones of several waves (ctas_per_sm 0): SLOW=1 joint.py run ... searches in the slow state.
# 3. fp8 of 16 rows: 2.41 ms at 75c7cb0 (gain asked for early), 2.51 now and before. AHEAD for it: 1,272 instead of 1,352 instructions, not run.
# 4. joint.py on 16 rows; 8 rows of other shapes; int8's rows (FULL lost 1.6 % of 8 rows of int8 with the old configurations, not searched with it).
# 5. Eight rows: a step's operand (16 lifts, 16 gains, 12 of 28 HMMAs, 12 LDGs: 80 of 277 instructions of int4) is made by every warp of every
#    program; made once a program, in shared memory, it would be 4 LDS.
# Without gain today: low nibbles where they are (nibbles.patch of 9551874: 7B -.2 %, 8B +1.5 %), FULL in 8 and 16 bits, the sampling kernels
# with 1, 2 or 8 warps (303.2, 300.4, 299.4 us a block's step to 299.6), carve-outs of 0, 32, 64 and 100 %.
