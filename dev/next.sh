# First, some 130 s on one GPU: rotate.patch (-p0 on a copy of this tree, .exp; squares.patch on that one, .exp2). ncu's samples
# of session 26's kernels (one row and eight): half of all are at the first instruction that uses x, which ptxas asks for behind
# the next step's weights, and loads come back in order, even from L1: so x is made ready when its weights are there already.
# rotate.patch makes the next step's operand between the request for its weights and their use, and x is asked for before them
# (SASS: x at 10 to 14 of 282 instructions, weights at 163 to 180; before, 205 to 211 and 207 to 222). The same bits in the
# interpreter, the kernels', experts' and compile tests pass with it, fewer lines. squares.patch: one row's squares from the same
# x, instead of reading it again before the last products, and for 16 bits and fp8 without a barrier of their own.
R=$PWD; t0=$SECONDS; L=Llama-3; export ROWS=1,6,8,16
J="7B:int4 7B:int8 7B:bf16 7B:fp8 $L.2-1B:int4 $L.2-1B:int8 $L.2-1B:bf16 $L.1-8B:int4"
for T in $R $R/.exp $R/.exp2; do for j in $J; do SHORT=1 TREE=$T timeout 100 python .dev/ab2.py $j > /tmp/ab.$j 2>&1 & done; wait; done; echo "compiled $((SECONDS-t0))"
for j in $J; do for T in $R $R/.exp $R/.exp2; do TAG=$(basename $T) TREE=$T timeout 60 python .dev/ab2.py $j 2>&1 | grep AB; done; done; echo "at $((SECONDS-t0))"
# Whatever of these holds: then configurations again (joint.py, with TREE), as what is best with it is another thing.
exit
# Next, some 200 s on two GPUs: several rows, with rotate.patch and on it ready.patch in .exp: x made ready by a kernel of its own
# (277 -> 217 instructions a step of 7B's w13 in int4 and 8 registers fewer; 16 rows 475 -> 297), for each layer or not. Equal in the
# interpreter; compiled for Hopper; not yet run on a card.
R=$PWD; t0=$SECONDS; L=Llama-3; export PYTHONUNBUFFERED=1 CAND=40 TREE=$R/.exp
A="7B:int4:8 $L.1-8B:int4:8 $L.2-1B:int4:8"; B="7B:int8:8 7B:bf16:8 7B:int4:16"
timeout 150 python .dev/multi.py compile 31 $A $B 2>&1 | tail -5; echo "compiled $((SECONDS-t0))"
CUDA_VISIBLE_DEVICES=0 timeout 190 python .dev/multi.py run 30 $A > $OUT/a.log 2>&1 & CUDA_VISIBLE_DEVICES=1 timeout 190 python .dev/multi.py run 30 $B > $OUT/b.log 2>&1 & wait
cut -c1-1400 $OUT/a.log $OUT/b.log; echo "at $((SECONDS-t0))"
# One row with the same search (joint.py: compile, run): fp8, int4 and int8 of other shapes, as 8B int8 (w13 with no_prefetch, .6 %).
