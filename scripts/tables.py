"""Build the README's tables from benchmarks/*.json: python scripts/tables.py [--check]."""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts run from any directory

from errors import UserError, run_cli

REPO = Path(__file__).resolve().parent.parent
MODES = ("bf16", "int8", "int4")


def about(result: dict) -> str:
    return f"{result['device']}, torch {result['torch']}, `{result['command']}`"


def speed(results: dict) -> str:
    lines = []
    for result in results.values():
        lines += [f"{about(result)}; it reads {result['read_bandwidth'] / 1e9:.0f} GB/s.", ""]
        lines += ["| model | weights | tok/s (min-max) | GB/s | of read bandwidth | step of 1 / 6 / 8 / 16 rows, ms |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in result["rows"]:
            low, high = row["spread"]
            steps = " / ".join(f"{ms:.2f}" for ms in row["step_ms_by_rows"].values())
            lines.append(
                f"| {row['model']} | {row['mode']} {row['weight_gigabytes']:.2f} GB | {row['tokens_per_second']:.1f} "
                f"({low:.1f}-{high:.1f}) | {row['gigabytes_per_second']:.0f} | **{row['fraction']:.3f}** | {steps} |"
            )
        lines += ["", *([result["note"], ""] if "note" in result else [])]
    first = results["h100"]["first_token"]
    warm = " to ".join(map(str, first["warm caches"]))
    lines += [f"From the start of `generate.py --compile` to the first token of a 7B in bf16, on the H100: {warm} s,"]
    lines += [f"and {first['cold caches']} s before the kernels have been compiled once ({first['commit']})."]
    return "\n".join(lines)


def quant_7b(result: dict) -> str:
    lines = [f"A 7B-shaped model (13.5 GB in bf16), `--device cuda` on one {result['device']}; host memory counts"]
    lines += ["what it read and wrote of mapped files:", ""]
    lines += ["| | seconds | host memory, GB | GPU memory, GB |", "|---|---|---|---|"]
    for kind, row in result["quantize_7B"].items():
        memory = f"{row['host_memory_gigabytes']:.1f} | {row['gpu_memory_gigabytes']:.1f}"
        lines.append(f"| {kind} | {row['seconds']:.0f} | {memory} |")
    return "\n".join(lines)


def tensor_parallel(result: dict) -> str:
    gpus = result["gpus"]
    lines = [f"{about(result)}; a GPU reads {result['read_bandwidth'] / 1e9:.0f} GB/s.", ""]
    lines += ["| model | weights | GPUs | tok/s (min-max) | gain over one | of all GPUs' read bandwidth |"]
    lines += ["|---|---|---|---|---|---|"]
    alone = {(r["model"], r["mode"]): r["tokens_per_second"] for r in gpus["1"]["rows"]}
    rows = [(r, n) for n, found in gpus.items() for r in found["rows"]]
    for r, n in sorted(rows, key=lambda row: (row[0]["model"] != "7B", MODES.index(row[0]["mode"]))):
        one = alone.get((r["model"], r["mode"]))
        gain = f"**{r['tokens_per_second'] / one:.2f}**" if one else ""
        rate = f"{r['tokens_per_second']:.1f} ({r['spread'][0]:.1f}-{r['spread'][1]:.1f})"
        lines.append(f"| {r['model']} | {r['mode']} | {n} | {rate} | {gain} | {r['fraction']:.3f} |")
    times = gpus[max(gpus)]["all_reduce_us"]
    ways = ", ".join(f"{way} {us:.1f}" for way, us in times["8192 bytes"].items())
    layer = ", ".join(f"{way} {us:.1f}" for way, us in times.get("8192 bytes after a linear layer", {}).items())
    ways += f"; of what a linear layer makes: {layer}" if layer else ""
    lines += ["", result["note"]] if "note" in result else []
    return "\n".join(
        [*lines, "", f"An all-reduce of 8 KB over {max(gpus)} GPUs in a CUDA graph, microseconds: {ways}."]
    )


# llama.cpp's tg128 on the same kind of machine (2 vCPU EPYC with AVX2), tok/s with 1 / 2 threads.
LLAMA_CPP = {"f16": (42.9, 66.5), "bf16": (38.8, 57.4), "q8_0": (65.5, 91.9), "q4_0": (90.3, 125.2)}
CPU_KINDS = ("fp32", "bf16", "int8", "int4")


def cpu(results: dict) -> str:
    lines = ["SmolLM2-135M on two cores of an AMD EPYC with AVX2 (`scripts/bench_cpu.sh`); llama.cpp beside it:", ""]
    lines += ["| | 1 thread, tok/s | 2 threads, tok/s | of read bandwidth |", "|---|---|---|---|"]
    for kind in CPU_KINDS:
        rows = [results[f"cpu_{kind}_{threads}"]["rows"][0] for threads in (1, 2)]
        rates = " | ".join(f"{r['tokens_per_second']:.1f} ({r['spread'][0]:.1f}-{r['spread'][1]:.1f})" for r in rows)
        shares = " / ".join(f"{r['fraction']:.2f}" for r in rows)
        lines.append(f"| this, {kind}, `--compile` | {rates} | {shares} |")
    lines += [f"| llama.cpp, {kind} | {one} | {two} | |" for kind, (one, two) in LLAMA_CPP.items()]
    return "\n".join(lines)


def quant(result: dict) -> str:
    lines = [f"SmolLM2-135M on {result['device']}, torch {result['torch']}, `{result['command']}`:", ""]
    lines += [
        "| weights | MB | perplexity | in a generic basis | GPTQ recovers | tok/s, CPU | time, memory to quantise |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]

    def perplexity(basis: str, kind: str) -> float:
        return result.get(basis, {}).get(kind, {}).get("perplexity", math.nan)

    def loss(basis: str, kind: str) -> float:
        return perplexity(basis, kind) / perplexity(basis, "bf16") - 1

    own, generic = result.get("own", {}), result.get("generic", {})
    for kind in sorted(own | generic, key=lambda kind: (int(kind.partition(".g")[2] or 0), kind.partition(".g")[0])):
        row = generic.get(kind, {}) | own.get(kind, {})
        cells = [f"{perplexity(b, kind):.2f} ({100 * loss(b, kind):+.2f} %)" for b in ("own", "generic")]
        rounding = loss("generic", kind.replace("-gptq", ""))
        cells += [f"{100 * (1 - loss('generic', kind) / rounding):.0f} %" if "gptq" in kind else ""]
        cells += [f"{row['tokens_per_second']:.1f}" if "tokens_per_second" in row else ""]
        cost = "{quantise_seconds:.0f} s, {gigabytes:.1f} GB" if "quantise_seconds" in row else ""
        cells += [cost.format(**row, gigabytes=row.get("quantise_memory", 0) / 1e9)]
        line = " | ".join([kind, f"{row['bytes'] / 1e6:.0f}", *cells])
        lines.append(f"| {line} |".replace("nan (+nan %)", "-").replace("nan %", "-"))
    return "\n".join(lines + (["", result["note"]] if "note" in result else []))


def speculate(result: dict) -> str:
    commit = result["rounds"]["about"]["commit"][:7]
    lines = [
        f"A round of 5 guesses at Llama-2-7B's shape, on an NVIDIA H100 (`scripts/bench_speculate.py`, {commit}):",
        "",
    ]
    lines += ["| weights, draft | plain step, ms | verify 6 rows over a plain step | overhead a round, ms |"]
    lines += ["|---|---|---|---|"]
    for name, row in result["rounds"].items():
        if isinstance(row, dict) and "verify_over_plain" in row:
            lines.append(
                f"| {name} | {row['plain_ms']:.2f} | {row['verify_over_plain']:.2f} | {row['overhead_ms']:.2f} |"
            )
    big = {name: row for name, row in result["big"].items() if name.startswith("k ")}
    gains = ", ".join(f"{row['speedup']:.2f} with {name}" for name, row in big.items())
    plain = next(iter(big.values()))["plain_tokens_per_second"]
    lines += [
        "",
        "A 70B int4 target with a 7B int4 draft there (random weights; each guess is made to hold with chance 0.75",
    ]
    lines += [f"once the one before held): {gains}, of the {plain:.1f} tok/s of plain decoding."]
    return "\n".join(lines + (["", result["note"]] if "note" in result else []))


def real_text(results: dict) -> str:
    lines = ["SmolLM2-135M, greedy, on a CPU with 2 threads and on the H100:", ""]
    lines += ["| draft @ k, task | where | speed-up | tokens a round | plain step / draft / verify, ms |"]
    lines += ["|---|---|---|---|---|"]
    for section in (result["speed"] for result in results.values()):
        cpu = section["about"]["device"] == "CPU"
        where = f"{'CPU' if cpu else 'H100'}, {section['about']['precision']}"
        for name, row in section.items():
            if isinstance(row, dict) and "report" in row:
                r = row["report"]
                parts = " / ".join(f"{r[part]:.{0 if cpu else 2}f}" for part in ("plain_ms", "draft_ms", "verify_ms"))
                speedup, tokens = f"**{row['speedup']:.2f}**", f"{r['tokens_per_round']:.2f}"
                lines.append(f"| {name} | {where} | {speedup} | {tokens} | {parts} |")
    return "\n".join(lines)


TABLES: dict[str, tuple[tuple[str, ...], Callable[[dict], str]]] = {
    "speed": (("h100", "h200"), speed),
    "quant": (("quant_smollm2",), lambda results: quant(results["quant_smollm2"])),
    "speculate": (("speculate_h100",), lambda results: speculate(results["speculate_h100"])),
    "real_text": (("speculate_cpu", "speculate_cpu_bf16", "speculate_h100"), real_text),
    "quant_7b": (("h200",), lambda results: quant_7b(results["h200"])),
    "tensor_parallel": (("tp",), lambda results: tensor_parallel(results["tp"])),
    "cpu": (tuple(f"cpu_{kind}_{threads}" for kind in CPU_KINDS for threads in (1, 2)), cpu),
}


def rebuilt(readme: str) -> str:
    """The README with each table made anew from its results, where there are any."""
    for name, (files, build) in TABLES.items():
        paths = {file: REPO / "benchmarks" / f"{file}.json" for file in files}
        if all(path.exists() for path in paths.values()):
            body = (
                f"<!-- {name} -->\n{build({k: json.loads(p.read_text()) for k, p in paths.items()})}\n<!-- /{name} -->"
            )
            readme = re.sub(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, body=body: body, readme, flags=re.S)
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    args = parser.parse_args()
    path = REPO / "README.md"
    old = path.read_text(encoding="utf-8")
    new = rebuilt(old)
    if args.check and new != old:
        raise UserError("README.md's tables differ from benchmarks/: run scripts/tables.py")
    if not args.check:
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
