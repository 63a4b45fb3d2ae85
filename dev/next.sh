# What is to be measured next, in one call of some 280 s on one H200: `python ../dev/ab.py` of this tree (messages) and of
# the one before (F, "The layer before experts scores them"), each with and without even shares of multiprocessors.
# git archive 018c0a6 | tar x -C .dev/F, .dev being carried.
R=$PWD; F=$R/.dev/F; M=Qwen3-30B-A3B
go(){ ( export TREE=$1 TAG=$2 CARVE=$3 BALLAST=$4; timeout 60 python $R/dev/ab.py $5 2>>$OUT/e.log | cut -c1-120 ); }
A="_linear_kernel,_experts_kernel"
all(){ for j in $M:int4 $M:int8; do go $R main "" "" $j; go $F F "" "" $j; go $F Fcarve 100 "" $j; go $F Feven 100 $A $j; done
go $R main "" "" 7B:int4; go $R carve 100 "" 7B:int4; go $R even 100 $A 7B:int4; go $R even 100 $A 7B:int8; go $R main "" "" 7B:int8; }
export SHORT=1; go $R m "" "" $M:int4 & go $R m "" "" $M:int8 & go $F m "" "" $M:int4 & go $F m "" "" $M:int8 & go $R m "" "" 7B:int4 & go $R m "" "" 7B:int8 &
for i in 0 1 2 3 4 5 6 7; do ( cd $F; SHARD=$i/8 PYTHONPATH=$R/dev timeout 100 python -m pytest -q -x -p shard -p no:cacheprovider tests/test_experts.py > $OUT/t$i.log 2>&1 ) & done
wait; unset SHORT; tail -qn 1 $OUT/t?.log; all; tail -3 $OUT/e.log
