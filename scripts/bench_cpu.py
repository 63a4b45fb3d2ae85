"""Decoding and prefill on this machine's CPU beside llama.cpp, in turns: a round measures the one, then the other.

python scripts/bench_cpu.py --llama llama.cpp/build/bin --gguf bf16=a.gguf int8=b.gguf int4=c.gguf --json cpu.json
python scripts/bench_cpu.py --llama llama.cpp/build/bin --gguf ... --text a.txt --json cpu.json   # perplexity instead
python scripts/bench_cpu.py --transformers --threads 2 --json cpu.json  # a long prompt, 16 rows

Weights are bf16, int8 (theirs Q8_0) and int4 in groups of 32 (theirs Q4_0). What the JSON holds of other kinds, threads
and measures stays. Without --llama our side alone is measured. Idle machines only: a neighbour halves either.
"""

import argparse
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from bench import provenance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import DTYPES, load_model
from cli import DEFAULT_CHECKPOINT, positive
from engine import Engine
from errors import UserError
from model import Transformer
from ops import cpu_library
from sampling import Sampler
from tokenizer import load_tokenizer

KINDS = {"bf16": None, "int8": "int8", "int4": "int4:32"}  # what is quantised on load where there is no such file
FILES = {"bf16": "model.pth", "int8": "model_int8.pth", "int4": "model_int4.g32.pth"}
WINDOW = 512  # tokens, of which the second half count for perplexity
LONG, ROWS, STEPS = 2048, 16, 16


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


def load(args: argparse.Namespace, kind: str) -> Transformer:
    path, options = args.checkpoint_path.with_name(FILES[kind]), {}
    if not path.is_file():
        path, options = args.checkpoint_path, {"quantize": KINDS[kind]}
    return load_model(path, device=torch.device("cpu"), dtype=torch.bfloat16, **options)


def beside_llama(args: argparse.Namespace, kind: str, threads: int) -> dict:
    """Tokens per second of both programs, in turns."""
    length = args.prompt_length + args.new_tokens + 1
    engine = Engine(load(args, kind), max_seq_length=length, sampler=Sampler(temperature=0), compile=True)
    prompt, gguf = [5] * args.prompt_length, args.gguf.get(kind)
    ours(engine, prompt, 4)
    rounds: dict[str, list] = {"ours": [], "llama.cpp": []}
    for _ in range(args.rounds):
        rounds["ours"].append(ours(engine, prompt, args.new_tokens))
        if args.llama and gguf:
            program = args.llama / "llama-bench"
            rounds["llama.cpp"].append(theirs(program, gguf, threads, args.prompt_length, args.new_tokens))
    row = {"prompt": args.prompt_length} | {name: summary(own) for name, own in rounds.items() if own}
    if rounds["llama.cpp"]:
        medians = {of: {name: v["median"] for name, v in row[of].items()} for of in rounds}
        row["ratio"] = {name: medians["ours"][name] / medians["llama.cpp"][name] for name in ("decode", "prefill")}
    return row


