# The table and an 8B's start on two GPUs: some 40 s to compile and to write the 8B, 75 s for the dense table, 45 s beside it.
R=$PWD; t0=$SECONDS; L=Llama-3; B="7B $L.1-8B $L.2-1B"
(CUDA_VISIBLE_DEVICES=1 python .dev/mk.py Llama-3.1-8B /tmp/ck8 > /tmp/mk.log 2>&1) &
for m in $B; do for k in bf16 int8 int4; do CUDA_VISIBLE_DEVICES=0 ROWS=1,6,8,16 SHORT=1 timeout 60 python .dev/ab2.py $m:$k > /tmp/b.$m$k 2>&1 & done; done
for k in fp8 int4:128; do CUDA_VISIBLE_DEVICES=0 ROWS=1,6,8,16 SHORT=1 timeout 60 python .dev/ab2.py 7B:$k > /tmp/b.7$k 2>&1 & done; wait; echo "ready $((SECONDS-t0))"
( export CUDA_VISIBLE_DEVICES=1; T="taskset -c 8-31"
$T timeout 60 python scripts/bench.py --models 7B --modes fp8 int4:128 --rows 1 6 8 16 --json $OUT/h200_7b.json 2>$OUT/e7.log | tail -4 | cut -c1-150
cat /tmp/ck8/*/model.pth > /dev/null; unset PYTHONDONTWRITEBYTECODE; export TRITON_CACHE_DIR=/tmp/cold1 PYTHONPYCACHEPREFIX=/tmp/pyc
for i in 0 1 2 3; do timeout 30 $T python .dev/first.py python generate.py --checkpoint_path /tmp/ck8/Llama-3.1-8B/model.pth --compile --stream --prompt Hello --max_new_tokens 8; done ) > /tmp/other.log 2>&1 &
CUDA_VISIBLE_DEVICES=0 taskset -c 0-7 timeout 185 python scripts/bench.py --modes bf16 int8 int4 --rows 1 6 8 16 --json $OUT/h200.json 2>$OUT/e.log | tail -20 | cut -c1-150; echo "dense at $((SECONDS-t0))"; wait; cat /tmp/other.log
