# ruff: noqa
"""ab2.py MODEL:KIND... : steps of one row (and 8), and a hash of their logits"""
import os, sys, hashlib
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
import torch, bench
from dataclasses import replace
from model import ModelConfig
short = os.environ.get("SHORT"); rows = [int(x) for x in os.environ.get("ROWS", "1").split(",")]
with torch.inference_mode():
    for job in sys.argv[1:]:
        name, kind = job.split(":", 1); config = ModelConfig.from_name(name)
        torch.manual_seed(0)
        model = bench.random_model(replace(config, n_layer=1) if short else config, kind, torch.device("cuda"), torch.bfloat16)
        r = {M: sorted(bench.step_time(model, M, 205) * 1e6 for _ in range(1 if short else 4)) for M in rows}
        h = []
        for M in rows:
            cache = model.cache(1, 205, None)
            tokens = torch.arange(M, device="cuda")[None] + 5
            out = model(tokens, torch.zeros(1, dtype=torch.int64, device="cuda"), cache, all_logits=True)
            out = model(tokens + 50, torch.full((1,), M, dtype=torch.int64, device="cuda"), cache, all_logits=True)
            h.append(hashlib.md5(out.cpu().numpy().tobytes()).hexdigest()[:6] + f" {out.std().item():.4f}")
        if not short: print("AB", os.environ.get("TAG"), job, {M: [round(t[0], 1), round(t[-1], 1)] for M, t in r.items()}, h, flush=True)
        del model; bench.release(torch.device("cuda"))
