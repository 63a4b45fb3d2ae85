# ruff: noqa
import torch, triton, triton.language as tl
@triton.jit
def pf(p, n, STRIDE: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    at = p.to(tl.int64) + tl.minimum(i.to(tl.int64) * STRIDE, n - STRIDE)
    if MODE == 0:
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], tl.int32, is_pure=False, pack=1)
    elif MODE == 1:
        tl.inline_asm_elementwise("cp.async.bulk.prefetch.L2.global [$1], 2048; mov.u32 $0, 0;", "=r,l", [at], tl.int32, is_pure=False, pack=1)
    else:
        tl.inline_asm_elementwise("prefetch.global.L2::evict_last [$1]; mov.u32 $0, 0;", "=r,l", [at], tl.int32, is_pure=False, pack=1)
@triton.jit
def rd(p, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(p + i, cache_modifier=".cg")
    if tl.sum(x, 0) == 123456789: tl.store(o, 1)
n = 16 << 20
p = torch.randint(0, 100, (n // 4,), dtype=torch.int32, device="cuda"); o = torch.zeros(1, dtype=torch.int32, device="cuda"); big = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
def run(name, f):
    ts, ps = [], []
    for _ in range(7):
        big.add_(1); torch.cuda.synchronize()
        e = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda._sleep(100000)
        e[0].record(); f(); e[1].record()
        torch.cuda._sleep(100000)
        e2 = torch.cuda.Event(enable_timing=True); e2.record(); rd[(n // 4 // 4096,)](p, o, n, B=4096, num_warps=8); e[2].record(); torch.cuda.synchronize()
        ts.append(e2.elapsed_time(e[2]) * 1e3); ps.append(e[0].elapsed_time(e[1]) * 1e3)
    print("GRAN", name, "prefetch us", round(sorted(ps)[3], 1), "read us", round(sorted(ts)[3], 1), flush=True)
import ctypes
for limit in (64, 128):
    torch.cuda.synchronize(); ctypes.CDLL("libcuda.so.1").cuCtxSetLimit(5, ctypes.c_size_t(limit))
    print("fetch", limit)
    run("none", lambda: None)
    run("read", lambda: rd[(n // 4 // 4096,)](p, o, n, B=4096, num_warps=8))
    for s in (32, 64, 128, 256): run(f"pf2 {s}", lambda: pf[(n // s // 256,)](p, n, STRIDE=s, MODE=0, B=256, num_warps=8))
    run("pf2 el 128", lambda: pf[(n // 128 // 256,)](p, n, STRIDE=128, MODE=2, B=256, num_warps=8))
    run("bulk 2048", lambda: pf[(n // 2048 // 32,)](p, n, STRIDE=2048, MODE=1, B=32, num_warps=1))
