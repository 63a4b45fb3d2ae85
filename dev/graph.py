# ruff: noqa
"""graph.py MODEL:KIND:ROWS:LAYERS... : replay a step's graph under a profiler"""
import os, sys
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
import torch, bench
from dataclasses import replace
from model import ModelConfig
with torch.inference_mode():
    for job in sys.argv[1:]:
        name, kind, M, n = job.rsplit(":", 3); M = int(M)
        config = replace(ModelConfig.from_name(name), n_layer=int(n), vocab_size=32000)
        torch.manual_seed(0)
        model = bench.random_model(config, kind, torch.device("cuda"), torch.bfloat16)
        cache = model.cache(1, 205, None); tokens = torch.ones(1, M, dtype=torch.int64, device="cuda"); pos = torch.full((1,), 100, device="cuda")
        step = lambda: model(tokens, pos, cache, all_logits=True)
        step(); torch.cuda.synchronize(); g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g): step()
        for _ in range(5): g.replay()
        s, e = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        s.record()
        for _ in range(20): g.replay()
        e.record(); torch.cuda.synchronize(); print("ONE", job, round(s.elapsed_time(e) * 50, 1), "us", flush=True)
        torch.cuda.cudart().cudaProfilerStart()
        g.replay(); torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
        del g, model, cache
