# ruff: noqa
"""Where a step of M rows spends its time: ends of kernels under CUPTI, graph replays. prof.py MODEL:KIND ROWS..."""
import os, sys
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
import torch, bench, collections, statistics
from model import ModelConfig
job, *rows = sys.argv[1:]
name, kind = job.split(":", 1); config = ModelConfig.from_name(name)
torch.manual_seed(0)
with torch.inference_mode():
    device = torch.device("cuda")
    model = bench.random_model(config, kind, device, torch.bfloat16)
    for M in map(int, rows):
        cache = model.cache(1, 205, None); tokens = torch.ones(1, M, dtype=torch.int64, device=device); pos = torch.full((1,), 100, device=device)
        step = lambda: model(tokens, pos, cache, all_logits=True)
        step(); torch.cuda.synchronize(); g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g): step()
        for _ in range(5): g.replay()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            for _ in range(6): g.replay()
            torch.cuda.synchronize()
        ev = sorted(((e.time_range.start, e.time_range.end, e.name) for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA), key=lambda e: e[1])
        n = len(ev) // 6; ev = ev[2 * n:]
        d = collections.defaultdict(list)
        for r in range(3):
            one = ev[r * n:(r + 2) * n]
            for i in range(n):
                d[i].append(one[i + 1][1] - one[i][1])
        med = [statistics.median(d[i]) for i in range(n)]
        names = [e[2] for e in ev[1:n + 1]]
        at0 = next(i for i in range(n) if "attention" in names[i]); names, med = names[at0 - 1:] + names[:at0 - 1], med[at0 - 1:] + med[:at0 - 1]  # begins with wqkv
        L = config.n_layer; total = sum(med)
        per = (n - 2) // L
        # the last kernels belong to the output layer
        print(f"PROF {job} rows {M}: {n} kernels, {total:.0f} us;", "layer kernels by end-to-end us:", flush=True)
        mid = range(per * (L // 4), per * (3 * L // 4))
        k = collections.defaultdict(list)
        for i in mid: k[i % per].append(med[i])
        print("   ", [(names[per * (L // 4) + ((j - per * (L // 4)) % per)][:18], round(statistics.mean(v), 2)) for j, v in sorted(k.items())], "sum", round(sum(statistics.mean(v) for v in k.values()), 2))
        print("    tail", [(names[i][:18], round(med[i], 1)) for i in range(n - 4, n)], flush=True)
        del g, cache
