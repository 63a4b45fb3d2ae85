# ruff: noqa
"""ahead.py MODEL:KIND:ROWS... : how many MB of the next weights each linear layer and attention bring to L2, in steps.
ahead.patch first (on 16d29ff). 1B in 16 bits 647 -> 627 us with 4 MB each and none in attention; 7B in 16 bits was not tried."""
import os, sys
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
import torch, bench, itertools
from dataclasses import replace
from model import ModelConfig
import ops.linear_triton as L, ops.attention_triton as A, ops.l2 as L2
short = os.environ.get("SHORT")
MB = 2**20
def link(model):
    A.AHEAD_SCALES = {}
    seq = []
    for l in model.layers:
        for role, m in (("wqkv", l.attention.wqkv), ("wo", l.attention.wo), ("w13", l.feed_forward.w13), ("w2", l.feed_forward.w2)):
            m.role = role; seq.append(m)
        if l.feed_forward.w13.scales is not None and l.feed_forward.w13.scales.ndim > 1:
            A.AHEAD_SCALES[l.feed_forward.w13.weight.data_ptr()] = l.feed_forward.w13.scales
    if not A.AHEAD_SCALES: A.AHEAD_SCALES = None
    seq.append(model.output)
    for a, b in zip(seq, seq[1:]): a.ahead = b
with torch.inference_mode():
    for job in sys.argv[1:]:
        name, kind, M = job.rsplit(":", 2); M = int(M)
        config = ModelConfig.from_name(name)
        torch.manual_seed(0)
        model = bench.random_model(replace(config, n_layer=1) if short else config, kind, torch.device("cuda"), torch.bfloat16)
        link(model)
        own = [l.attention.prefetch_lines for l in model.layers]
        def t(at=None, place=0, scales=True, even=True, **ahead):
            L.PLACE, L.SCALES, L2.EVEN = place, scales, even
            L.AHEAD = {k: int(v * MB) for k, v in ahead.items()}
            for l, n in zip(model.layers, own): l.attention.prefetch_lines = n if at is None else int(at * MB) // 128
            return min(bench.step_time(model, M, 205) for _ in range(1 if short else 2)) * 1e6
        base = t()
        w = {k: getattr(getattr(model.layers[0], p), k).weight.nbytes / MB for p, k in (("attention", "wqkv"), ("attention", "wo"), ("feed_forward", "w13"), ("feed_forward", "w2"))}
        print("AH", job, f"base {base:.1f}", "own at", own[0] * 128 / MB, {k: round(v, 1) for k, v in w.items()}, flush=True)
        res = []
        def do(tag, **kw):
            x = t(**kw); res.append((x, tag, kw)); print(f" {tag}: {(x / base - 1) * 100:+.1f}%", end=";", flush=True); return x
        if short:
            do("x", at=1, wqkv=1, wo=1, w13=1, w2=1); continue
        best, cur = base, {}
        for at in (0, None):  # attention's own prefetch: off, or as it is
            for mb in (1, 2, 4, 8, 12):
                x = do(f"at={at} all {mb}MB", at=at, w2=mb, w13=mb, wqkv=mb, wo=mb)
                if x < best: best, cur = x, dict(at=at, w2=mb, w13=mb, wqkv=mb, wo=mb)
        for role in ("w2", "w13", "wqkv", "wo"):  # from the best, one at a time
            for mb in (0, 1, 2, 4, 8, 12):
                if mb == cur.get(role, 0): continue
                x = do(f"{role}={mb}", **{**cur, role: mb})
                if x < best * .9990: best, cur = x, {**cur, role: mb}
        for at in (1, 2, 4):
            x = do(f"at={at}", **{**cur, "at": at})
            if x < best * .9990: best, cur = x, {**cur, "at": at}
        print("AH", job, f"BEST {base:.1f} -> {best:.1f} ({(best / base - 1) * 100:+.1f}%)", cur, flush=True)
        del model; bench.release(torch.device("cuda"))
