"""Find configurations of the linear kernel for a model's layers on the GPUs at hand, and write them to ops/tuned/.

    python scripts/tune.py --model Llama-3.2-1B --mode int8 --rows 8
    torchrun --standalone --nproc_per_node=4 scripts/tune.py --model 7B --mode int4

What a configuration costs depends on its neighbours, whose programs start while its own still run: so whole steps are
timed (of a random model, see bench.py). First one layer varies at a time; then those of each layer that were best so
meet, from several starts, one layer in turns until none gets better: what is best together need not be so apart.
Everything is compiled before, on all cores. For Hopper GPUs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts run from any directory

if __name__ == "__main__":  # first: what follows takes seconds to import
    from process.command import command

    command("tune")

import argparse
import itertools
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from operator import itemgetter
from unittest.mock import patch

import bench
import torch
from tqdm import tqdm

import ops
from cli import pick_device, positive
from errors import UserError
from linear import Linear
from model import ModelConfig, Transformer
from ops import linear_triton, symmetric, tuning
from ops.common import MAX_ROWS
from ops.tuning import Configuration
from process.command import Parser
from process.ranks import session
from tp import TensorParallel

REGISTERS = 2**16  # of a multiprocessor
LEFT = (0, 1 / 4, 3 / 8)  # of them, for the next kernel
LAYERS = ("wqkv", "wo", "w13", "w2", "output")
GAIN = 0.9995  # what counts as faster
FEW = 12  # of a layer's configurations, which are tried together with others'
Choices = dict[str, Configuration]  # by layer; the others have what is shipped


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="7B")
    parser.add_argument("--mode", default="bf16", choices=bench.KINDS, metavar="MODE", help="as of bench.py")
    parser.add_argument("--rows", type=int, default=1, help="of x: one, 2 to 8 and 9 to 16 are tuned apart")
    parser.add_argument("--layers", type=int, help="time so many instead of all")
    parser.add_argument("--starts", type=positive, default=16, help="combinations from which to go to better ones")
    parser.add_argument("--only", nargs="+", choices=LAYERS, default=LAYERS, help="tune these layers instead of all")
    with session() as tp:
        _run(parser.parse_args(), tp)


def _run(args: argparse.Namespace, tp: TensorParallel) -> None:
    if not 1 <= args.rows <= MAX_ROWS:
        raise UserError(f"--rows is {args.rows}; accepted: 1 to {MAX_ROWS}")
    device = pick_device(None)
    if device.type != "cuda":
        raise UserError("tuning needs an NVIDIA GPU")
    config = ModelConfig.from_name(args.model)
    config = replace(config, n_layer=args.layers or config.n_layer)
    model = bench.random_model(config, args.mode, device, torch.bfloat16, tp)
    found = {name: layer for name, layer in layers(model).items() if name in args.only}
    processors = tuning.processors(device)
    choices = {name: candidates(layer.weight, layer.in_features, processors) for name, layer in found.items()}
    jobs = [
        partial(compile_layer, name, _like(layer.weight), _like(layer.scales), layer.in_features, args.rows, tp, choice)
        for name, layer in found.items()
        for choice in choices[name][tp.rank :: tp.world]
    ]
    workers = max(1, (os.cpu_count() or 1) // tp.world - 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(tqdm(pool.map(_call, jobs, chunksize=4), total=len(jobs), desc="compile"))
    tp.share(None)  # every rank's share is in the cache

    own, _ = tuning.tables(device)
    table = own.setdefault(tuning.key(linear_triton.kind_of(model.output.weight), args.rows), {})
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in found.items()}

    def measure(tried: Choices) -> float:
        """Microseconds of a step."""
        with patch.dict(table, {shapes[name]: choice for name, choice in tried.items()}):
            for layer in model.layers:  # attention looks at its wo's
                ops.prepare_attention(layer.attention, layer is model.layers[0], layer.feed_forward.first.weight)
            return tp.share(bench.step_time(model, args.rows, 205) * 1e6)

    first, best, kept = search(choices, measure, args.rows == 1, args.starts)
    print(f"{args.model} {args.mode}, {args.rows} rows, {torch.cuda.get_device_name(device)}, {tp.world} GPUs:")
    print(f"a step takes {best:.1f} us instead of {first:.1f}")
    for name, choice in kept.items():
        print(f"{name} {shapes[name]}: {choice}")
        table[shapes[name]] = choice
    if kept and tp.rank == 0:
        print(f"wrote {tuning.write(device)}")


def search(
    choices: dict[str, list[Configuration]], measure: Callable[[Choices], float], one_row: bool, starts: int
) -> tuple[float, float, Choices]:
    """What a step takes with what is shipped, and the least that was found, with what."""
    seen, few, kept = {}, {}, {}

    def step_time(tried: Choices) -> float:
        key = tuple(sorted(tried.items(), key=itemgetter(0)))
        if key not in seen:
            seen[key] = measure(tried)
        return seen[key]

    best = first = step_time({})
    for name, all_of in choices.items():
        times = [(step_time({name: choice}), i) for i, choice in enumerate(tqdm(all_of, desc=name))]
        few[name] = [all_of[i] for _, i in sorted(times)[:FEW]]
    if one_row and "wo" in few:
        few["wo"] += [replace(choice, no_prefetch=True) for choice in few["wo"]]
    chance = random.Random(0)  # the same on every rank
    for start in tqdm(range(starts), desc="together"):
        tried = {name: chance.choice(some) for name, some in few.items()} if start else {}
        us, tried = descend(tried, few, step_time)
        us = max(us, measure(tried))  # it may have been lucky
        if us < best * GAIN:
            best, kept = us, tried
            tqdm.write(f"{best:.1f} us instead of {first:.1f}", file=sys.stderr)
    return first, best, kept


def descend(tried: Choices, few: dict[str, list[Configuration]], step_time: Callable) -> tuple[float, Choices]:
    """From a combination on, take for one layer after the other what makes a step faster, until none does."""
    us, turns, since = step_time(tried), itertools.cycle(few), 0
    while since < len(few):
        name, since = next(turns), since + 1
        for choice in few[name]:
            if (less := step_time(tried | {name: choice})) < us * GAIN:
                us, tried, since = less, tried | {name: choice}, 0
    return us, tried


def layers(model: Transformer) -> dict[str, Linear]:
    """The linear layers of which each decoder layer has one, and the output layer."""
    attention, feed_forward = model.layers[0].attention, model.layers[0].feed_forward
    return dict(zip(LAYERS, (attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2, model.output)))


def candidates(weight: torch.Tensor, K: int, processors: int) -> list[Configuration]:
    """Configurations that may be good for a weight, as the kernel reads it, of K columns: a step is shorter than 2 K,
    and weights in flight fit, and fill, the registers, or leave some to the next kernel's first programs."""
    kind, tiles = linear_triton.kind_of(weight), linear_triton.out_features(weight) // 8
    result = {}  # a set in order
    products = itertools.product((2, 4, 8), (1, 2, 4, 8), (2, 4, 8, 16), (1, 2, 3, 4, 6), LEFT)
    for R, C, W, programs, left in products:
        if kind == "fp8" and C * tuning.CHUNK[kind] > 256:  # 8 columns of a fragment have 32 values of one row each
            continue
        registers, words = min(240, int(REGISTERS * (1 - left)) // (32 * W * programs) // 8 * 8), 4 * R * C
        in_flight = min(programs, -(-tiles // R // processors) or 1) * 32 * W * words * 4  # bytes
        if tuning.CHUNK[kind] * W * C < 2 * K and words + 32 <= registers and in_flight >= 12 * 1024:
            result[Configuration(8 * R, C, W, registers, programs)] = None
            if tiles // R > programs * processors and not left:
                result[Configuration(8 * R, C, W, registers, 0)] = None
            if R > 2 and tiles // R > programs * processors // 2:  # 16 rows leave little to share
                result[Configuration(8 * R, C, W, registers, programs, True)] = None
    return list(result)


def compile_layer(
    name: str, weight: tuple, scales: tuple | None, K: int, rows: int, tp: TensorParallel, choice: Configuration
) -> None:
    """Compile what a layer's call would, in a process of `_call`'s, from shapes and dtypes."""
    w, s = (None if of is None else torch.empty(of[0], dtype=of[1]) for of in (weight, scales))
    x, gain = torch.empty(rows, K, dtype=torch.bfloat16), torch.empty(K, dtype=torch.bfloat16)
    N, ranks = linear_triton.out_features(w), {"rank": tp.rank, "world": tp.world}
    own, _ = tuning.tables(x.device)
    own.setdefault(tuning.key(linear_triton.kind_of(w), rows), {})[N, K] = choice
    if name in ("wo", "w2"):
        linear_triton.linear(x, w, s, residual=torch.empty(rows, N, dtype=torch.bfloat16), **ranks)
    elif name == "output":
        linear_triton.linear(x, w, s, None, gain, 1e-5, None, torch.float32, gather=True, **ranks)
    else:
        linear_triton.linear(x, w, s, None, gain, 1e-5, swiglu=name == "w13")


def _like(tensor: torch.Tensor | None) -> tuple | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype)


def _call(job: partial) -> None:
    from compile_only import compile_only  # Triton, without the driver that the parent needs

    compile_only()
    counts = torch.zeros(2, dtype=torch.int64)
    symmetric.symmetric_buffers = lambda device: ((counts, counts), (counts, counts))
    job()
