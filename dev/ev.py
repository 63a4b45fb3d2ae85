# ruff: noqa
"""Even shares by shared memory: python ev.py MODEL:KIND ..."""
import ctypes, os, sys
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
import torch, bench, engine, triton
from dataclasses import replace
from engine import Engine
from model import ModelConfig
engine.CAPTURED = (8,)
short = os.environ.get("SHORT")
real = triton.runtime.jit.JITFunction.run
cuda = ctypes.CDLL("libcuda.so.1")
carve, ballast, told = None, False, {}
def run(self, *args, grid, warmup, **options):
    kernel = real(self, *args, grid=grid, warmup=True, **options)
    kernel._init_handles() if kernel.function is None else None
    size = grid(options) if callable(grid) else grid
    programs = size[0] * (size[1] if len(size) > 1 else 1) * (size[2] if len(size) > 2 else 1)
    warps, ctas, _ = kernel.packed_metadata
    shared, threads = kernel.metadata.shared, 32 * warps
    natural = min(65536 // (-(-kernel.n_regs // 8) * 8 * threads), 2048 // threads)
    share = -(-programs // 132)
    own = shared
    if ballast and carve and share < natural and programs > 100 and self.fn.__name__ in ("_linear_kernel", "_experts_kernel"):
        most = carve * 1024 // share // 1024 * 1024 - 1024
        shared = max(shared, most)
        if carve * 1024 // (shared + 1024) != share: shared = own
    f = ctypes.c_void_p(kernel.function)
    assert not cuda.cuFuncSetAttribute(f, 9, ctypes.c_int(-1 if carve is None else -(-carve * 100 // 228)))
    if shared > 48 * 1024:
        assert not cuda.cuFuncSetAttribute(f, 8, ctypes.c_int(shared))
    key = self.fn.__name__, size, carve, ballast
    if key not in told and self.fn.__name__ != "_embed" and programs > 100:
        told[key] = 1
        if not short and (carve is None or shared != own): print("    ", *key, "warps", warps, "regs", kernel.n_regs, "natural", natural, "share", share, "shared", own, "->", shared)
    kernel.packed_metadata = (warps, ctas, shared)
    return real(self, *args, grid=grid, warmup=False, **options)
triton.runtime.jit.JITFunction.run = run
for job in sys.argv[1:]:
    name, kind = job.split(":", 1); config = ModelConfig.from_name(name)
    torch.manual_seed(0)
    model = bench.random_model(replace(config, n_layer=2) if short else config, kind, torch.device("cuda"), torch.bfloat16)
    told.clear()
    for carve, ballast in ((None, False),) if short else ((None, False), (16, False), (32, False), (32, True), (64, False), (64, True), (100, False), (100, True), (None, False)):
        llm = Engine(model, max_seq_length=205, compile=True)
        with torch.inference_mode():
            def t(f, k=8):
                a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True); llm.state.pos.fill_(100); f(); llm.state.pos.fill_(100); torch.cuda.synchronize(); a.record()
                for _ in range(k): f()
                b.record(); torch.cuda.synchronize(); return a.elapsed_time(b) / k * 1e3 / 8
            r = sorted(t(llm._block) for _ in range(5))
        if not short: print("EV", job, "carve", carve, "even", ballast, round(r[2], 1), "us", [round(x, 1) for x in (r[0], r[-1])], flush=True)
        del llm
    del model; bench.release(torch.device("cuda"))
