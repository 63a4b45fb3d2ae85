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


TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {"speed": ("h200.json", speed)}


def rebuilt(readme: str) -> str:
    """The README with each table made anew from its results, where there are any."""
    for name, (file, build) in TABLES.items():
        path = REPO / "benchmarks" / file
        if path.exists():
            body = f"<!-- {name} -->\n{build(json.loads(path.read_text()))}\n<!-- /{name} -->"
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
