"""Measure tensor parallelism on the GPUs of one machine: whole generations, and the all-reduce inside a decode step.

    python scripts/bench_tp.py tp.json                        # 1, 2 and 4 GPUs: Llama-2-7B and, on four, the 70B shape
    python scripts/bench_tp.py tp.json --gpus 1 2 --models 7B --modes bf16

Starts torchrun for each number of GPUs. Shapes are filled with random weights. Figures are those of bench.py: medians
of whole generations, 200 tokens after prompts of 5 and 2,048; the fraction is each GPU's own bytes over its own read
bandwidth.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts run from any directory

if __name__ == "__main__":  # first: what follows takes seconds to import
    from process.command import command

    command("bench_tp")

import argparse
import itertools
import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import bench
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

import ops
from cli import pick_device
from errors import UserError
from model import ModelConfig
from ops import linear_triton
from process.command import Parser
from process.files import write_text
from process.ranks import session
from tp import TensorParallel

LARGE = "70B"  # only on the largest number of GPUs


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("json", type=Path, metavar="FILE", help="where the figures go")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", nargs="+", default=["7B", LARGE])
    parser.add_argument("--modes", nargs="+", default=bench.MODES, choices=bench.KINDS, metavar="MODE")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--prompt_length", type=int, nargs="+", default=[5, 2048])
    parser.add_argument("--kv_cache", choices=sorted(ops.CACHE_KINDS), help="keys and values in 8 bits")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each number of GPUs")
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)  # fewer, to compile the kernels ahead
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)  # what torchrun starts
    args = parser.parse_args()
    if args.rank:
        with session() as tp:
            _rank(args, tp)
        return
    if torch.cuda.device_count() < max(args.gpus):
        raise UserError(f"--gpus {max(args.gpus)}: this machine has {torch.cuda.device_count()}")
    # Kernels of every number of GPUs and kind of weight, whose compilation none of the others need wait for.
    ahead = itertools.product(args.gpus, args.modes)
    processes = [_torchrun(args, n, "--modes", mode, "--layers", "1", "--runs", "1") for n, mode in ahead]
    for process in processes:
        _finish(process, args.timeout)
    results = {}
    about = bench.provenance()
    for n in args.gpus:
        results[n] = _finish(_torchrun(args, n), args.timeout)
        about |= {key: results[n].get(key) for key in ("device", "read_bandwidth")}
        write_text(args.json, json.dumps(about | {"gpus": results}, indent=1) + "\n")
    print(_table(results))


def _torchrun(args: argparse.Namespace, n: int, *more: str) -> subprocess.Popen:
    models = [m for m in args.models if m != LARGE or n == max(args.gpus) > 1] or args.models
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1"]
    command += [f"--nproc_per_node={n}", __file__, args.json, "--rank", "--models", *models, "--modes", *args.modes]
    command += ["--prompt_length", *args.prompt_length, "--runs", args.runs]
    command += ["--max_new_tokens", args.max_new_tokens, *more]
    command += ["--kv_cache", args.kv_cache] if args.kv_cache else []
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen, timeout: float) -> dict:
    """What rank 0 found, with all rows in a list, and what went wrong, if anything did."""
    late = ""
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        out, errors = process.communicate()
        late = f"more than {timeout} seconds\n"
    found = {"error": late + errors[-4000:] if process.returncode else "", "rows": []}
    print(found["error"], end="", file=sys.stderr)
    for item in (json.loads(line) for line in out.splitlines() if line.startswith("{")):
        if "mode" in item:
            found["rows"].append(item)
        else:
            found |= item
    return found


def _rank(args: argparse.Namespace, tp: TensorParallel) -> None:
    """Measure, and print a line of JSON for whatever is found as soon as it is."""
    device = pick_device("cuda")
    bandwidth = ops.read_bandwidth(device)
    name = torch.cuda.get_device_name(device)
    print(json.dumps({"device": name, "torch": torch.__version__, "read_bandwidth": bandwidth}), flush=True)
    if tp.world > 1 and not args.layers:
        print(json.dumps({"all_reduce_us": all_reduce_times(tp, device)}), flush=True)
    limits = bandwidth, ops.matmul_rate(device, torch.bfloat16)
    settings = argparse.Namespace(**vars(args), temperature=0.8, top_k=200, rows=[])
    for model_name, mode in itertools.product(args.models, args.modes):
        config = ModelConfig.from_name(model_name)
        config = replace(config, n_layer=args.layers or config.n_layer)
        model = bench.random_model(config, mode, device, torch.bfloat16, tp)
        for length in args.prompt_length:
            row = bench.measure(model_name, mode, model, bench.Work(length, 0, 1), settings, limits)
            print(json.dumps(asdict(row)), flush=True)
            bench.release(device)
        del model
        bench.release(device)


def all_reduce_times(tp: TensorParallel, device: torch.device) -> dict[str, dict[str, float]]:
    """Microseconds an all-reduce takes in a CUDA graph of nothing else, by size and way. NCCL's NVLS is off."""
    times: dict[str, dict[str, float]] = {}
    sizes = (4096, 8192, 16384, 65536, 262144)
    place = symm_mem.empty(sizes[-1] // 2, dtype=torch.bfloat16, device=device)
    symm_mem.rendezvous(place, dist.group.WORLD)

    def one_shot(buffer: torch.Tensor) -> torch.Tensor:
        return torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", dist.group.WORLD.group_name)

    for size in sizes:
        x, buffer = torch.zeros(size // 2, dtype=torch.bfloat16, device=device), place[: size // 2]
        ways = {
            "all-reduce kernel": partial(ops.all_reduce, x, False, tp.rank, tp.world),
            "torch one-shot": partial(one_shot, buffer),
            "torch one-shot, copied in": lambda x=x, buffer=buffer: one_shot(buffer.copy_(x)),
            "NCCL": partial(dist.all_reduce, x),
        }
        times[f"{size} bytes"] = {name: _graph_time(way) for name, way in ways.items()}
    K = 4096 // tp.world
    weight, x = (torch.zeros(n, K, dtype=torch.bfloat16, device=device) for n in (4096, 1))
    y = torch.zeros(1, 4096, dtype=torch.bfloat16, device=device)
    alone = partial(linear_triton.linear, x, weight, residual=y)
    ways = {
        "alone": alone,
        "summed in its kernel": partial(alone, rank=tp.rank, world=tp.world),
        "all-reduce kernel": lambda: ops.all_reduce(alone(), False, tp.rank, tp.world),
    }
    times["8192 bytes after a linear layer"] = {name: _graph_time(way) for name, way in ways.items()}
    return times


@torch.inference_mode()
def _graph_time(step: Callable[[], object], calls: int = 100, replays: int = 10) -> float:
    """Microseconds a call takes, of the replays the median; NaN where PyTorch refuses it."""
    try:
        step()
    except RuntimeError as error:
        print(f"not measured: {error}", file=sys.stderr)
        return math.nan
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            step()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for mark in marks:
        mark.record()
        graph.replay()
    torch.cuda.synchronize()
    spans = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return spans[len(spans) // 2] * 1e3 / calls


def _table(gpus: dict[int, dict]) -> str:
    columns = ("model", "weights", "prompt", "GPUs", "tok/s (min-max)", "of read bandwidth")
    columns += ("step ms", "x one GPU", "prefill ms", "x one GPU")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    alone = {(r["model"], r["mode"], r["prompt_length"]): r for r in gpus.get(1, {"rows": []})["rows"]}
    for n, r in ((n, r) for n, found in gpus.items() for r in found["rows"]):
        one = alone.get((r["model"], r["mode"], r["prompt_length"]))
        gains = [f"{one[part] / r[part]:.2f}" if one else "" for part in ("step_ms", "prefill_ms")]
        lines.append(
            f"| {r['model']} | {r['mode']} | {r['prompt_length']} | {n} | {r['tokens_per_second']:.1f} ("
            f"{r['spread'][0]:.1f}-{r['spread'][1]:.1f}) | {r['fraction']:.3f} | {r['step_ms']:.3f} | {gains[0]} "
            f"| {r['prefill_ms']:.1f} | {gains[1]} |"
        )
    for n, found in gpus.items():
        for size, ways in found.get("all_reduce_us", {}).items():
            lines.append(f"all-reduce of {size}, {n} GPUs: " + ", ".join(f"{w} {t:.2f} us" for w, t in ways.items()))
    return "\n".join(lines)
