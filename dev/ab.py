# ruff: noqa
import os, sys, time
tree = os.environ["TREE"]; sys.path[:0] = [tree, tree + "/scripts"]
import torch, bench, engine
from dataclasses import replace
from engine import Engine
from model import ModelConfig
engine.CAPTURED = (8,)
short = bool(os.environ.get("SHORT"))
for job in sys.argv[1:]:
    name, kind = job.split(":"); config = ModelConfig.from_name(name)
    model = bench.random_model(replace(config, n_layer=2) if short else config, kind, torch.device("cuda"), torch.bfloat16)
    llm = Engine(model, max_seq_length=205, compile=True)
    with torch.inference_mode():
        def t(f, k=8):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True); llm.state.pos.fill_(100); f(); llm.state.pos.fill_(100); torch.cuda.synchronize(); a.record()
            for _ in range(k): f()
            b.record(); torch.cuda.synchronize(); return a.elapsed_time(b) / k * 1e3 / 8
        r = sorted(t(llm._block) for _ in range(7))
    if not short: print("AB", "old" if "old" in tree else "new", job, round(r[3], 1), "us", [round(x, 1) for x in (r[0], r[-1])], flush=True)
    del llm, model; bench.release(torch.device("cuda"))
