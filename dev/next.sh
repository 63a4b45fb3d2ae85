# What is to be measured next, in one call of some 400 s on one H200: correctness of main and of N ("What attention's
# warps leave ..." 933bb16, with fe9ab4c before it), then both, then configurations with sums in one exchange, then tables.
# git archive 933bb16 | tar x -C .dev/N; this folder's files in .dev; .dev being carried.
R=$PWD; N=$R/.dev/N; M=Qwen3-30B-A3B; t0=$SECONDS; L=Llama-3
ab(){ ( export TREE=$1 TAG=$2; timeout ${4:-30} python .dev/ab.py $3 2>>$OUT/e.log | cut -c1-120 ); }
cfg(){ timeout $1 python .dev/cfg.py ${@:2} 2>>$OUT/e.log; }
export SHORT=1; for T in $R $N; do for m in $M:int4 7B:int4 7B:bf16 $L.2-1B:int4 $L.1-8B:int8; do ab $T m $m 110 & done; done
for i in 0 1 2 3 4 5 6 7; do ( cd $N; SHARD=$i/8 PYTHONPATH=$R/.dev timeout 110 python -m pytest -q -p shard -p no:cacheprovider tests/test_experts.py tests/test_linear.py tests/test_kv_cache.py > $OUT/t$i.log 2>&1 ) & done
wait; unset SHORT; tail -qn 1 $OUT/t?.log | cut -c1-100; cat $OUT/t?.log > $OUT/tests.log; rm $OUT/t?.log; grep "^FAILED\|^E  " $OUT/tests.log | head -5; echo "at $((SECONDS-t0))"
for m in $M:int4 7B:int4 7B:bf16 $L.2-1B:int4 $L.1-8B:int8; do ab $R main $m; ab $N N $m; done; echo "at $((SECONDS-t0))"
for m in $L.2-1B:int4 7B:int8; do for i in 0 1 2 3 4 5 6 7; do cfg 45 compile $i 8 $m & done; done; wait; for m in $L.2-1B:int4 7B:int8; do cfg 40 run no $m; done; echo "at $((SECONDS-t0))"
timeout 150 python scripts/bench.py --models 7B --modes bf16 int8 int4 --rows 1 6 8 16 --json $OUT/h200.json 2>>$OUT/e.log | tail -4; tail -2 $OUT/e.log; echo "at $((SECONDS-t0))"