@torch.inference_mode()
def perplexity(args: argparse.Namespace, kind: str, threads: int) -> dict:
    """Of both programs' weights, as llama-perplexity measures it: the second half of each WINDOW tokens of a text."""
    model, tokenizer = load(args, kind), load_tokenizer(args.checkpoint_path.parent)
    tokens = torch.tensor(tokenizer.encode(args.text.read_text(encoding="utf-8")))
    losses = []
    for window in tokens[: args.windows * WINDOW].split(WINDOW):
        if len(window) == WINDOW:
            logits = model(window[None], torch.tensor([0]), model.cache(1, WINDOW), all_logits=True)[0]
            losses.append(F.cross_entropy(logits[WINDOW // 2 : -1], window[WINDOW // 2 + 1 :]).item())
    row = {"ours": math.exp(statistics.mean(losses)), "windows": len(losses)}
    if args.llama and (gguf := args.gguf.get(kind)):
        command = [args.llama / "llama-perplexity", "-m", gguf, "-f", args.text, "-t", threads, "-c", WINDOW]
        command += ["--chunks", len(losses)]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        row["llama.cpp"] = float(re.search(r"Final estimate: PPL = ([0-9.]+)", result.stdout + result.stderr)[1])
    return row


def beside_transformers(args: argparse.Namespace, threads: int) -> dict[str, dict]:
    """Tokens per second of a prompt of LONG tokens, and of decoding ROWS rows after 64 tokens, in turns with plain
    transformers, whose weights are random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    long, many = torch.full((1, LONG), 5), torch.full((ROWS, 64), 5)

    def of_ours(kind: str):
        options = {"sampler": Sampler(temperature=0), "compile": True}
        model = load(args, kind)
        one = Engine(model, max_seq_length=LONG + 1, **options)
        all_ = Engine(model, batch_size=ROWS, max_seq_length=128, **options)

        def run() -> dict[str, float]:
            begin = time.perf_counter()
            one.prefill(long.tolist())
            read = time.perf_counter()
            all_.prefill(many.tolist())
            decode = time.perf_counter()
            for _ in all_.decode(STEPS):
                pass
            return {"prefill": LONG / (read - begin), "decode": ROWS * STEPS / (time.perf_counter() - decode)}

        return run

    def of_theirs(dtype: torch.dtype):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.checkpoint_path.parent)).to(dtype)

        @torch.inference_mode()
        def run() -> dict[str, float]:
            begin = time.perf_counter()
            model(long, use_cache=True, logits_to_keep=1)
            read = time.perf_counter()
            out = model(many, use_cache=True, logits_to_keep=1)
            decode = time.perf_counter()
            for _ in range(STEPS):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
            return {"prefill": LONG / (read - begin), "decode": ROWS * STEPS / (time.perf_counter() - decode)}

        return run

    runs = {f"ours, {kind}": of_ours(kind) for kind in args.kinds}
    runs |= {f"transformers, {name}": of_theirs(DTYPES[name]) for name in ("bf16", "fp32")}
    rounds: dict[str, list] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            rounds[name].append(run())
    return {name: {"threads": threads} | summary(own) for name, own in rounds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--threads", nargs="+", type=positive, default=[1, 2])
    parser.add_argument("--llama", type=Path, help="the directory of llama.cpp's programs")
    parser.add_argument("--gguf", nargs="+", default=[], metavar="KIND=FILE", help="the same model, for it")
    parser.add_argument("--prompt_length", type=positive, default=512)
    parser.add_argument("--new_tokens", type=positive, default=64)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--text", type=Path, help="measure perplexity on this file")
    parser.add_argument("--windows", type=positive, default=20, help="how much of it, in windows of 512 tokens")
    parser.add_argument("--transformers", action="store_true", help="measure a long prompt and many rows beside it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.gguf = dict(pair.split("=", 1) for pair in args.gguf)
    if not args.checkpoint_path.is_file():
        raise UserError(f"{args.checkpoint_path} does not exist; scripts/prepare.sh makes checkpoints")
    library = cpu_library.library()
    result = {"processor": processor(), "instruction_set": library.name if library else None}
    result |= {"torch": torch.__version__, "model": args.checkpoint_path.parent.name}
    section = "transformers" if args.transformers else "perplexity" if args.text else "rows"
    rows = {}
    if args.json and args.json.is_file():
        before = json.loads(args.json.read_text())
        if all(before[key] == result[key] for key in result):
            result, rows = before, before.get(section, {})

    def keep(new: dict[str, dict]) -> None:
        rows.update(new)
        print(json.dumps(new), flush=True)
        result[section] = dict(sorted(rows.items()))
        result["commit"] = provenance()["commit"]
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    for threads in args.threads:
        torch.set_num_threads(threads)
        if args.transformers:
            keep(beside_transformers(args, threads))
            continue
        for kind in args.kinds:
            run = perplexity if args.text else beside_llama
            keep({f"{kind}, {threads}" if run is beside_llama else kind: run(args, kind, threads)})


if __name__ == "__main__":
    main()
