"""Main memory: how much is free, and weights in huge pages, on Linux. In pages of 4 kB a processor looks up each one,
and reads ahead in none but the one that it is in: in those of 2 MB it reads up to half as fast again."""

import math
import mmap
from collections.abc import Iterable
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn

PAGE = 1 << 21  # bytes
LINE = 64  # of a cache


def free_memory() -> float:
    """Bytes of main memory that can be had: the machine's, or a container's, which ends the process that takes more."""
    free = [math.inf]
    with suppress(OSError, StopIteration):  # Linux only
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError, StopIteration):  # control groups, version 2; ValueError: no limit
        group = Path(f"/sys/fs/cgroup{Path('/proc/self/cgroup').read_text().rpartition('::')[2].strip()}")
        used = next(int(line[5:]) for line in (group / "memory.stat").read_text().splitlines() if line[:5] == "anon ")
        free.append(int((group / "memory.max").read_text()) - used)  # files in its cache make room
    return min(free)


def gather(parameters: Iterable[nn.Parameter]) -> None:
    """Move those in a CPU's memory, in their order, to huge pages, if there is room for a copy. What was mapped from a
    file is then no longer."""
    own = [p for p in parameters if p.is_cpu and p.numel()]
    starts = [0, *accumulate(-(-p.nbytes // LINE) * LINE for p in own)]
    if starts[-1] > free_memory() / 2 or (memory := allocate(starts[-1])) is None:
        return
    for p, start in zip(own, starts):  # each a storage of its own: torch.compile refuses parameters that share one
        place = torch.frombuffer(memory[start : start + p.nbytes], dtype=torch.uint8)
        p.data = place.view(p.dtype).view(p.shape).copy_(p)


def allocate(size: int) -> memoryview | None:
    """So many zero bytes that begin a page, or None where the system has no huge pages to ask for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # no room, or a kernel built without them
        return None
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
    return memoryview(memory)[begin : begin + size]
