# ruff: noqa
"""one.py MODEL:KIND:ROWS... : one step of one layer each under a profiler"""
import os, sys
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
import torch, bench
from dataclasses import replace
from model import ModelConfig
with torch.inference_mode():
    for job in sys.argv[1:]:
        name, kind, M = job.rsplit(":", 2); M = int(M)
        config = replace(ModelConfig.from_name(name), n_layer=1, vocab_size=32000)
        torch.manual_seed(0)
        model = bench.random_model(config, kind, torch.device("cuda"), torch.bfloat16)
        cache = model.cache(1, 205, None); tokens = torch.ones(1, M, dtype=torch.int64, device="cuda"); pos = torch.full((1,), 100, device="cuda")
        model(tokens, pos, cache, all_logits=True); torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        model(tokens, pos, cache, all_logits=True); torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
        print("ONE", job, flush=True)
