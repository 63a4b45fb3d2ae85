# ruff: noqa
import pickle,sys
r=pickle.load(open(sys.argv[1],'rb')); g=int(sys.argv[2]); p0=float(sys.argv[3]); dt=1.5
f=lambda s:next(v for k,v in r.items() if k[0]==g and s in k[1])
d=f('dramc__read_throughput'); c=f('ctas_launched'); ins=f('sm__inst_executed_realtime.avg.pct'); act=f('sm__cycles_active')
on=[i for i,x in enumerate(d) if x>20]; lo,hi=on[0],on[-1]
a,b=lo+(hi-lo)*15//100,lo+(hi-lo)*85//100
# period: minimise folded variance
best=None
import statistics
for q in range(-60,61):
    P=p0*(1+q/1500); n=int(P/0.75); bins=[[] for _ in range(n)]
    for i in range(a,b): bins[int((i*dt%P)/P*n)].append(d[i])
    v=sum(sum((x-sum(z)/len(z))**2 for x in z) for z in bins if z)
    if best is None or v<best[0]: best=(v,P)
P=best[1]; n=int(P/0.75); print("period",P,"samples",b-a)
bins=[[[],[],[]] for _ in range(n)]
for i in range(a,b):
    for j,s in enumerate((d,c,ins)): bins[int((i*dt%P)/P*n)][j].append(s[i])
m=lambda z:sum(z)/len(z) if z else float('nan')
tot=0; lost=0
for i,z in enumerate(bins):
    x=m(z[0]); tot+=x; print(f"{i*P/n:5.1f} {x:5.1f} ctas {m(z[1]):5.0f} inst {m(z[2]):5.1f}", "#"*int((x if x==x else 0)/2))
print("mean",tot/n)
