# ruff: noqa
"""python dev/steps.py MODEL:MODE ... in cwd's tree: microseconds of a step."""
import os, sys
sys.path[:0] = [os.getcwd(), os.getcwd() + "/scripts"]
from dataclasses import replace
import bench, ops, torch
from measure import weight_bytes
from model import ModelConfig
device = torch.device("cuda")
rows = [int(r) for r in os.environ.get("ROWS", "1").split()]
tag = os.environ.get("TAG", "")
for job in sys.argv[1:]:
    name, mode = job.split(":", 1)
    config = ModelConfig.from_name(name)
    if os.environ.get("SHORT"):
        config = replace(config, n_layer=2)
    with torch.inference_mode():
        torch.manual_seed(0)
        model = bench.random_model(config, mode, device, torch.bfloat16)
        for r in rows:
            us = bench.step_time(model, r, 400) * 1e6
            print(tag, job, r, "rows", f"{us:.0f} us, {weight_bytes(model, r) / ops.read_bandwidth(device) * 1e6 / us:.3f}", flush=True)
        if tag:
            cache, out = model.cache(1, 400, None), []
            for i in range(300):
                out.append(model(torch.full((1, 1), i * 7 % 1000, device=device), torch.full((1,), i, device=device), cache)[0, -1].float().cpu())
            out = torch.stack(out)
            torch.save(out, f"/tmp/logits_{tag}_{job.replace(':','_')}.pt")
            other = f"/tmp/logits_base_{job.replace(':','_')}.pt"
            if tag != "base" and os.path.exists(other):
                o = torch.load(other)
                d = (o - out).abs().amax(-1)
                print(tag, job, "first tokens differ by", [round(v, 4) for v in d[:12].tolist()], "median", float(d.median()))
                print(tag, job, "max difference", float((o - out).abs().max()), "of", float(o.abs().max()), "same argmax", float((o.argmax(-1) == out.argmax(-1)).float().mean()))
    del model
    bench.release(device)
