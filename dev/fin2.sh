# The table and an 8B's start on one H200, 162 s: 36 to compile and to write the 8B, 74 dense, 22 the others, 29 four starts.
R=$PWD; t0=$SECONDS; L=Llama-3; B="7B $L.1-8B $L.2-1B"; cp .dev/g1 /tmp/g1
(timeout 60 python .dev/mk.py $L.1-8B /tmp/ck8 > /tmp/mk.log 2>&1) &
for m in $B; do for k in bf16 int8 int4; do ROWS=1,6,8,16 SHORT=1 timeout 90 python .dev/ab2.py $m:$k > /tmp/b.$m$k 2>&1 & done; done
for k in fp8 int4:128; do ROWS=1,6,8,16 SHORT=1 timeout 90 python .dev/ab2.py 7B:$k > /tmp/b.7$k 2>&1 & done; wait; echo "ready $((SECONDS-t0))"
timeout 185 python scripts/bench.py --modes bf16 int8 int4 --rows 1 6 8 16 --json $OUT/h200.json 2>$OUT/e.log | tail -20 | cut -c1-150; echo "dense at $((SECONDS-t0))"
timeout 60 python scripts/bench.py --models 7B --modes fp8 int4:128 --rows 1 6 8 16 --json $OUT/h200_7b.json 2>$OUT/e7.log | tail -4 | cut -c1-150; echo "7B at $((SECONDS-t0))"
cat /tmp/ck8/*/model.pth > /dev/null; unset PYTHONDONTWRITEBYTECODE; export TRITON_CACHE_DIR=/tmp/cold1 PYTHONPYCACHEPREFIX=/tmp/pyc
for i in 0 1 2 3; do timeout 30 python .dev/first.py python generate.py --checkpoint_path /tmp/ck8/$L.1-8B/model.pth --compile --stream --prompt Hello --max_new_tokens 8; done; echo "at $((SECONDS-t0))"
