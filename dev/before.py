# ruff: noqa
"""ba.py MODEL:KIND:ROWS : steps prefetched before the wait, and ahead in the loop"""
import os, sys
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
import torch, bench
from dataclasses import replace
from model import ModelConfig
short = os.environ.get("SHORT")
MODES = ((1, 0), (2, 0), (4, 0))
def parts(model):
    roles = {}
    for l in model.layers:
        for role, m in (("wqkv", l.attention.wqkv), ("wo", l.attention.wo), ("w13", l.feed_forward.w13), ("w2", l.feed_forward.w2)):
            roles.setdefault(role, []).append(m)
    return roles | {"out": [model.output]}
with torch.inference_mode():
    for job in sys.argv[1:]:
        name, kind, M = job.rsplit(":", 2); M = int(M)
        config = ModelConfig.from_name(name)
        torch.manual_seed(0)
        model = bench.random_model(replace(config, n_layer=1) if short else config, kind, torch.device("cuda"), torch.bfloat16)
        roles = parts(model)
        def t(**kw):
            for role, ms in roles.items():
                for m in ms: m.ba = kw.get(role, (0, 0))
            return min(bench.step_time(model, M, 205) for _ in range(1 if short else 2)) * 1e6
        base = min(t(), t())
        if short:
            for m in MODES: t(**dict.fromkeys(roles, m))
            continue
        print("BA", job, f"base {base:.1f}", end="; ")
        for m in MODES: print(m, f"{(t(**dict.fromkeys(roles, m)) / base - 1) * 100:+.1f}%", end="; ")
        cur, best = {}, base
        for role in ("w13", "w2", "wqkv", "wo", "out"):
            print(role, end=": ")
            found = []
            for m in MODES:
                x = t(**cur, **{role: m}); found.append((x, m)); print(m, f"{(x / base - 1) * 100:+.1f}%", end=" ")
            x, m = min(found)
            if x < best * .9985: best, cur = x, {**cur, role: m}
        print(f"BEST {base:.1f} -> {best:.1f} ({(best / base - 1) * 100:+.1f}%)", cur, flush=True)
        del model, roles; bench.release(torch.device("cuda"))
