# Next on a card, in order.
# 1. bench.py's steps of int8 and fp8 are 1 to 2 % longer than ab2.py's (7B int8 1,677 to about 1,640), those of 16 bits are not:
#    perhaps the clock under a load of some seconds. One card, ab2.py of db75de6 and main, before and behind 5 s of replays, with
#    nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,clocks_throttle_reasons.active --format=csv -lms 200 beside it.
#    If it is the clock: joint.py has to pick behind such a load, as the table is measured so.
# 2. joint.py on 16 rows (88e54d0: the order of db75de6, its configurations), 8 rows of other shapes, compiled here (here.sh).
# 3. Eight rows of int4 without DRAM (weights at one place, from L1): 1,370 us of 1,621; int8 1,630 of 1,993; 16 bits 2,090 of 3,509:
#    so half of the gap between 8 rows and 1 is instructions and their latency, not loads of x (x of one place: 1,615; the same
#    8 KB for all rows). What is left there is fewer instructions: ready.patch of cf2b6a2 has 217 for 277, and wants its sums and
#    factors from the kernel before.
