"""Build the README's tables from benchmarks/*.json: python scripts/tables.py [--check]."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts run from any directory

from errors import UserError, run_cli

REPO = Path(__file__).resolve().parent.parent


def about(result: dict) -> str:
    return f"{result['device']}, torch {result['torch']}, `{result['command']}`"


def speed(result: dict) -> str:
    lines = [f"{about(result)}; it reads {result['read_bandwidth'] / 1e9:.0f} GB/s.", ""]
    lines += [
        "| model | weights | tok/s (min-max) | GB/s | of read bandwidth | step of 1 / 8 / 16 rows, ms | GB used |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        low, high = row["spread"]
        steps = " / ".join(f"{ms:.2f}" for ms in row["step_ms_by_rows"].values())
        lines.append(
            f"| {row['model']} | {row['mode']} {row['weight_gigabytes']:.2f} GB | {row['tokens_per_second']:.1f} "
            f"({low:.1f}-{high:.1f}) | {row['gigabytes_per_second']:.0f} | **{row['fraction']:.3f}** | {steps} | "
            f"{row['memory_gigabytes']:.1f} |"
        )
    return "\n".join(lines)


# llama.cpp's tg128 on the same kind of machine (2 vCPU EPYC with AVX2), tok/s with 1 / 2 threads.
LLAMA_CPP = {"f16": (42.9, 66.5), "bf16": (38.8, 57.4)}


def cpu(results: dict) -> str:
    lines = ["SmolLM2-135M on two cores of an AMD EPYC with AVX2 (`scripts/bench_cpu.sh`); llama.cpp beside it:", ""]
    lines += ["| | 1 thread, tok/s | 2 threads, tok/s | of read bandwidth |", "|---|---|---|---|"]
    for precision in ("bf16", "fp32"):
        rows = [results[f"cpu_{precision}_{threads}"]["rows"][0] for threads in (1, 2)]
        rates = " | ".join(f"{r['tokens_per_second']:.1f} ({r['spread'][0]:.1f}-{r['spread'][1]:.1f})" for r in rows)
        shares = " / ".join(f"{r['fraction']:.2f}" for r in rows)
        lines.append(f"| this, {precision}, `--compile` | {rates} | {shares} |")
    lines += [f"| llama.cpp, {kind} | {one} | {two} | |" for kind, (one, two) in LLAMA_CPP.items()]
    return "\n".join(lines)


def quant(result: dict) -> str:
    lines = [
        "Perplexity of SmolLM2-135M on 20,480 tokens of Python's language reference that calibration has not seen."
    ]
    lines += [
        "The model's own weights come from a 4-bit grid of groups of 32, which would flatter int4; so it is put in a"
    ]
    lines += [
        "generic basis first (norm gains folded into the weights, the residual stream rotated: the same logits).",
        "",
    ]
    lines += ["Incomplete: groups of 64, int8, fp8, the model's own basis and speeds are not measured yet.", ""]
    lines += ["| weights | perplexity | file, MB |", "|---|---|---|"]
    for name, row in result["generic"].items():
        lines.append(f"| {name} | {row['perplexity']:.2f} | {row['bytes'] / 1e6:.0f} |")
    return "\n".join(lines)


def speculate(result: dict) -> str:
    lines = ["A round of 5 guesses at Llama-2-7B's shape, on an NVIDIA H200 (`scripts/bench_speculate.py`):", ""]
    lines += ["| weights, draft | plain step, ms | verify 6 rows over a plain step | overhead a round, ms |"]
    lines += ["|---|---|---|---|"]
    for name, row in result["rounds"].items():
        if isinstance(row, dict) and "verify_over_plain" in row:
            lines.append(
                f"| {name} | {row['plain_ms']:.2f} | {row['verify_over_plain']:.2f} | {row['overhead_ms']:.2f} |"
            )
    return "\n".join(lines)


TABLES: dict[str, tuple[tuple[str, ...], Callable[[dict], str]]] = {
    "speed": (("h200",), lambda results: speed(results["h200"])),
    "quant": (("quant_smollm2",), lambda results: quant(results["quant_smollm2"])),
    "speculate": (("speculate_h200",), lambda results: speculate(results["speculate_h200"])),
    "cpu": (("cpu_bf16_1", "cpu_bf16_2", "cpu_fp32_1", "cpu_fp32_2"), cpu),
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
