"""Measure whole generations against the device's read bandwidth: a table, JSON, and a plot of speed against the limit.

    python scripts/bench.py                                        # shapes and modes of benchmarks/README.md
    python scripts/bench.py --models 7B --modes bf16 int4 --rows 1 8 16
    python scripts/bench.py --checkpoint_path checkpoints/$MODEL_REPO/model_int8.pth

Shapes are filled with random weights. Each figure is the median of --runs generations of --max_new_tokens tokens after
a prompt of --prompt_length, prefill included. Fraction: bytes of the weights but the embedding, times tokens per
second, over the read bandwidth measured in the same run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts run from any directory

if __name__ == "__main__":  # first: what follows takes seconds to import
    from process.command import command

    command("bench")

import argparse
import gc
import itertools
import json
import math
import shlex
import statistics
import subprocess
import time
from dataclasses import dataclass

import torch

import ops
from checkpoint import DTYPES, load_model, read_config
from cli import check_flags, pick_device, positive
from engine import Engine
from errors import UserError
from formats.config import BUILTIN
from generate import generate
from linear import GROUPS, Linear
from measure import kv_bytes, prefill_flops, weight_bytes
from model import ModelConfig, Transformer
from process.command import Parser
from process.files import read_json, write_text
from process.ranks import session
from sampling import Sampler
from tp import TensorParallel

MODELS = ("7B", "Llama-3.1-8B", "Llama-3.2-1B")
MODES = ("bf16", "int8", "int4")
KINDS = (*MODES, "fp8", *(f"int4:{group}" for group in GROUPS))  # what else a mode may be


def random_tensors(mode: str, N: int, K: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A random linear layer's tensors as on disk, of about the scale that keeps activations near one."""
    kind, _, group = mode.partition(":")
    deviation = K**-0.5
    if kind == "int4":
        groups = -(-K // int(group or 32))
        packed = torch.randint(0, 256, (N, groups * int(group or 32) // 2), dtype=torch.uint8, device=device)
        scales = torch.full((N, groups), deviation / 4, dtype=torch.bfloat16, device=device)
        return {"weight": packed, "scales": scales, "zeros": torch.zeros_like(scales)}
    if kind == "int8":
        weight = torch.randint(-128, 128, (N, K), dtype=torch.int8, device=device)
        return {"weight": weight, "scales": torch.full((N,), deviation / 64, dtype=torch.bfloat16, device=device)}
    weight = torch.randn(N, K, dtype=dtype, device=device)
    if kind == "fp8":
        scales = torch.full((N,), deviation, dtype=torch.bfloat16, device=device)
        return {"weight": weight.to(torch.float8_e4m3fn), "scales": scales}
    return {"weight": weight * deviation}


def random_model(
    config: ModelConfig, mode: str, device: torch.device, dtype: torch.dtype, tp: TensorParallel | None = None
) -> Transformer:
    """A model of the shape, or this rank's part of it, with random weights in `mode`: "bf16" (any full precision),
    int8, fp8, int4, int4:GROUP."""
    with torch.device("meta"):
        model = Transformer(config, tp)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            if name == "output" and config.tied and mode == "bf16":
                continue
            rows = (*module.experts, module.out_features)
            tensors = random_tensors(mode, math.prod(rows), module.in_features, device, dtype)
            module.assign({key: t.unflatten(0, rows) for key, t in tensors.items()}, name)
        elif isinstance(module, torch.nn.Linear):  # a router, which does not send all tokens to the same experts
            weight = torch.randn(module.weight.shape, dtype=dtype, device=device) * module.in_features**-0.5
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
        elif name == "tok_embeddings":
            module.weight = torch.nn.Parameter(
                torch.randn(module.weight.shape, dtype=dtype, device=device) * config.dim**-0.5, requires_grad=False
            )
        elif getattr(module, "weight", None) is not None:
            ones = torch.ones(module.weight.shape, dtype=dtype, device=device)
            module.weight = torch.nn.Parameter(ones, requires_grad=False)
    if config.tied and mode == "bf16":
        model.output.weight = model.tok_embeddings.weight
    model.pack(dtype)
    return model.eval()


@dataclass
class Row:
    """One line of the table."""

    model: str
    mode: str
    tokens_per_second: float
    spread: tuple[float, float]
    gigabytes_per_second: float
    fraction: float
    weight_gigabytes: float
    prefill_ms: float
    step_ms: float
    compile_seconds: float
    first_token_seconds: float
    memory_gigabytes: float
    step_ms_by_rows: dict[int, float]
    prompt_length: int
    batch_size: int
    prefill_mfu: float  # over the rate of a large matmul in the same run
    decode_fraction: float  # (weights + the keys and values in use) a step, over the read bandwidth


def measure(
    name: str, mode: str, model: Transformer, prompt_length: int, args: argparse.Namespace, limits: tuple[float, float]
) -> Row:
    """limits: the read bandwidth and the matmul rate."""
    device, B = model.norm.weight.device, args.batch_size
    start = time.perf_counter()
    length = prompt_length + args.max_new_tokens
    sampler = Sampler(temperature=args.temperature, top_k=args.top_k)
    llm = Engine(model, batch_size=B, max_seq_length=length, sampler=sampler, compile=True)
    generator = torch.Generator().manual_seed(0)  # the same on every rank
    prompts = torch.randint(0, min(1024, model.config.vocab_size), (B, prompt_length), generator=generator).tolist()
    next(generate(llm, prompts, 2))
    first = time.perf_counter() - start
    rates, prefills = [], []
    for _ in range(args.runs + 1):  # the first warms up
        llm.state.synchronize()
        begin = time.perf_counter()
        for count, _ in enumerate(generate(llm, prompts, args.max_new_tokens, is_stop=never), 1):
            if count == 1:
                prefills.append(time.perf_counter() - begin)
        rates.append(B * count / (time.perf_counter() - begin))
    rates, prefills = rates[1:], prefills[1:]
    rate, prefill = statistics.median(rates), statistics.median(prefills)
    weights, step = weight_bytes(model, B), (B * args.max_new_tokens / rate - prefill) / (args.max_new_tokens - 1)
    used = kv_bytes(llm, prompt_length + args.max_new_tokens / 2)
    return Row(
        model=name,
        mode=mode,
        tokens_per_second=rate,
        spread=(min(rates), max(rates)),
        gigabytes_per_second=weights * rate / B / 1e9,
        fraction=weights * rate / B / limits[0],
        weight_gigabytes=weights / 1e9,
        prefill_ms=prefill * 1e3,
        step_ms=step * 1e3,
        compile_seconds=llm.compile_seconds,
        first_token_seconds=first,
        memory_gigabytes=torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0,
        step_ms_by_rows={rows: step_time(model, rows, length) * 1e3 for rows in args.rows},
        prompt_length=prompt_length,
        batch_size=B,
        prefill_mfu=prefill_flops(model, B * prompt_length, B) / prefill / limits[1],
        decode_fraction=(weights + used) / step / limits[0],
    )


def never(row: int, token: int) -> bool:
    """Random weights end nothing."""
    return False


@torch.inference_mode()
def step_time(model: Transformer, rows: int, length: int) -> float:
    """Seconds of one forward pass of `rows` tokens of one sequence, all logits wanted, as a verification makes it."""
    device, cache = model.norm.weight.device, model.cache(1, length)
    tokens = torch.ones(1, rows, dtype=torch.int64, device=device)
    pos = torch.full((1,), length // 2, dtype=torch.int64, device=device)

    def step() -> None:
        model(tokens, pos, cache, all_logits=True)

    step()
    if device.type != "cuda":
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    for mark in marks:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3


def provenance() -> dict[str, str]:
    """What a figure owes to the software: PyTorch's version, the commit, the command."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {"torch": torch.__version__, "commit": commit, "command": shlex.join(["python", *sys.argv])}


def table(rows: list[Row]) -> str:
    lines = [
        "| model | weights | prompt x rows | tok/s (min-max) | GB/s | of read bandwidth | step ms | decode, of it | "
        "prefill ms | MFU | first token s | GB |"
    ]
    lines.append("|---" * 12 + "|")
    for r in rows:
        lines.append(
            f"| {r.model} | {r.mode} {r.weight_gigabytes:.2f} GB | {r.prompt_length} x {r.batch_size} "
            f"| {r.tokens_per_second:.1f} ({r.spread[0]:.1f}-{r.spread[1]:.1f}) | {r.gigabytes_per_second:.0f} "
            f"| {r.fraction:.3f} | {r.step_ms:.3f} | {r.decode_fraction:.3f} | {r.prefill_ms:.1f} "
            f"| {r.prefill_mfu:.3f} | {r.first_token_seconds:.1f} | {r.memory_gigabytes:.1f} |"
        )
        if r.step_ms_by_rows:
            times = ", ".join(f"{n}: {ms:.3f}" for n, ms in r.step_ms_by_rows.items())
            lines.append(f"|  | step ms by rows | {times} ||||||||||")
    return "\n".join(lines)


def plot(rows: list[Row], bandwidth: float, path: Path) -> None:
    try:
        import matplotlib.pyplot as plt  # optional: only the plot needs it
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None

    figure, axes = plt.subplots(figsize=(1 + len(rows), 4))
    names = [f"{r.model}\n{r.mode}" for r in rows]
    axes.bar(names, [bandwidth / r.weight_gigabytes / 1e9 for r in rows], color="lightgray", label="limit")
    axes.bar(names, [r.tokens_per_second for r in rows], width=0.5, label="measured")
    axes.set_ylabel("tokens/s, batch 1")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help=f"of {', '.join(BUILTIN)}")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=KINDS, metavar="MODE", help="also fp8, int4:GROUP")
    parser.add_argument("--checkpoint_path", type=Path, help="measure this model instead of random shapes")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--prompt_length", type=positive, nargs="+", default=[5], help="tokens of a prompt, or several")
    parser.add_argument("--batch_size", type=positive, default=1, help="prompts at once")
    parser.add_argument("--max_new_tokens", type=positive, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_k", type=int, default=200)
    parser.add_argument("--runs", type=positive, default=5)
    parser.add_argument("--rows", type=positive, nargs="*", default=[], help="also time a step with so many rows")
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, and what they were measured on")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw speed against the limit (needs matplotlib)")
    with session() as tp:
        args = parser.parse_args()
        check_flags(parser, args, {"checkpoint_path": ("models", "modes")}, {})
        _run(args, tp)


def _run(args: argparse.Namespace, tp: TensorParallel) -> None:
    if args.max_new_tokens < 2:
        raise UserError(f"--max_new_tokens is {args.max_new_tokens}; at least 2 are needed")
    length = max(args.prompt_length) + args.max_new_tokens
    if max(args.rows, default=1) > length - length // 2:  # which begin in the middle of the context
        most = length - length // 2
        raise UserError(f"--rows {max(args.rows)} exceeds {most}, half of --prompt_length and --max_new_tokens")
    Sampler(temperature=args.temperature, top_k=args.top_k)  # what is wrong with these shows before a model is made
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its directory does not exist")
    device, dtype = pick_device(args.device), DTYPES[args.precision]
    paths = [args.checkpoint_path.parent] if args.checkpoint_path else []
    configs = {path.name: read_config(path) for path in paths} or {n: ModelConfig.from_name(n) for n in args.models}
    for name, config in configs.items():
        if length > config.block_size:
            raise UserError(f"{length} tokens (--prompt_length, --max_new_tokens) exceed {name}'s {config.block_size}")
    if (bandwidth := ops.read_bandwidth(device)) is None:
        raise UserError(f"{device} has too little free memory for its read bandwidth to be measured")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: reads {bandwidth / 1e9:.1f} GB/s")
    limits = bandwidth, ops.matmul_rate(device, dtype) or math.nan
    about = {"device": name, **provenance(), "read_bandwidth": bandwidth, "matmul_rate": limits[1]}
    kept = read_json(args.json, missing={}) if args.json else {}  # what else the file holds
    rows: list[Row] = []

    def take(row: Row) -> None:
        rows.append(row)
        print(table([row]).splitlines()[2], flush=True)
        if args.json and tp.rank == 0:
            found = about | {"rows": [vars(row) for row in rows]}
            write_text(args.json, json.dumps(kept | found, indent=1) + "\n")

    if args.checkpoint_path:
        model = load_model(args.checkpoint_path, device=device, dtype=dtype, tp=tp)
        for n in args.prompt_length:
            take(measure(args.checkpoint_path.parent.name, args.checkpoint_path.stem, model, n, args, limits))
    for shape, config in () if args.checkpoint_path else configs.items():
        for mode in args.modes:
            model = random_model(config, mode, device, dtype, tp)
            for n in args.prompt_length:
                take(measure(shape, mode, model, n, args, limits))
                gc.collect()  # an engine and its graph hold each other
            del model
            gc.collect()  # an engine and its graph hold each other, and it the model
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    print(table(rows))
    if args.plot and tp.rank == 0:
        plot(rows, bandwidth, args.plot)
