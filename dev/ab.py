# ruff: noqa
"""Steps of a whole model from a tree (TREE=), to compare kernels on one card: python ab.py MODEL:KIND. SHORT=1: two
layers, to compile ahead. CARVE=percent: of shared memory, asked for by every kernel alike. BALLAST=names: kernels that
get so much of it that a multiprocessor holds no more of their programs than an even share."""
import ctypes, os, sys
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
import torch, bench, engine, triton
from dataclasses import replace
from engine import Engine
from model import ModelConfig
engine.CAPTURED = (8,)
short, carve, ballast = (os.environ.get(k, "") for k in ("SHORT", "CARVE", "BALLAST"))
cuda, seen = None, {}
CL = int(os.environ.get("CL", 0)); CN = [int(x) for x in os.environ.get("CN", "12288,6144,3072,5120").split(",")]; told = {}
LOW = int(os.environ.get("LOW", 2))
real = triton.runtime.jit.JITFunction.run
def run(self, *args, grid, warmup, **options):
    global cuda
    kernel = real(self, *args, grid=grid, warmup=True, **options)
    kernel._init_handles() if kernel.function is None else None
    if CL and self.fn.__name__ == "_linear_kernel" and args[11] in CN:
        size = grid(options) if callable(grid) else grid
        assert size[0] % CL == 0, size
        warps, _, shared = kernel.packed_metadata
        if (size, CL) not in told:
            told[size, CL] = 1
            try: print("   clusters of", CL, "active at most", triton.runtime.driver.active.utils.cuOccupancyMaxActiveClusters(kernel.function, shared, CL), "programs", size, "regs", kernel.n_regs, "warps", warps, flush=True)
            except Exception as e: print("   ", repr(e)[:100])
        kernel.packed_metadata = (warps, CL, shared)
        return real(self, *args, grid=(size[0] // CL,), warmup=False, **options)
    if CL: return real(self, *args, grid=grid, warmup=False, **options)
    cuda = cuda or ctypes.CDLL("libcuda.so.1")
    size = grid(options) if callable(grid) else grid
    programs = size[0] * (size[1] if len(size) > 1 else 1) * (size[2] if len(size) > 2 else 1)
    warps, ctas, _ = kernel.packed_metadata
    shared, threads = kernel.metadata.shared, 32 * warps
    natural = min(65536 // (-(-kernel.n_regs // 8) * 8 * threads), 2048 // threads)
    share = -(-programs // 132)
    if self.fn.__name__ in ballast.split(",") and LOW <= share < natural and programs > 48:
        shared = max(shared, 233472 // (share + 1) + 16 - 1024)
    if carve:
        assert not cuda.cuFuncSetAttribute(ctypes.c_void_p(kernel.function), 9, ctypes.c_int(int(carve)))
    if shared > 48 * 1024:
        assert not cuda.cuFuncSetAttribute(ctypes.c_void_p(kernel.function), 8, ctypes.c_int(shared))
    if os.environ.get("SHOW"):
        seen[self.fn.__name__, size, warps, kernel.n_regs, kernel.metadata.shared, natural, share, shared] = 1
    kernel.packed_metadata = (warps, ctas, shared)
    return real(self, *args, grid=grid, warmup=False, **options)
if CL or carve or ballast or os.environ.get("SHOW"):
    triton.runtime.jit.JITFunction.run = run
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
        r = sorted(t(llm._block) for _ in range(5))
        llm.seed(3); llm.state.history.zero_(); llm.state.pos.zero_()
        for _ in range(12): llm._block()
        torch.cuda.synchronize(); text = hash(tuple(llm.state.history[0, :97].tolist())) % 10**6
    if not short: print("AB", os.environ.get("TAG"), job, round(r[2], 1), "us", [round(x, 1) for x in (r[0], r[-1])], text, flush=True)
    for row in seen: print(row)
    del llm, model; bench.release(torch.device("cuda"))
