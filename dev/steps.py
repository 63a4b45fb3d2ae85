# ruff: noqa
"""steps.py MODEL:KIND... : steps of ROWS rows"""
import os, sys
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
import torch, bench
from dataclasses import replace
from model import ModelConfig
short = os.environ.get("SHORT")
if os.environ.get("APART"):
    import ops.attention_triton as A
    real = A.exchanges; A.exchanges = lambda h, W, rows, own, DP: own < rows and real(h, W, rows, own, DP)
rows = [int(x) for x in os.environ["ROWS"].split(",")]
with torch.inference_mode():
    for job in sys.argv[1:]:
        name, kind = job.split(":", 1); config = ModelConfig.from_name(name)
        torch.manual_seed(0)
        model = bench.random_model(replace(config, n_layer=1) if short else config, kind, torch.device("cuda"), torch.bfloat16)
        r = {M: min(bench.step_time(model, M, 205) for _ in range(1 if short else 3)) * 1e6 for M in rows}
        if not short: print("STEPS", os.environ.get("TAG"), job, {M: round(t, 1) for M, t in r.items()}, {M: round(t / r[rows[0]], 3) for M, t in r.items()}, flush=True)
        del model; bench.release(torch.device("cuda"))
