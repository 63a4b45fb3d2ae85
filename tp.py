"""Tensor parallelism over torchrun's processes: who holds which part of which weight, and how the parts meet again.

wqkv, w1, w3 and the vocabulary of embedding and output are split by rows, wo and w2 by columns (Megatron-LM, arXiv
1909.08053), so a layer needs two sums over the ranks. Rank 0's share of a sum includes the residual and the bias.

    with session() as tp:  # alone, without torchrun
        model = load_model(path, tp=tp)
"""

import functools
import gc
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

import gemv
from errors import UserError
from exchange import exchange
from kernels import is_hopper, op, tl, tlx, triton
from linear import GROUPS, Int4Linear, Linear

ARRIVAL = timedelta(minutes=5)  # how long a rank waits for the others to start,
SILENCE = timedelta(seconds=20)  # for a sign of life from them,
PATIENCE = timedelta(days=7)  # and for what they send, which may be what a user has yet to type
ENDING = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "error: ended by SIGTERM, which torchrun sends when another rank has stopped",
}


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the ranks. By default it is alone, and nothing is split or exchanged."""

    rank: int = 0
    world: int = 1

    def part(self, size: int, unit: int) -> range:
        """This rank's part of range(size), in whole units; all are equally long, so the last may reach past the end."""
        n = size if self.world == 1 else math.ceil(size / (self.world * unit)) * unit
        return range(self.rank * n, (self.rank + 1) * n)

    @staticmethod
    def worlds(n_head: int, n_local_heads: int) -> list[int]:
        """World sizes over which heads divide."""
        return [w for w in range(1, n_head + 1) if n_head % w == 0 and 0 in (n_local_heads % w, w % n_local_heads)]

    def heads(self, n_head: int, n_local_heads: int) -> tuple[range, range]:
        """This rank's query heads and the key/value heads they share; ranks share a head when there are fewer heads.

        Raises UserError, naming the world sizes that work, when heads do not divide."""
        works = self.worlds(n_head, n_local_heads)
        if self.world not in works:
            raise UserError(
                f"world size {self.world} does not divide {n_head} query and {n_local_heads} key/value heads; "
                f"world sizes that work: {', '.join(map(str, works))}"
            )
        n, first = max(1, n_local_heads // self.world), self.rank * n_local_heads // self.world
        return self.part(n_head, 1), range(first, first + n)

    def shard(self, name: str, tensors: dict[str, Tensor], config) -> dict[str, Tensor]:
        """This rank's part of a module's tensors as they are on disk. Only that part of a mapped file is read."""
        if self.world == 1:
            return tensors
        D, H, Hkv = config.head_dim, config.n_head, config.n_local_heads
        queries, keys = self.heads(H, Hkv)
        blocks = ((0, queries), (H, keys), (H + Hkv, keys))
        heads = [range((first + own.start) * D, (first + own.stop) * D) for first, own in blocks]
        hidden, vocabulary = self.part(config.intermediate_size, 32), self.part(config.vocab_size, 16)
        columns = {"wo": heads[0], "w2": hidden}
        rows = {"wqkv": heads, "w1": [hidden], "w3": [hidden], "tok_embeddings": [vocabulary], "output": [vocabulary]}
        kind = name.rpartition(".")[2]
        if kind in columns:
            return self._columns(tensors, columns[kind])
        return {key: _cut(t, 0, *rows[kind]) if kind in rows else t for key, t in tensors.items()}

    def _columns(self, tensors: dict[str, Tensor], part: range) -> dict[str, Tensor]:
        tensors = {key: t for key, t in tensors.items() if key != "bias" or self.rank == 0}
        weight, scales = tensors["weight"], tensors.get("scales")
        if weight.dtype is not torch.uint8:
            return {**tensors, "weight": _cut(weight, 1, part)}
        # int4: a group that straddles two ranks becomes smaller ones of the same scale, on both of them.
        old = 2 * weight.shape[1] // scales.shape[1]
        new = math.gcd(old, part.start)
        if new not in GROUPS:  # heads of an odd size: keep the values, give up the format
            plain = Int4Linear.from_tensors(2 * weight.shape[1], len(weight), tensors).dequantized(torch.float32)
            return {k: t for k, t in tensors.items() if k == "bias"} | {"weight": _cut(plain, 1, part)}
        n = math.ceil(len(part) / new)
        group = ((part.start + torch.arange(n) * new) // old).clamp(max=scales.shape[1] - 1)  # of old, for each new one
        cut = _cut(weight, 1, range(part.start // 2, (part.start + n * new) // 2))
        return {**tensors, "weight": cut, "scales": scales[:, group], "zeros": tensors["zeros"][:, group]}

    def embed(self, table: Tensor, tokens: Tensor, start: Tensor | None, new: int) -> Tensor:
        """As `embedding`, of a table of which `table` (n, C) is this rank's part."""
        if self.world == 1:
            return embedding(table, tokens, start, new)
        part = embedding(table, tokens, start, new, self.rank * len(table))
        return exchange(part, False, self.rank, self.world)

    def project(self, linear: Linear, x: Tensor, residual: Tensor) -> Tensor:
        """residual + W x, of which every rank holds some columns of W and that part of x (..., K / world)."""
        if gemv.takes(x, linear.weight):
            rest = (linear.weight, linear.scales, linear.bias)
            return gemv.linear(x, *rest, residual=residual, rank=self.rank, world=self.world)
        y = linear(x, residual=residual if self.rank == 0 else None)
        return y if self.world == 1 else exchange(y, False, self.rank, self.world)

    def gather(self, linear: Linear, x: Tensor, norm: nn.Module, size: int) -> Tensor:
        """fp32 W norm(x), of which every rank holds some rows of W, the last of them perhaps padding: (..., size)."""
        if gemv.takes(x, linear.weight, norm.weight):
            rest = (linear.weight, linear.scales, linear.bias, norm.weight, norm.eps, None, torch.float32)
            return gemv.linear(x, *rest, rank=self.rank, world=self.world, gather=True)[..., :size]
        y = linear(x, norm=norm, fp32=True)
        return y if self.world == 1 else exchange(y, True, self.rank, self.world)[..., :size]

    def share(self, value):
        """Rank 0's value on every rank. The others wait for it."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]


def _cut(t: Tensor, dim: int, *parts: range) -> Tensor:
    """These parts of t along dim (0, or 1 of 2), contiguous, with zeros where the last reaches past the end."""
    pieces = [t[part.start : part.stop] if dim == 0 else t[:, part.start : part.stop] for part in parts]
    whole = torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]  # one piece of a mapped file needs no copy
    missing = sum(map(len, parts)) - whole.shape[dim]
    return F.pad(whole, (0, 0) * (t.ndim - 1 - dim) + (0, missing)) if missing else whole.contiguous()


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
    end(ENDING[number], 128 + number)


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


# --- embedding --------------------------------------------------------------------------------------------------------


@op("embedding")
def embedding(table: Tensor, tokens: Tensor, start: Tensor | None, new: int, first: int | None = None) -> Tensor:
    """Rows of table (n, C) for the `new` tokens of tokens int64 (B, T) from start (B,) int64 on, by default the first
    ones: (B, new, C). If the table is part of one, from row `first` on, the rows of others are zeros.
    """
    if triton is None or not table.is_cuda:
        return embedding_reference(table, tokens, start, new, first)
    return embedding_triton(table, tokens.contiguous(), start, new, first)


@torch.library.register_fake("gptfast::embedding")
def embedding_fake(table, tokens, start, new, first=None):
    return table.new_empty(len(tokens), new, table.shape[1])


def embedding_reference(table, tokens, start, new, first=None):
    if start is not None:
        tokens = tokens.gather(1, start[:, None] + torch.arange(new, device=tokens.device))
    tokens = tokens[:, :new]
    if first is None:
        return F.embedding(tokens, table)
    tokens = tokens - first
    inside = (tokens >= 0) & (tokens < len(table))
    return F.embedding(torch.where(inside, tokens, 0), table) * inside[..., None]


def embedding_triton(table, tokens, start, new, first=None):
    """One launch: table and tokens contiguous."""
    (B, T), (n, C) = tokens.shape, table.shape
    out = embedding_fake(table, tokens, start, new)
    pdl = is_hopper(table.device)
    _embedding_kernel[(B * new, triton.cdiv(C, 1024))](
        out, table, tokens, start, new, T, first or 0, n, C,
        BLOCK=1024, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit(do_not_specialize=["new", "T"])  # a prompt of any length must not have to wait for a compiler
    def _embedding_kernel(out, table, tokens, start, new, T, first, rows, C, BLOCK: tl.constexpr, PDL: tl.constexpr):
        row = tl.program_id(0)
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        if PDL:
            tlx.gdc_launch_dependents()
            tlx.gdc_wait()
        at = row // new * T + row % new
        if start is not None:
            at += tl.load(start + row // new)
        token = tl.load(tokens + at) - first
        x = tl.load(table + token * C + c, mask=(token >= 0) & (token < rows) & (c < C), other=0.0)
        tl.store(out + row.to(tl.int64) * C + c, x, mask=c < C)
