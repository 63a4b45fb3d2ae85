# here.sh TREE N JOB...: compile joint.py's candidates (N: all of them if large) on a machine without a GPU, two a second on 2 cores,
# for one with: its search then compiles nothing. The folder's absolute path must be the same on both. Then pack (13 KB a kernel):
#   find .cache -type f \( -name '*.cubin' -o -name '*kernel.json' \) | tar c -T - | xz -T2 -2 > .pack/cache.txz
# and there: tar xJf .pack/cache.txz; KEY=1 TRITON_CACHE_DIR=$PWD/.cache CAND=48 TREE=... python .dev/joint.py run 20 JOB...
# triton36: pip install --target /tmp/triton36 --no-deps triton==3.6.0
T=$1; N=$2; shift 2
KEY=1 FAKE=$N CUDA_VISIBLE_DEVICES= TRITON_CACHE_DIR=$PWD/.cache PYTHONPATH=/tmp/triton36 TREE=$T python .dev/joint.py compile 2 "$@"
