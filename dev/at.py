# ruff: noqa
"""at.py MODEL:KIND : what attention's other programs do, and its registers"""
import os, sys
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
import torch, bench
from dataclasses import replace
from model import ModelConfig
import ops.attention_triton as A
short = os.environ.get("SHORT")
P = A.Plan
PLANS = {"-": None, "k16r168": P(132, 8, 16, 1, 168, split_keys=256), "k16": P(132, 8, 16, 1, None, split_keys=256), "k16r128": P(132, 8, 16, 1, 128, split_keys=256), "w4k32": P(132, 4, 32, 1, None, split_keys=256), "r168": P(132, 8, 32, 1, 168, split_keys=256), "k16t2": P(132, 8, 16, 2, None, split_keys=256), "own128": P(264, 8, 16, 1, 168)}
MODES = [(0, True, "-"), (1, True, "-"), (1, False, "-"), (2, True, "-"), (2, False, "-"), (0, True, "k16r168"), (1, False, "k16r168"), (0, True, "k16"), (0, True, "k16r128"), (1, False, "k16r128"), (0, True, "w4k32"), (0, True, "r168"), (0, True, "k16t2"), (0, True, "own128")]
plan = A.plan
def pick(kind, DP, S, groups):
    own = plan(kind, DP, S, groups)
    return PLANS[A.WHICH] or own
A.plan = pick
with torch.inference_mode():
    for job in sys.argv[1:]:
        name, kind = job.split(":", 1); config = ModelConfig.from_name(name)
        torch.manual_seed(0)
        model = bench.random_model(replace(config, n_layer=2) if short else config, kind, torch.device("cuda"), torch.bfloat16)
        res = []
        for m in MODES:
            A.HELP, A.ON, A.WHICH = m
            res.append((m, *(min(bench.step_time(model, 1, n) for _ in range(1 if short else 2)) * 1e6 for n in (205, 404))))
        if not short: print("AT", job, f"{res[0][1]:.1f} {res[0][2]:.1f}", [(m, f"{(t / res[0][1] - 1) * 100:+.1f} {(u / res[0][2] - 1) * 100:+.1f}") for m, t, u in res[1:]], flush=True)
        del model; bench.release(torch.device("cuda"))
