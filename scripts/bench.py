"""Measure whole generations against the device's read bandwidth: a table, JSON, and a plot of speed against the limit.

    python scripts/bench.py                                        # shapes and modes of benchmarks/README.md
    python scripts/bench.py --models 7B --modes bf16 int4 --rows 1 8 16
    python scripts/bench.py --models Llama-3.1-8B --prompt_length 512 8192 --context 32768 --batch_size 1 16 --peer
    python scripts/bench.py --checkpoint_path checkpoints/$MODEL_REPO/model_int8.pth

Shapes are filled with random weights. Each figure is the median of --runs generations of --max_new_tokens tokens after
a prompt of --prompt_length, prefill included, or with --context tokens in the cache already, which nothing has read.
--queue: so many prompts of 20 to 2,000 tokens on --batch_size rows, beside what reading each and the decode steps take
by themselves in the same run.
Fraction: bytes of the weights but the embedding, times tokens per second, over the read bandwidth measured in the same
run.
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
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

import ops
from batches import serve
from checkpoint import DTYPES, load_model, read_config
from cli import check_flags, pick_device, positive
from engine import Engine
from errors import UserError
from formats.config import BUILTIN, builtin
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
KINDS = (*MODES, "fp8", "mxfp4", *(f"int4:{group}" for group in GROUPS))  # what else a mode may be


def random_tensors(mode: str, N: int, K: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A random linear layer's tensors as on disk, of about the scale that keeps activations near one."""
    kind, _, group = mode.partition(":")
    deviation = K**-0.5
    if kind == "int4":
        groups = -(-K // int(group or 32))
        packed = torch.randint(0, 256, (N, groups * int(group or 32) // 2), dtype=torch.uint8, device=device)
        scales = torch.full((N, groups), deviation / 4, dtype=torch.bfloat16, device=device)
        return {"weight": packed, "scales": scales, "zeros": torch.zeros_like(scales)}
    if kind == "mxfp4":  # whose values deviate by 2.9
        packed = torch.randint(0, 256, (N, -(-K // 32) * 16), dtype=torch.uint8, device=device)
        exponent = round(math.log2(deviation / 2.9)) + 127
        return {"weight": packed, "scales": torch.full((N, -(-K // 32)), exponent, dtype=torch.uint8, device=device)}
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
    int8, fp8, int4, int4:GROUP; or mxfp4, of experts alone, as gpt-oss is published."""
    with torch.device("meta"):
        model = Transformer(config, tp)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            if name == "output" and config.tied and mode == "bf16":
                continue
            rows = (*module.experts, module.out_features)
            own = "bf16" if mode == "mxfp4" and not module.experts else mode
            tensors = random_tensors(own, math.prod(rows), module.in_features, device, dtype)
            module.assign({key: t.unflatten(0, rows) for key, t in tensors.items()}, name)
        elif isinstance(module, torch.nn.Linear):  # a router, which does not send all tokens to the same experts
            weight = torch.randn(module.weight.shape, dtype=dtype, device=device) * module.in_features**-0.5
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
            if module.bias is not None:
                bias = torch.zeros(module.bias.shape, dtype=dtype, device=device)
                module.bias = torch.nn.Parameter(bias, requires_grad=False)
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


class Work(NamedTuple):
    """What each of so many rows does before it decodes: read a prompt, or have a context in the cache."""

    prompt: int
    context: int
    rows: int

    @property
    def before(self) -> int:
        """Positions of a row in use before it decodes."""
        return self.prompt or self.context


@dataclass
class Row:
    """One line of the table. Without a prompt there is no prefill."""

    model: str
    mode: str
    tokens_per_second: float
    spread: tuple[float, float]
    gigabytes_per_second: float
    fraction: float
    weight_gigabytes: float
    prefill_ms: float | None
    step_ms: float
    compile_seconds: float
    first_token_seconds: float
    memory_gigabytes: float
    step_ms_by_rows: dict[int, float]
    prompt_length: int
    context: int
    batch_size: int
    kv_cache: str | None
    prefill_mfu: float | None  # over the rate of a large matmul in the same run
    decode_fraction: float  # (weights + the keys and values in use) a step, over the read bandwidth

    @property
    def work(self) -> Work:
        return Work(self.prompt_length, self.context, self.batch_size)


def measure(
    name: str, mode: str, model: Transformer, work: Work, args: argparse.Namespace, limits: tuple[float, float]
) -> Row:
    """limits: the read bandwidth and the matmul rate."""
    device = model.norm.weight.device
    start = time.perf_counter()
    length, sampler = work.before + args.max_new_tokens, Sampler(temperature=args.temperature, top_k=args.top_k)
    how = {"compile": True, "kv_cache": args.kv_cache}
    llm = Engine(model, batch_size=work.rows, max_seq_length=length, sampler=sampler, **how)
    prompts = random_prompts(work, model.config)
    run = (lambda: whole(llm, prompts, args.max_new_tokens)) if work.prompt else (lambda: decoding(llm, work, args))
    next(generate(llm, prompts or [[0]] * work.rows, 2))
    first = time.perf_counter() - start
    seconds, prefills = zip(*[run() for _ in range(args.runs + 1)][1:])  # the first warms up
    rates = [work.rows * args.max_new_tokens / s for s in seconds]
    rate, prefill = statistics.median(rates), statistics.median(prefills)
    weights, steps = weight_bytes(model, work.rows), args.max_new_tokens - bool(work.prompt)
    step = (work.rows * args.max_new_tokens / rate - prefill) / steps
    return Row(
        model=name,
        mode=mode,
        tokens_per_second=rate,
        spread=(min(rates), max(rates)),
        gigabytes_per_second=weights * rate / work.rows / 1e9,
        fraction=weights * rate / work.rows / limits[0],
        weight_gigabytes=weights / 1e9,
        prefill_ms=prefill * 1e3 if work.prompt else None,
        step_ms=step * 1e3,
        compile_seconds=llm.compile_seconds,
        first_token_seconds=first,
        memory_gigabytes=torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0,
        step_ms_by_rows={rows: step_time(model, rows, length, args.kv_cache) * 1e3 for rows in args.rows},
        prompt_length=work.prompt,
        context=work.context,
        batch_size=work.rows,
        kv_cache=args.kv_cache,
        prefill_mfu=prefill_flops(model, work.rows * work.prompt, work.rows) / prefill / limits[1] if prefill else None,
        decode_fraction=(weights + kv_bytes(llm, work.before + args.max_new_tokens / 2)) / step / limits[0],
    )


def random_prompts(work: Work, config: ModelConfig) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)  # the same on every rank
    size = (work.rows, work.prompt)
    return torch.randint(0, min(1024, config.vocab_size), size, generator=generator).tolist() if work.prompt else []


def whole(llm: Engine, prompts: list[list[int]], count: int) -> tuple[float, float]:
    """Seconds of one generation of so many tokens a row, and of those until the first token."""
    llm.state.synchronize()
    begin = time.perf_counter()
    for done, _ in enumerate(generate(llm, prompts, count, is_stop=never), 1):
        if done == 1:
            prefill = time.perf_counter() - begin
    assert done == count
    return time.perf_counter() - begin, prefill


def decoding(llm: Engine, work: Work, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of decoding --max_new_tokens a row behind what the cache is said to hold, and none of prefill."""
    llm.state.pos.fill_(work.context)
    llm.state.synchronize()
    begin = time.perf_counter()
    blocks = [llm.advance() for _ in range(args.max_new_tokens // llm.block)]
    blocks[-1]()
    return (time.perf_counter() - begin) * args.max_new_tokens / (len(blocks) * llm.block), 0.0


def peer(name: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The model that transformers makes of the shape, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**builtin(name))
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


@torch.inference_mode()
def measure_peer(model: torch.nn.Module, ours: Row, args: argparse.Namespace, limits: tuple[float, float]) -> Row:
    """The same work by a model of transformers, eager: reading the prompts, then greedy decoding."""
    config, count, work = ModelConfig.from_name(ours.model), min(args.max_new_tokens, 32), ours.work
    prompts = torch.tensor(random_prompts(work, config), device=model.device)

    def timed(run: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(args.runs + 1):  # the first warms up
            begin = time.perf_counter()
            run()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return times[1:]

    prefill = statistics.median(timed(lambda: model(prompts, logits_to_keep=1)))
    lengths = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    times = timed(lambda: model.generate(prompts, **lengths))
    rates = [work.rows * count / t for t in times]
    rate, step = statistics.median(rates), (statistics.median(times) - prefill) / (count - 1)
    return replace(
        ours,
        mode="transformers",
        tokens_per_second=rate,
        spread=(min(rates), max(rates)),
        gigabytes_per_second=ours.weight_gigabytes * rate / work.rows,
        fraction=ours.weight_gigabytes * 1e9 * rate / work.rows / limits[0],
        prefill_ms=prefill * 1e3,
        step_ms=step * 1e3,
        compile_seconds=0.0,
        first_token_seconds=0.0,
        memory_gigabytes=torch.cuda.max_memory_reserved() / 1e9 if model.device.type == "cuda" else 0.0,
        step_ms_by_rows={},
        prefill_mfu=ours.prefill_mfu * ours.prefill_ms / prefill / 1e3,
        decode_fraction=ours.decode_fraction * ours.step_ms / step / 1e3,
    )


@torch.inference_mode()
def measure_queue(model: Transformer, count: int, rows: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds that `count` prompts of 20 to 2,000 random tokens take on so many rows, --max_new_tokens each, and those
    of their parts alone: reading each prompt, and decode steps of all rows with the mean context."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 2001, (count,), generator=generator).tolist()
    vocabulary = min(1024, model.config.vocab_size)
    prompts = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    sampler, most = Sampler(temperature=args.temperature, top_k=args.top_k), max(lengths) + args.max_new_tokens
    llm = Engine(model, batch_size=rows, max_seq_length=most, sampler=sampler, compile=True)

    def timed(run: Callable[[], object]) -> float:
        llm.state.synchronize()
        begin = time.perf_counter()
        run()
        llm.state.synchronize()
        return time.perf_counter() - begin

    def serving() -> None:
        for _ in serve(llm, prompts, args.max_new_tokens, is_stop=never):
            pass

    def reading() -> None:
        for prompt in prompts:
            llm.reader.prefill([prompt])

    timed(serving)  # warms up
    seconds = [timed(serving) for _ in range(args.runs)]
    work = Work(0, round(sum(lengths) / count), rows)
    steps = statistics.median(decoding(llm, work, args)[0] for _ in range(3)) * count / rows
    parts = timed(reading) + steps
    median = statistics.median(seconds)
    return {
        "prompts": count,
        "prompt_tokens": sum(lengths),
        "batch_size": rows,
        "seconds": median,
        "spread": (min(seconds), max(seconds)),
        "tokens_per_second": count * args.max_new_tokens / median,
        "parts_seconds": parts,
        "of_parts": parts / median,
    }


def release(device: torch.device) -> None:
    """Give back what an engine and its graph, which hold each other, have taken."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def never(row: int, token: int) -> bool:
    """Random weights end nothing."""
    return False


@torch.inference_mode()
def step_time(model: Transformer, rows: int, length: int, kv_cache: str | None = None) -> float:
    """Seconds of one forward pass of `rows` tokens of one sequence, all logits wanted, as a verification makes it."""
    device, cache = model.norm.weight.device, model.cache(1, length, kv_cache)
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


def digits(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


def table(rows: list[Row]) -> str:
    lines = [
        "| model | weights | tokens x rows | tok/s (min-max) | GB/s | of read bandwidth | step ms | decode, of it | "
        "prefill ms | MFU | first token s | GB |"
    ]
    lines.append("|---" * 12 + "|")
    for r in rows:
        lines.append(
            f"| {r.model} | {r.mode} {r.weight_gigabytes:.2f} GB | {r.work.before} x {r.batch_size} "
            f"| {r.tokens_per_second:.1f} ({r.spread[0]:.1f}-{r.spread[1]:.1f}) | {r.gigabytes_per_second:.0f} "
            f"| {r.fraction:.3f} | {r.step_ms:.3f} | {r.decode_fraction:.3f} | {digits(r.prefill_ms, 1)} "
            f"| {digits(r.prefill_mfu, 3)} | {r.first_token_seconds:.1f} | {r.memory_gigabytes:.1f} |"
        )
        if r.step_ms_by_rows:
            times = ", ".join(f"{n}: {ms:.3f}" for n, ms in r.step_ms_by_rows.items())
            lines.append(f"|  | step ms by rows | {times} ||||||||||")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    try:
        import matplotlib.pyplot as plt  # optional: only the plot needs it
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None

    figure, axes = plt.subplots(figsize=(1 + len(rows), 4))
    names = [f"{r.model}\n{r.mode}\n{r.work.before} x {r.batch_size}" for r in rows]
    steps = [1e3 / r.step_ms for r in rows]
    axes.bar(names, [s / r.decode_fraction for r, s in zip(rows, steps)], color="lightgray", label="limit")
    axes.bar(names, steps, width=0.5, label="measured")
    axes.set_ylabel("decode steps/s")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help=f"of {', '.join(BUILTIN)}")
    parser.add_argument(
        "--modes", nargs="+", default=MODES, choices=KINDS, metavar="MODE", help="also fp8, mxfp4, int4:GROUP"
    )
    parser.add_argument("--checkpoint_path", type=Path, help="measure this model instead of random shapes")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--prompt_length", type=positive, nargs="+", help="tokens of a prompt, or several; 5")
    parser.add_argument("--context", type=positive, nargs="+", default=[], help="decode with so many tokens before")
    parser.add_argument("--batch_size", type=positive, nargs="+", default=[1], help="rows at once, or several")
    parser.add_argument("--kv_cache", choices=sorted(ops.CACHE_KINDS), help="keys and values in 8 bits")
    parser.add_argument("--max_new_tokens", type=positive, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_k", type=int, default=200)
    parser.add_argument("--runs", type=positive, default=5)
    parser.add_argument("--rows", type=positive, nargs="*", default=[], help="also time a step with so many rows")
    parser.add_argument("--queue", type=positive, metavar="N", help="also serve N prompts on the rows")
    parser.add_argument("--peer", action="store_true", help="measure transformers with the same shapes too")
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, and what they were measured on")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw speed against the limit (needs matplotlib)")
    with session() as tp:
        args = parser.parse_args()
        check_flags(parser, args, {"checkpoint_path": ("models", "modes", "peer")}, {})
        if args.prompt_length is None:
            args.prompt_length = [] if args.context or args.queue else [5]
        _run(args, tp)


def _configs(args: argparse.Namespace) -> dict[str, ModelConfig]:
    """The models asked for, by name. Raises UserError where they or the rest of what is asked for cannot be."""
    if args.max_new_tokens < 2:
        raise UserError(f"--max_new_tokens is {args.max_new_tokens}; at least 2 are needed")
    length = max([*args.prompt_length, *args.context, 2000 if args.queue else 0]) + args.max_new_tokens
    if max(args.rows, default=1) > length - length // 2:  # which begin in the middle of the context
        most = length - length // 2
        raise UserError(f"--rows {max(args.rows)} exceeds {most}, half of the context and --max_new_tokens")
    Sampler(temperature=args.temperature, top_k=args.top_k)  # what is wrong with these shows before a model is made
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its directory does not exist")
    paths = [args.checkpoint_path.parent] if args.checkpoint_path else []
    configs = {path.name: read_config(path) for path in paths} or {n: ModelConfig.from_name(n) for n in args.models}
    for name, config in configs.items():
        if length > config.block_size:
            raise UserError(f"{length} tokens (with --max_new_tokens) exceed {name}'s {config.block_size}")
    return configs


class Results:
    """What has been measured: printed at once, and kept in the file beside what else that holds."""

    def __init__(self, about: dict, path: Path | None):
        self.about, self.path = about, path
        self.kept = read_json(path, missing={}) if path else {}
        self.rows: list[Row] = []
        self.queues: list[dict] = []

    def take(self, row: Row) -> None:
        self.rows.append(row)
        print(table([row]).splitlines()[2], flush=True)
        self._write()

    def take_queue(self, found: dict) -> None:
        self.queues.append(found)
        print(found, flush=True)
        self._write()

    def _write(self) -> None:
        if self.path:
            found = self.about | {"rows": [vars(row) for row in self.rows]}
            found |= {"queues": self.queues} if self.queues else {}
            write_text(self.path, json.dumps(self.kept | found, indent=1) + "\n")


def _run(args: argparse.Namespace, tp: TensorParallel) -> None:
    configs, device, dtype = _configs(args), pick_device(args.device), DTYPES[args.precision]
    if (bandwidth := ops.read_bandwidth(device)) is None:
        raise UserError(f"{device} has too little free memory for its read bandwidth to be measured")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: reads {bandwidth / 1e9:.1f} GB/s")
    limits = bandwidth, ops.matmul_rate(device, dtype) or math.nan
    about = {"device": name, **provenance(), "read_bandwidth": bandwidth, "matmul_rate": limits[1]}
    results = Results(about, args.json if tp.rank == 0 else None)
    works = [Work(n, 0, batch) for n in args.prompt_length for batch in args.batch_size]
    works += [Work(0, n, batch) for n in args.context for batch in args.batch_size]

    def measure_all(name: str, mode: str, model: Transformer) -> None:
        for work in works:
            results.take(measure(name, mode, model, work, args, limits))
            release(device)
        for batch in args.batch_size if args.queue else ():
            results.take_queue({"model": name, "mode": mode, **measure_queue(model, args.queue, batch, args)})
            release(device)

    if args.checkpoint_path:
        model = load_model(args.checkpoint_path, device=device, dtype=dtype, tp=tp)
        release(device)
        measure_all(args.checkpoint_path.parent.name, args.checkpoint_path.stem, model)
    for shape, config in () if args.checkpoint_path else configs.items():
        for mode in args.modes:
            model = random_model(config, mode, device, dtype, tp)
            release(device)
            measure_all(shape, mode, model)
            del model
            release(device)
        if args.peer:
            model, own = peer(shape, device, dtype), [row for row in results.rows if row.model == shape]
            for ours in (row for row in own if row.mode == args.modes[0] and row.prompt_length):
                results.take(measure_peer(model, ours, args, limits))
            del model, own
            release(device)
    print(table(results.rows))
    if args.plot and tp.rank == 0:
        plot(results.rows, args.plot)
