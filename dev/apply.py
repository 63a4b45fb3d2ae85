# ruff: noqa
"""apply.py: put picks into ops/tuned/h200.json. Lines: kind rows N K tile C W regs P share"""
import json, sys
sys.path[:0] = ["."]
from ops import tuning
p = "ops/tuned/h200.json"
d = json.load(open(p))
for line in sys.stdin:
    if not line.strip(): continue
    kind, rows, N, K, tile, C, W, regs, P, share = line.split()
    row = {"kind": kind, "max_rows": int(rows), "N": int(N), "K": int(K), "tile_rows": int(tile), "k_repeat": int(C), "num_warps": int(W), "maxnreg": int(regs), "ctas_per_sm": int(P)} | ({"share": True} if share == "1" else {})
    same = [i for i, r in enumerate(d["linear"]) if (r["kind"], r["max_rows"], r["N"], r["K"]) == (kind, int(rows), int(N), int(K))]
    if same:
        old = d["linear"][same[0]]
        if old.get("no_prefetch"): row["no_prefetch"] = True
        d["linear"][same[0]] = row
    else:
        like = [i for i, r in enumerate(d["linear"]) if (r["kind"], r["max_rows"]) == (kind, int(rows))]
        d["linear"].insert(like[-1] + 1, row)
lines = [f" {json.dumps(k)}: {tuning._text(v)}" for k, v in d.items()]
open(p, "w").write("{\n" + ",\n".join(lines) + "\n}\n")
