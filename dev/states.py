# ruff: noqa
"""states.py MODEL:KIND... : steps in the two states that a card has behind an engine, and each kernel's part of them"""
import os, sys, json, statistics, itertools, collections
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
import torch, bench, ops
from torch.profiler import profile, ProfilerActivity
from model import ModelConfig
from engine import Engine
from sampling import Sampler
d = torch.device("cuda")
def timed(run, n=14):
    def m():
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        for k in marks: run(); k.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) * 1e3
    return min(m() for _ in range(2))
def capture(f):
    f(); g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): f()
    return g
def prof(run):  # kernel: (how many, median duration, median and mean time from the end of the kernel before to its end)
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(5): run()
        torch.cuda.synchronize()
    p.export_chrome_trace("/tmp/trace.json")
    ev = sorted((e for e in json.load(open("/tmp/trace.json"))["traceEvents"] if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    out, last = collections.defaultdict(list), None
    for e in ev:
        end = e["ts"] + e["dur"]
        if last is not None: out[e["name"][:16], tuple(e["args"]["grid"]), tuple(e["args"]["block"]), e["args"].get("registers per thread"), e["args"].get("shared memory")].append((e["dur"], end - last))
        last = end
    return {k: (len(v), round(statistics.median(x[0] for x in v), 2), round(statistics.median(x[1] for x in v), 2), round(statistics.mean(x[1] for x in v), 2)) for k, v in out.items()}
with torch.inference_mode():
    for job in sys.argv[1:]:
        name, kind = job.split(":", 1); config = ModelConfig.from_name(name)
        torch.manual_seed(0)
        model = bench.random_model(config, kind, d, torch.bfloat16)
        c2 = model.cache(1, 205, None); pos = torch.full((1,), 100, dtype=torch.int64, device=d); tk = torch.full((1, 1), 77, dtype=torch.int64, device=d); t8 = tk.expand(1, 8).contiguous()
        other = torch.zeros(1, dtype=torch.int64, device=d); host = torch.empty(1, dtype=torch.int64, pin_memory=True)
        def four(t=tk):
            for _ in range(4): model(t, pos, c2, all_logits=True)
        T = lambda f: round(timed(f) / 4, 1)
        g = capture(four); fill = lambda g=None: (other.fill_(3), g.replay()); d2h = lambda g=None: (host.copy_(other, non_blocking=True), g.replay())
        print(job, "no engine: alone", T(g.replay), "fill", T(lambda: fill(g)), flush=True)
        llm = Engine(model, batch_size=1, max_seq_length=205, sampler=Sampler(), compile=True)
        w = sorted(bench.whole(llm, [[1, 5, 7, 9, 11]], 200) for _ in range(6))[2]
        print(job, "whole, us a step", round((w[0] - w[1]) / 199 * 1e6, 1), "prefill", round(w[1] * 1e6), flush=True)
        e = capture(lambda: four(t8)); g = capture(four)
        for tag, h in (("1 row", g), ("8 rows", e)):
            print(job, tag, "d2h", T(lambda: d2h(h)), "alone", T(h.replay), "fill", T(lambda: fill(h)), "alone", T(h.replay), "d2h", T(lambda: d2h(h)), flush=True)
        timed(lambda: d2h(g)); a = prof(lambda: d2h(g)); x = T(g.replay); timed(lambda: fill(g)); b = prof(lambda: fill(g))
        print("alone behind the first profile", x)
        for k in sorted(b, key=lambda k: -b[k][0] * b[k][2]): print(k, "d2h", a.get(k), "fill", b[k], flush=True)
        del model, c2, four, g, e, llm; bench.release(d)
