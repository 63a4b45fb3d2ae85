# ruff: noqa
"""The tail of a step as it is generated: ends of kernels under CUPTI."""
import os, sys; sys.path[:0] = [os.getcwd(), os.getcwd() + "/scripts"]
import torch, bench, engine, collections, statistics
from engine import Engine
from model import ModelConfig
from sampling import Sampler
engine.CAPTURED = (8,)
name, kind = sys.argv[1].split(":", 1)
model = bench.random_model(ModelConfig.from_name(name), kind, torch.device("cuda"), torch.bfloat16)
llm = Engine(model, max_seq_length=205, compile=True, sampler=Sampler(temperature=.8, top_k=200))
with torch.inference_mode():
    llm.state.pos.fill_(100); llm._block(); torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        llm._block(); llm._block(); torch.cuda.synchronize()
ev = sorted(((e.time_range.start, e.time_range.end, e.name) for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA), key=lambda e: e[1])
last = [i for i, e in enumerate(ev) if "sample" in e[2]]
d = collections.defaultdict(list)
for i in last[2:-1]:
    for j in range(-4, 4):
        d[j].append((ev[i + j][1] - ev[i + j - 1][1], ev[i + j][2][:22], ev[i + j][1] - ev[i + j][0]))
print("TAIL", name, kind, [(v[0][1], round(statistics.median(x[0] for x in v), 2), round(statistics.median(x[2] for x in v), 2)) for j, v in sorted(d.items())], "step", round(statistics.median(ev[b][1] - ev[a][1] for a, b in zip(last[1:], last[2:])), 1), flush=True)
