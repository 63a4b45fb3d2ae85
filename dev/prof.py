# ruff: noqa
import os, sys, time, statistics
sys.path[:0] = [os.getcwd(), os.getcwd() + "/scripts"]
import torch, bench, engine
from model import ModelConfig
from sampling import Sampler
d = torch.device("cuda")
for job in sys.argv[1:]:
    name, kind = job.split(":"); config = ModelConfig.from_name(name); torch.manual_seed(0)
    with torch.inference_mode(): model = bench.random_model(config, kind, d, torch.bfloat16)
    llm = engine.Engine(model, batch_size=1, max_seq_length=205, sampler=Sampler(temperature=.8, top_k=200), compile=True)
    prompts = bench.random_prompts(bench.Work(5, 0, 1), config)
    marks = {}
    def wrap(f, tag):
        def g(*a, **k):
            marks.setdefault(tag + " in", time.perf_counter()); r = f(*a, **k); marks.setdefault(tag + " out", time.perf_counter()); return r
        return g
    llm._captured = {k: wrap(v, "graph") for k, v in llm._captured.items()}
    llm._draw = wrap(llm._draw, "draw"); llm._decode = wrap(llm._decode, "decode"); llm._step = wrap(llm._step, "step"); engine.check_finite = wrap(engine.check_finite, "finite")
    llm._block = wrap(llm._block, "block")
    for n in range(7):
        marks.clear(); llm.state.synchronize(); b = time.perf_counter()
        t = bench.whole(llm, prompts, 200)
        if n > 1: print("PROF", job, f"total {t[0]*1e3:.2f} first {t[1]*1e3:.3f}", {k: round((v - b) * 1e6) for k, v in marks.items()}, flush=True)
    # device times of the prefill graph and of the draw
    for f, tag in ((lambda: [llm._captured[8](torch.zeros(1, 8, dtype=torch.int64, device=d), torch.zeros(1, dtype=torch.int64)) for _ in range(1)], "prefill graph"), (lambda: llm._step(), "step"), (lambda: llm._block(), "block")):
        with torch.inference_mode():
            llm.state.pos.fill_(100)
            ts = []
            for _ in range(10):
                a, e = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True); torch.cuda.synchronize(); a.record(); f(); e.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(e) * 1e3)
            print("  ", tag, round(statistics.median(ts), 1), flush=True)
    del llm, model; bench.release(d)
