# The tests whole on two GPUs, some 160 s. .dev: this folder's files and site.tgz, in it `site` with what pip's list there lacks
# (annotated-types chardet dataproperty datasets defusedxml dill evaluate gguf httpcore2 httpx2 lm-eval mbstrdecoder more-itertools
# multiprocess nltk pathvalidate pydantic pydantic-core (cp312) pytablewriter pytz rouge-score sqlitedict tabledata tcolorpy
# truststore typepy typing-inspection word2number, with their .dist-info).
R=$PWD; t0=$SECONDS; N=32; mkdir -p /tmp/s && tar xzf .dev/site.tgz -C /tmp/s
for i in $(seq 0 $((N-1))); do CUDA_VISIBLE_DEVICES=$((i%2)) SHARD=$i/$N PYTHONPATH=$R/.dev:/tmp/s/site PYTHONUNBUFFERED=1 timeout ${1:-225} python -m pytest -q -rA -p shard -p no:cacheprovider --continue-on-collection-errors tests > /tmp/t.$i 2>&1 & done
wait; echo "at $((SECONDS-t0))"; cat /tmp/t.* > $OUT/tests.log; grep -c ^PASSED $OUT/tests.log; grep "^FAILED\|^ERROR\|^E  " $OUT/tests.log | cut -c1-170 | sort | uniq -c | head -20
# The real model's tests: its GGUF in two pieces (carried in two calls), then convert_hf_checkpoint.py WITH --dtype bf16, as prepare.sh.
