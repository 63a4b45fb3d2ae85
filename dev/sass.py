# ruff: noqa
import csv,sys
rows=list(csv.reader(open(sys.argv[1] if len(sys.argv)>2 else '/tmp/nc/source.csv')))
ks=[];cur=None
for r in rows:
    if r and r[0]=="Kernel Name": cur=[r[1],None,[]]; ks.append(cur)
    elif r and r[0]=="Address": cur[1]=r
    elif cur and len(r)>10: cur[2].append(r)
which=int(sys.argv[-1])
if which<0:
    for i,k in enumerate(ks):
        h=k[1]; st=[j for j,c in enumerate(h) if c.startswith("stall_") and "(" not in c]
        tot={h[j]:sum(int(r[j] or 0) for r in k[2]) for j in st}; T=sum(tot.values())
        print(i,k[0],len(k[2]),T,{a[6:]:round(b/T,3) for a,b in sorted(tot.items(),key=lambda x:-x[1])[:8]}, "instr", sum(int(r[5]) for r in k[2]))
else:
    k=ks[which]; h=k[1]; st=[j for j,c in enumerate(h) if c.startswith("stall_") and "(" not in c]
    for n,r in enumerate(k[2]):
        s=sorted(((int(r[j] or 0),h[j][6:]) for j in st),reverse=True)[:2]
        print(n,r[1][:70].ljust(70),r[2].rjust(6),r[5].rjust(7),s)
