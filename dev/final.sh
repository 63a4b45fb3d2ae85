# final.sh [VARIANT [TUNED]]: the dense table on one GPU, 7B's other kinds on the other
t0=$SECONDS; [ "$1" ] && [ "$1" != none ] && { git apply .dev/var/$1.patch || patch -p1 < .dev/var/$1.patch; }; [ "$2" ] && cp .dev/var/tuned.json ops/tuned/h200.json
git diff --stat 2>/dev/null | tail -1
( CUDA_VISIBLE_DEVICES=1 timeout 180 python scripts/bench.py --models 7B --modes fp8 int4:128 --rows 1 8 --json $OUT/h200_7b.json 2>$OUT/e7.log | tail -8 | cut -c1-170 > /tmp/7b.txt; echo "7b at $((SECONDS-t0))" >> /tmp/7b.txt ) &
CUDA_VISIBLE_DEVICES=0 timeout ${3:-200} python scripts/bench.py --modes bf16 int8 int4 --rows 1 6 8 16 --json $OUT/h200.json 2>$OUT/e.log | tail -20 | cut -c1-170; echo "at $((SECONDS-t0))"; wait; cat /tmp/7b.txt; tail -2 $OUT/e.log | cut -c1-200
