# What is to be measured next, in one call of some 400 s on one H200; this folder's files in .dev, .dev being carried, and
# the tokenizer of SmolLM2 in .dev/tok. First what was cut short: the tests on the card. (Modules that are missing there
# end a collection of all tests: name the files.) At most 8 files come back.
R=$PWD; t0=$SECONDS; L=Llama-3
FILES="tests/test_kernels.py tests/test_linear.py tests/test_experts.py tests/test_kv_cache.py tests/test_many_rows.py tests/test_speculate.py tests/test_batches.py tests/test_generate.py tests/test_prefill_cudnn.py"
cfg(){ timeout $1 python .dev/cfg.py ${@:2} 2>>$OUT/e.log; }
for i in 0 1 2 3 4 5 6 7 8 9; do ( SHARD=$i/10 PYTHONPATH=$R/.dev PYTHONUNBUFFERED=1 timeout 240 python -m pytest -q -rfE -p shard -p no:cacheprovider $FILES > $OUT/t$i.log 2>&1 ) & done
for r in 1 8 16; do for i in 0 1; do ROWS=$r cfg 210 compile $i 2 & done; done
wait; tail -qn 1 $OUT/t?.log | cut -c1-100; cat $OUT/t?.log > $OUT/tests.log; rm $OUT/t?.log; grep "^FAILED\|^ERROR\|^E  " $OUT/tests.log | cut -c1-150 | head -20; echo "at $((SECONDS-t0))"
for r in 1 8 16; do ROWS=$r cfg 60 apply > $OUT/cfg$r.txt; grep BEST $OUT/cfg$r.txt; done; echo "at $((SECONDS-t0))"
timeout 200 python scripts/bench.py --modes bf16 int8 int4 --rows 1 6 8 16 --json $OUT/h200.json 2>>$OUT/e.log | tail -20 | cut -c1-170; echo "at $((SECONDS-t0))"
