# What is to be measured next, in one call on two GPUs, some 400 s: the tests, then the dense table and 7B's other kinds.
# .dev: this folder's files. .whl/site: from a virtual environment's site-packages datasets, dill, multiprocess,
# _multiprocess, gguf, chardet, httpx2, httpcore2, truststore, lm_eval without what is no code, and all *.dist-info.
R=$PWD; t0=$SECONDS; L=Llama-3; N=32; B="7B $L.1-8B $L.2-1B"
for i in $(seq 0 $((N-1))); do CUDA_VISIBLE_DEVICES=$((i%2)) SHARD=$i/$N PYTHONPATH=$R/.dev:$R/.whl/site PYTHONUNBUFFERED=1 timeout 170 python -m pytest -q -rA -p shard -p no:cacheprovider --continue-on-collection-errors tests > /tmp/t.$i 2>&1 & done
wait; echo "at $((SECONDS-t0))"; cat /tmp/t.* > $OUT/tests.log; grep -c ^PASSED $OUT/tests.log; grep "^FAILED\|^ERROR\|^E  " $OUT/tests.log | cut -c1-150 | head -20
for m in $B; do for k in bf16 int8 int4; do CUDA_VISIBLE_DEVICES=1 ROWS=1,6,8,16 SHORT=1 timeout 100 python .dev/ab2.py $m:$k > /tmp/b.$m$k 2>&1 & done; done; wait; echo "compiled $((SECONDS-t0))"
bash .dev/final.sh
# In a call of its own, before the tests, some 150 s on one GPU, with ahead.patch in a copy of the tree, .exp: 16-bit weights
# asked for ahead, which gained 3 % of 1B's step.
J="$L.2-1B:bf16:1 7B:bf16:1 $L.1-8B:bf16:1 $L.2-1B:int8:1"
for j in $J; do SHORT=1 TREE=$R/.exp timeout 100 python .dev/ahead.py $j > /tmp/c.$j 2>&1 & done; wait
for j in $J; do TREE=$R/.exp timeout 60 python .dev/ahead.py $j 2>&1 | cut -c1-1500; done; echo "at $((SECONDS-t0))"
# In a call of its own, some 200 s on one GPU: configurations together (joint.py), and a feed-forward with the next layer's
# wqkv in one launch (chain.py: equal in the interpreter, compiled, not yet run on a card; a deadlock ends by timeout).
J="7B:int4 $L.2-1B:int4 7B:int8"
for i in 0 1 2 3 4 5 6 7; do timeout 100 python .dev/joint.py compile $i 8 $J > /tmp/j.$i 2>&1 & done
for j in $J 7B:bf16; do timeout 100 python .dev/chain.py warm $j > /tmp/c.$j 2>&1 & done; wait; cat /tmp/j.* /tmp/c.* | cut -c1-200 | tail -30; echo "compiled $((SECONDS-t0))"
for j in $J 7B:bf16; do timeout 40 python .dev/chain.py run $j 2>&1 | tail -8; done; echo "at $((SECONDS-t0))"
timeout 150 python .dev/joint.py run 30 $J; echo "at $((SECONDS-t0))"
