"""The processes that torchrun started, as one command: they meet, one of them prints, and they end together.

with session() as tp:  # alone, without torchrun
    model = load_model(path, tp=tp)
"""

import functools
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from errors import UserError
from process.command import ENDING
from tp import TensorParallel

ARRIVAL = timedelta(minutes=5)  # how long a rank waits for the others to start,
SILENCE = timedelta(seconds=20)  # for a sign of life from them,
PATIENCE = timedelta(days=7)  # and for what they send, which may be what a user has yet to type
WHY = {signal.SIGTERM: ", which torchrun sends when another rank has stopped"}


@contextmanager
def session() -> Iterator[TensorParallel]:
    """Join the processes that torchrun started, for as long as the context lasts; without torchrun, stay alone.

    Only rank 0 prints. A rank that fails says so (the first one of a machine, if several do) and ends at once, whatever
    the others wait for; these are ended by torchrun or, on another machine, when they miss it.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield TensorParallel()
        return
    for name, value in (("NCCL_NVLS_ENABLE", "0"), ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")):
        os.environ.setdefault(name, value)  # NVLink multicast is not needed, and not everywhere safe
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # before any thread starts
    try:
        store, rank, world = next(rendezvous("env://"))
        end = functools.partial(_end, rank, store.clone())
        threading.Thread(target=_listen, args=(end,), daemon=True).start()
        store.set(f"rank {rank}", "here")
        store.wait([f"rank {other}" for other in range(world)], ARRIVAL)
        # Left to itself, PyTorch takes NCCL alone where there is a GPU; `share` is for what the host holds.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
        done, group = threading.Event(), dist.new_group(backend="gloo", timeout=SILENCE)
    except dist.DistError as error:
        raise UserError(f"cannot reach the other ranks: {str(error).splitlines()[0]}") from None
    watch = threading.Thread(target=_watch, args=(group, done, end), daemon=True)
    watch.start()
    local = int(os.environ.get("LOCAL_RANK", rank))
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    try:
        with (
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(nowhere if rank else sys.stdout),
            redirect_stderr(nowhere if rank else sys.stderr),
        ):
            yield TensorParallel(rank, world)
    except UserError as error:
        end(f"error: {error}", 2)
    except Exception:  # said here, for this rank's own error output is closed, and a regular exit waits for the others
        watch.join(2)  # if the reason is that another rank has gone, _watch says so
        end(traceback.format_exc(), 1)
    finally:  # also after argparse's SystemExit, which is the same on all ranks
        done.set()
        watch.join()
        gc.collect()  # NCCL ends only after the CUDA graphs that hold its calls
        dist.destroy_process_group()


def _listen(end: Callable[[str, int], None]) -> None:
    """Wait for a signal that ends this process: the main thread, which may be waiting in C, would not hear it."""
    number = signal.sigwait(ENDING)
    end(ENDING[number] + WHY.get(number, ""), 128 + number)


def _watch(group: dist.ProcessGroup, done: threading.Event, end: Callable[[str, int], None]) -> None:
    """Meet the other ranks every second until all are done, and end this process when one does not come: a GPU that
    waits for that one would wait forever."""
    all_done = torch.zeros(1)
    try:
        while not all_done:
            all_done.fill_(done.wait(1))
            dist.all_reduce(all_done, dist.ReduceOp.MIN, group)
    except RuntimeError as error:
        end(f"error: another rank has stopped or is out of reach: {str(error).splitlines()[0]}", 1)


def _end(rank: int, store: dist.Store, message: str, status: int) -> None:
    """Say why, unless another rank of this machine has, and end at once: a regular exit would wait for the others."""
    first = True
    with suppress(RuntimeError):  # the store may be gone, too
        first = store.add(f"ended on {os.environ.get('GROUP_RANK', 0)}", 1) == 1
    if first:
        print(message if rank == 0 else f"[rank {rank}] {message}", file=sys.__stderr__, flush=True)
    sys.__stdout__.flush()
    os._exit(status)
