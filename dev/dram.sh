# The reads of DRAM within a step, every 1.5 us; then here: pm.py g500.txt.gz g.pkl; fold.py g.pkl NUMBER US_A_LAYER.
# And instructions with their stalls: ncu --section SourceCounters --warp-sampling-interval 0 ... one.py, then
# ncu -i R.ncu-rep --page source --csv --print-source sass; sass.py FILE NUMBER (or -1: all kernels, a line each).
timeout 100 ncu --graph-profiling graph --profile-from-start off --clock-control none --cache-control none --section PmSampling --pm-sampling-interval 500 -o /tmp/g -f python .dev/graph.py 7B:int4:1:16
ncu -i /tmp/g.ncu-rep --page raw --print-metric-instances values 2>&1 | gzip > $OUT/g500.txt.gz
