"""Compile the Triton kernels of a run before it needs them, all at once, in processes of their own.

    compiled_ahead(rehearsal, device, dtype, key)   a context at whose end they are in Triton's cache

Triton compiles a kernel when it is first launched, one after the other, mostly in code that holds Python's lock. Here a
forked process runs the same Python code on the meta device, whose tensors have shapes but no memory, while this one
loads the weights: a launch there is one of the GPU's, but forks a process that compiles, and launches nothing. What
comes of it is Triton's cache on disk alone. What a rehearsal misses, or all if it fails, is compiled when it is needed.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ops
from ops import common, exchange, symmetric
from ops.common import Gpu, triton


@contextmanager
def compiled_ahead(
    rehearsal: Callable[[], object], device: torch.device, dtype: torch.dtype, key: object
) -> Iterator[None]:
    """A context at whose end the kernels are compiled that `rehearsal` launches for activations of `dtype`, on the meta
    device in the place of `device`; key: what else it depends on, and Triton's cache holds what was rehearsed with the
    same key before. Of a machine's ranks the first two do it: the very first adds the biases of sums."""
    process, does = None, int(os.environ.get("LOCAL_RANK", 0)) < 2
    if does and device.type == "cuda" and triton is not None and dtype.itemsize == 2:
        gpu = common.gpu(device)
        if not (mark := _mark((gpu, dtype, key))).exists():
            # Forked, as another start would import PyTorch anew; it never calls CUDA, which a fork must not.
            start = multiprocessing.get_context("fork").Process
            process = start(target=_compile, args=(rehearsal, gpu, mark), daemon=True)
            process.start()
    yield
    if process:
        process.join(60)  # longer only where something hangs
    if dist.is_initialized():  # the others wait for it
        dist.broadcast_object_list([None], device=torch.device("cpu"))


def _mark(key: object) -> Path:
    """A file in Triton's cache, there when the kernels of a rehearsal with this key, this code and this Triton are."""
    parts = [repr(key), triton.__version__, torch.__version__, os.environ.get("LOCAL_RANK", "0")]
    parts += [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return Path(triton.knobs.cache.dir) / f"rehearsed-{digest}"


def _compile(rehearsal: Callable[[], object], gpu: Gpu, mark: Path) -> None:
    """In a process for that alone: rehearse, with a process a kernel, as many at a time as there are processors."""
    from triton.backends.nvidia import driver as nvidia

    ends = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    for number in ends:  # it ends with the command, and says nothing of it
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
    triton.runtime.cache.triton_key()  # once for all of them
    running = set()

    def start(job: Callable[[], object]) -> None:
        if len(running) >= len(os.sched_getaffinity(0)):
            running.discard(os.wait()[0])
        if (pid := os.fork()) == 0:
            try:
                job()
            finally:
                os._exit(0)
        running.add(pid)

    def compile(launch: Callable[[], Any]) -> None:
        def job() -> None:
            kernel = launch()
            if hasattr(nvidia, "make_launcher"):  # Triton 3.6 compiles C for each list of argument types, by gcc
                nvidia.CudaLauncher(kernel.src, kernel.metadata)

        start(job)

    start(nvidia.CudaUtils)  # compiles the C that calls the driver
    rehearse(rehearsal, gpu, compile)
    while running:
        running.discard(os.wait()[0])
    mark.touch()


def rehearse(rehearsal: Callable[[], object], gpu: Gpu, compile: Callable[[Callable[[], Any]], object]) -> set:
    """Run `rehearsal`, whose tensors on the meta device stand for such a GPU's, and have each kernel that it launches
    compiled once, by a launch that only does that and returns it. Returns (function, Triton's key) of each. From now on
    this process is good for nothing else."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 10 * gpu.capability[0] + gpu.capability[1], 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    seen, found, run = set(), set(), JITFunction.run

    def launch(kernel: JITFunction, *args, grid, warmup, **options) -> None:
        like = tuple((a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in args)
        signature = (kernel.fn, repr(like), repr(sorted(options.items())))  # quickly, what Triton will look at and more
        if signature in seen:
            return
        seen.add(signature)

        def hook(*, key, **_) -> bool:  # called where a kernel is about to be compiled; True: leave it
            triton.knobs.runtime.jit_cache_hook = None
            if (kernel.fn, key) not in found:
                found.add((kernel.fn, key))
                compile(only_compile)
            return True

        def only_compile() -> Any:
            return run(kernel, *args, grid=grid, warmup=True, **options)

        triton.knobs.runtime.jit_cache_hook = hook
        only_compile()

    def once(function: Callable, *inputs: Tensor, warm_up: int = 1, **_) -> Callable:
        output = function(*inputs) if warm_up else None  # without, it has been run before
        return lambda *_: output

    triton.runtime.driver.set_active(Driver())
    JITFunction.run, common.gpu, ops.capture, torch.cuda.graph_pool_handle = launch, lambda _: gpu, once, lambda: None
    torch._dynamo = sys.modules["torch._dynamo"] = SimpleNamespace(disable=lambda function, *_, **__: function)
    counts = torch.zeros(2, dtype=torch.int64, device="meta")  # no other rank is met here
    symmetric.symmetric_buffers = lambda _: ((counts, counts), (counts, counts))
    exchange.inbox = lambda _: exchange.Inbox(0, counts, counts.int(), None)
    dist.broadcast_object_list = dist.all_reduce = dist.all_gather = lambda *_, **__: None
    ours = torch.library.Library("gptfast", "IMPL")
    for name, function in common.FUNCTIONS.items():  # of which PyTorch would ask for the shapes of results alone
        ours.impl(name, function, "Meta", allow_override=True)
    rehearsal()
    return found
