# What is to be measured next, in one call on two GPUs, some 400 s: the tests, then the dense table and 7B's other kinds.
# .dev: this folder's files. .whl/site: from a virtual environment's site-packages datasets, dill, multiprocess,
# _multiprocess, gguf, chardet, httpx2, httpcore2, truststore, lm_eval without what is no code, and all *.dist-info.
R=$PWD; t0=$SECONDS; L=Llama-3; N=32; B="7B $L.1-8B $L.2-1B"
for i in $(seq 0 $((N-1))); do CUDA_VISIBLE_DEVICES=$((i%2)) SHARD=$i/$N PYTHONPATH=$R/.dev:$R/.whl/site PYTHONUNBUFFERED=1 timeout 170 python -m pytest -q -rA -p shard -p no:cacheprovider --continue-on-collection-errors tests > /tmp/t.$i 2>&1 & done
wait; echo "at $((SECONDS-t0))"; cat /tmp/t.* > $OUT/tests.log; grep -c ^PASSED $OUT/tests.log; grep "^FAILED\|^ERROR\|^E  " $OUT/tests.log | cut -c1-150 | head -20
for m in $B; do for k in bf16 int8 int4; do CUDA_VISIBLE_DEVICES=1 ROWS=1,6,8,16 SHORT=1 timeout 100 python .dev/ab2.py $m:$k > /tmp/b.$m$k 2>&1 & done; done; wait; echo "compiled $((SECONDS-t0))"
bash .dev/final.sh
