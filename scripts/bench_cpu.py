"""Decoding and prefill on this machine's CPU beside llama.cpp, in turns: a round measures the one, then the other.

python scripts/bench_cpu.py --llama_bench llama-bench --gguf bf16=a.gguf int8=b.gguf int4=c.gguf --json cpu.json

Weights are bf16, int8 (theirs Q8_0) and int4 in groups of 32 (theirs Q4_0 or Q4_1). Rows that the JSON holds for other
kinds and threads stay. Without --llama_bench our side alone is measured. Idle machines only: a neighbour halves either.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import load_model
from cli import DEFAULT_CHECKPOINT, positive
from engine import Engine
from errors import UserError
from ops import cpu_library
from sampling import Sampler

KINDS = {"bf16": None, "int8": "int8", "int4": "int4:32"}  # what is quantised on load where there is no such file
FILES = {"bf16": "model.pth", "int8": "model_int8.pth", "int4": "model_int4.g32.pth"}


def processor() -> str:
    """Its name, as Linux says it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def ours(engine: Engine, prompt: list[int], new: int) -> dict[str, float]:
    """Tokens per second of a prompt's prefill, and of decoding after one token."""
    begin = time.perf_counter()
    engine.prefill([prompt])
    read = time.perf_counter()
    engine.prefill([prompt[:1]])
    decode = time.perf_counter()
    for _ in engine.decode(new):
        pass
    return {"prefill": len(prompt) / (read - begin), "decode": new / (time.perf_counter() - decode)}


def theirs(program: Path, model: Path, threads: int, prompt: int, new: int) -> dict[str, float]:
    """The same by llama-bench."""
    command = [program, "-m", model, "-t", threads, "-p", prompt, "-n", new, "-r", 1, "-o", "json"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    rows = json.loads(result.stdout)
    return {"prefill" if row["n_prompt"] else "decode": row["avg_ts"] for row in rows}


def summary(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and most of each measure."""
    values = {name: [measured[name] for measured in rounds] for name in rounds[0]}
    return {n: {"median": statistics.median(v), "min": min(v), "max": max(v)} for n, v in values.items()}


def measure(args: argparse.Namespace, kind: str, threads: int) -> dict:
    torch.set_num_threads(threads)
    path, options = args.checkpoint_path.with_name(FILES[kind]), {}
    if not path.is_file():
        path, options = args.checkpoint_path, {"quantize": KINDS[kind]}
    model = load_model(path, device=torch.device("cpu"), dtype=torch.bfloat16, **options)
    length = args.prompt_length + args.new_tokens + 1
    engine = Engine(model, max_seq_length=length, sampler=Sampler(temperature=0), compile=True)
    prompt, gguf = [5] * args.prompt_length, args.gguf.get(kind)
    ours(engine, prompt, 4)
    rounds: dict[str, list] = {"ours": [], "llama.cpp": []}
    for _ in range(args.rounds):
        rounds["ours"].append(ours(engine, prompt, args.new_tokens))
        if args.llama_bench and gguf:
            rounds["llama.cpp"].append(theirs(args.llama_bench, gguf, threads, args.prompt_length, args.new_tokens))
    row = {"weights": kind, "threads": threads} | {name: summary(own) for name, own in rounds.items() if own}
    if rounds["llama.cpp"]:
        row["ratio"] = {
            name: row["ours"][name]["median"] / row["llama.cpp"][name]["median"] for name in ("decode", "prefill")
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--threads", nargs="+", type=positive, default=[1, 2])
    parser.add_argument("--llama_bench", type=Path, help="llama.cpp's program")
    parser.add_argument("--gguf", nargs="+", default=[], metavar="KIND=FILE", help="the same model, for it")
    parser.add_argument("--prompt_length", type=positive, default=512)
    parser.add_argument("--new_tokens", type=positive, default=64)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.gguf = dict(pair.split("=", 1) for pair in args.gguf)
    if not args.checkpoint_path.is_file():
        raise UserError(f"{args.checkpoint_path} does not exist; scripts/prepare.sh makes checkpoints")
    library = cpu_library.library()
    result = {"processor": processor(), "instruction_set": library.sets[-1] if library else None}
    result |= {"torch": torch.__version__, "model": args.checkpoint_path.parent.name, "rows": []}
    if args.json and args.json.is_file():
        before = json.loads(args.json.read_text())
        if all(before[key] == result[key] for key in result if key != "rows"):
            result["rows"] = before["rows"]
    for kind in args.kinds:
        for threads in args.threads:
            row = measure(args, kind, threads)
            others = [r for r in result["rows"] if (r["weights"], r["threads"]) != (kind, threads)]
            result["rows"] = sorted([*others, row], key=lambda r: (list(KINDS).index(r["weights"]), r["threads"]))
            print(json.dumps(row), flush=True)
            if args.json:
                args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
