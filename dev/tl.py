# ruff: noqa
"""A layer's timeline: python tl.py MODEL:KIND."""
import os, sys
tree = os.environ["TREE"]; sys.path[:0] = [tree, tree + "/scripts"]
import torch
buf = torch.zeros(9 * 1024 * 16, dtype=torch.int64, device="cuda")
short = os.environ.get("SHORT")
# the same address in the process that compiles ahead and in this: the first allocation of a process
os.environ["STAMPS"] = str(buf.data_ptr())
import bench, engine, triton
from dataclasses import replace
from engine import Engine
from model import ModelConfig
engine.CAPTURED = (8,)
NAMES = ["wqkv", "attention", "wo", "w13", "w2", "router", "up", "down"]
for job in sys.argv[1:]:
    name, kind = job.split(":", 1); config = ModelConfig.from_name(name)
    torch.manual_seed(0)
    model = bench.random_model(replace(config, n_layer=2) if short else config, kind, torch.device("cuda"), torch.bfloat16)
    llm = Engine(model, max_seq_length=205, compile=True)
    with torch.inference_mode():
        def t(f, k=8):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True); llm.state.pos.fill_(100); f(); llm.state.pos.fill_(100); torch.cuda.synchronize(); a.record()
            for _ in range(k): f()
            b.record(); torch.cuda.synchronize(); return a.elapsed_time(b) / k * 1e3 / 8
        llm._block(); torch.cuda.synchronize()
        import fcntl; lock = open("/tmp/lock", "w"); fcntl.flock(lock, fcntl.LOCK_EX)
        r = sorted(t(llm._block) for _ in range(5))
        print("TL", job, "step", round(r[2], 1), "us; address", os.environ["STAMPS"], flush=True)
        shots = []
        for _ in range(9):
            buf.zero_(); llm.state.pos.fill_(90); llm._block(); torch.cuda.synchronize(); shots.append(buf.view(9, 1024, 8, 2).clone().cpu())
    fcntl.flock(lock, fcntl.LOCK_UN)
    for shot in shots[3:9:2]:
        g0 = None
        for k, what in sorted(enumerate(NAMES), key=lambda e: int(shot[e[0], :, 0, 0][shot[e[0], :, 0, 0] > 0].min()) if (shot[e[0], :, 0, 0] > 0).any() else 0):
            s = shot[k]; s = s[s[:, 0, 0] > 0]
            if not len(s): continue
            g0 = int(s[:, 0, 0].min()) if g0 is None else g0
            g = (s[..., 0] - g0).float()
            done = s[s[:, 5, 0] > 0]
            row = []
            for n in range(6):
                v = g[:, n][s[:, n, 0] > 0]
                row.append(f"{int(v.min())}/{int(v.median())}/{int(v.max())}" if len(v) else "-")
            inner = []
            for a, b in ((2, 3), (3, 4), (4, 5), (2, 5)):
                ok = (s[:, a, 1] > 0) & (s[:, b, 1] > 0)
                v = (s[ok, b, 1] - s[ok, a, 1]).float() / 1.755
                inner.append(f"{int(v.min())}/{int(v.median())}/{int(v.max())}" if len(v) else "-")
            sms = s[:, 7, 1].bincount()
            print(f"  {what:9} n {len(s):4} on {int((sms > 0).sum())} SMs, most {int(sms.max())} | start {row[0]} wait {row[1]} go {row[2]} x {row[3]} summed {row[4]} end {row[5]} | clock go-x {inner[0]} x-summed {inner[1]} -end {inner[2]} go-end {inner[3]}")
        print()
    del llm, model; bench.release(torch.device("cuda"))
