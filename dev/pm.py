# ruff: noqa
import gzip,re,sys
t=gzip.open(sys.argv[1],'rt').read()
g=-1; out={}
name=None
for l in t.splitlines():
    if l.strip().startswith("graph ("): g+=1; name=None; continue
    m=re.match(r"\s+([A-Za-z_][\w.:]*\.\w[\w.]*)\s+(\S+)?\s+\S*",l)
    if l[:98].strip() and not l.strip().startswith(("Metric","---")):
        name=l[:95].strip()
    if name and len(l)>100:
        vals=l[110:].strip()
        out.setdefault((g,name),[]).append(vals)
import json
res={}
for k,v in out.items():
    s=" ".join(v).replace("(","").replace(")","")
    xs=[float(x.replace(',','')) for x in s.split(";") if re.match(r"^\s*[\d.,]+\s*$",x)]
    res[k]=xs
for k,v in res.items(): print(k,len(v), (round(sum(v)/max(1,len(v)),2)), max(v) if v else None)
import pickle; pickle.dump(res,open(sys.argv[2],'wb'))
