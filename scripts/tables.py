"""Make the tables of README.md and benchmarks/README.md, and benchmarks/speed.svg, from benchmarks/*.json.

python scripts/tables.py            # after a measurement
python scripts/tables.py --check    # exit status 2 where one of the three is not current

A table stands between <!-- name --> and <!-- /name -->. Text outside these marks is left as it is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts run from any directory

if __name__ == "__main__":  # first: what follows takes seconds to import
    from process.command import command

    command("tables")

import json
import math
import re
from collections.abc import Callable, Iterable
from html import escape

from errors import UserError
from process.command import Parser

REPO = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "benchmarks/README.md")
PICTURE = "benchmarks/speed.svg"
MODES = ("bf16", "int8", "int4")
DENSE = ("h100", "h200", "h200_7b")  # results of dense models
FULL_NAMES = {"7B": "Llama-2-7B", "70B": "Llama-2-70B"}  # of gpt-fast's short ones


def results(name: str) -> dict:
    return json.loads((REPO / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


def full_name(model: str) -> str:
    return FULL_NAMES.get(model, model)


def commit(result: dict) -> str:
    """The commit in seven digits, if it is one alone."""
    found = re.fullmatch(r"([0-9a-f]{7})[0-9a-f]*(-dirty)?", result["commit"])
    return f"{found[1]}{' with local changes' if found[2] else ''}" if found else result["commit"]


def about(result: dict) -> str:
    threads = f" with {result['threads']} threads, {result['precision']}" if result["device"] == "CPU" else ""
    return f"{result['device']}{threads}, torch {result['torch']}, commit {commit(result)}: `{result['command']}`"


def table(header: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; header is its first line, cells divided by |."""
    lines = [header, "|".join(["---"] * (header.count("|") + 1)), *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join([f"| {lines[0]} |", f"|{lines[1]}|", *(f"| {line} |" for line in lines[2:])])


def paragraphs(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)


def rate(row: dict) -> str:
    return f"{row['tokens_per_second']:.1f} ({row['spread'][0]:.1f}-{row['spread'][1]:.1f})"


def beside(row: dict) -> dict | None:
    """What gpt-fast reaches on an H100 with the same model and weights, if that was measured."""
    same = [
        other
        for other in results("others")["gpu"]
        if (other["system"], other["device"]) == ("gpt-fast", "H100")
        and (other["model"], other["mode"]) == (row["model"], row["mode"])
    ]
    return same[0] if same else None


def headline() -> str:
    result = results("h100")
    rows = []
    for r in result["rows"]:
        other = beside(r)
        limit = result["read_bandwidth"] / r["weight_gigabytes"] / 1e9
        theirs = f"{other['tokens_per_second']:.1f} ({other['fraction']:.2f})" if other else ""
        cells = [f"{r['weight_gigabytes']:.2f}", f"{limit:.0f}", f"**{r['tokens_per_second']:.1f}**"]
        rows.append([full_name(r["model"]), r["mode"], *cells, f"**{r['fraction']:.2f}**", theirs])
    return paragraphs(
        table("model | weights | GB a token reads | limit, tok/s | tok/s | of the limit | gpt-fast", rows),
        f"{result['device']}, torch {result['torch']}, commit {commit(result)}. "
        f"It reads {result['read_bandwidth'] / 1e9:.0f} GB/s.",
    )


def speed() -> str:
    def part(result: dict) -> str:
        header = "model | weights | tok/s (min-max) | GB/s | of read bandwidth"
        rows = (
            (
                full_name(r["model"]),
                f"{r['mode']} {r['weight_gigabytes']:.2f} GB",
                rate(r),
                f"{r['gigabytes_per_second']:.0f}",
                f"**{r['fraction']:.3f}**",
            )
            for r in result["rows"]
        )
        title = f"{about(result)}. It reads {result['read_bandwidth'] / 1e9:.0f} GB/s."
        return paragraphs(title, table(header, rows), result.get("note", ""))

    return paragraphs(*(part(results(name)) for name in DENSE))


def rows() -> str:
    def part(result: dict) -> str:
        counts = list(result["rows"][0]["step_ms_by_rows"])
        header = " | ".join(["model", "weights", *(f"{n} row{'s' * (n != '1')}, ms" for n in counts)])
        cells = (
            (full_name(r["model"]), r["mode"], *(f"{r['step_ms_by_rows'][n]:.2f}" for n in counts))
            for r in result["rows"]
        )
        return paragraphs(f"{result['device']}, commit {commit(result)}, same run as above.", table(header, cells))

    return paragraphs(*(part(results(name)) for name in DENSE))


def _of_runs(names: str, header: str, cells: Callable[[dict], list]) -> str:
    """A table of each of these runs of bench.py on an H200."""

    def of_run(result: dict) -> str:
        title = f"{about(result)}. It reads {result['read_bandwidth'] / 1e9:.0f} GB/s and multiplies at "
        title += f"{result['matmul_rate'] / 1e12:.0f} TFLOP/s."
        return paragraphs(title, table(header, map(cells, result["rows"])), result.get("note", ""))

    return paragraphs(*(of_run(results(f"{name}_h200")) for name in names.split()))


def prompts() -> str:
    def cells(r: dict) -> list:
        tokens = r["prompt_length"] * r["batch_size"]
        speed = f"{r['prefill_ms']:.1f} | {tokens / r['prefill_ms'] * 1e3:,.0f} | **{r['prefill_mfu']:.3f}**"
        return [r["mode"], f"{r['prompt_length']:,}", speed, f"{r['memory_gigabytes']:.1f}"]

    header = "weights | prompt | first token, ms | tok/s | MFU | GB in use"
    return _of_runs("prompts prompts_peer prompts_quantised prompts_int8 prompts_int4 prompts_long", header, cells)


def contexts() -> str:
    def cells(r: dict) -> list:
        rates = f"{r['step_ms']:.3f} | {1e3 / r['step_ms']:.1f} | **{r['decode_fraction']:.3f}**"
        return [r["mode"], r.get("kv_cache") or "bf16", f"{r['context']:,}", rates]

    header = "weights | KV cache | tokens in it | step, ms | tok/s | of read bandwidth"
    return _of_runs("contexts contexts_int4 contexts_int8 contexts_fp8", header, cells)


def batches() -> str:
    def cells(r: dict) -> list:
        rates = f"{r['step_ms']:.3f} | {r['batch_size'] / r['step_ms'] * 1e3:,.0f} | **{r['decode_fraction']:.3f}**"
        return [r["mode"], r["batch_size"], f"{r['context']:,}", rates]

    header = "weights | rows | tokens in the cache of each | step, ms | tok/s in all | of read bandwidth"
    return _of_runs("batches batches_int8 batches_int4", header, cells)


def queue() -> str:
    result = results("queue_h200")

    def cells(r: dict) -> list:
        seconds = f"{r['seconds']:.1f} | {r['parts_seconds']:.1f} | **{r['of_parts']:.3f}**"
        return [r["mode"], r["prompts"], r["batch_size"], f"{r['prompt_tokens']:,}", seconds]

    header = "weights | prompts | rows | tokens in them | seconds | reading and decoding alone, s | of these"
    return paragraphs(f"{about(result)}.", table(header, map(cells, result["queues"])))


def formats() -> str:
    result = results("formats_h200")
    cells = ((r["model"], f"{r['weight_gigabytes']:.2f}", rate(r), f"**{r['fraction']:.3f}**") for r in result["rows"])
    title = f"{about(result)}. It reads {min(r['read_bandwidth'] for r in result['rows']) / 1e9:.0f} to "
    title += f"{max(r['read_bandwidth'] for r in result['rows']) / 1e9:.0f} GB/s."
    return paragraphs(title, table("weights | GB a token reads | tok/s (min-max) | of read bandwidth", cells))


def experts() -> str:
    def cells(r: dict) -> list:
        speed = f"{rate(r)} | {r['gigabytes_per_second']:.0f} | **{r['fraction']:.3f}**"
        reading = f"{r['prefill_ms']:.1f} | {r['prefill_mfu']:.3f}" if r["prompt_length"] > 5 else "|"
        return [r["model"], f"{r['mode']} {r['weight_gigabytes']:.2f} GB", f"{r['prompt_length']:,}", speed, reading]

    header = "model | weights read | prompt | tok/s (min-max) | GB/s | of read bandwidth | first token, ms | MFU"
    return _of_runs("experts experts_int8 experts_int4 experts_mxfp4 experts_prompt", header, cells)


def first_token() -> str:
    def part(result: dict) -> str:
        first = result["first_token"]
        cells = [
            ("nothing: the kernels are compiled as well", first["cold caches"]),
            ("the compiled kernels", " to ".join(map(str, first["warm caches"]))),
        ]
        title = f"{result['device']}, commit {first['commit']}: {first['what']}."
        return paragraphs(title, table("in the caches | seconds", cells))

    return paragraphs(*(part(results(name)) for name in ("h100", "h200")))


def others() -> str:
    result = results("others")
    cells = (
        (r["system"], r["device"], full_name(r["model"]), r["weights"], r["tokens_per_second"], f"{r['fraction']:.2f}")
        for r in result["gpu"]
    )
    how = "\n".join(f"- {system}: {text}." for system, text in result["how"].items())
    return paragraphs(table("program | GPU | model | weights | tok/s | of read bandwidth", cells), how)


def speculation_step() -> str:
    result = results("speculate_h100")["steps"]
    cells = (
        (
            *name.replace(",", "").split(),
            f"{r['plain_ms']:.2f}",
            f"{r['verify_over_plain']:.2f}",
            f"{r['overhead_ms']:.2f}",
        )
        for name, r in result.items()
        if isinstance(r, dict) and "verify_over_plain" in r
    )
    header = "weights | draft | sampling | plain step, ms | verifying 6 rows / plain step | overhead, ms"
    return paragraphs(f"{about(result['about'])}.", table(header, cells))


def speculation_70b() -> str:
    result = results("speculate_h100")["big"]
    steps = {name.removeprefix("k "): row for name, row in result.items() if name.startswith("k ")}
    cells = (
        (
            k,
            f"{row['report']['tokens_per_step']:.2f}",
            f"**{row['speedup']:.2f}**",
            *(f"{row['report'][f'{part}_ms']:.1f}" for part in ("plain", "draft", "verify")),
        )
        for k, row in steps.items()
    )
    plain = next(iter(steps.values()))["plain_tokens_per_second"]
    header = "k | tokens a speculation step | speed-up | plain step, ms | draft, ms | verify, ms"
    return paragraphs(f"{about(result['about'])}. Plain decoding reaches {plain:.1f} tok/s.", table(header, cells))


def real_text() -> str:
    def span(reports: list[dict], part: str, digits: int) -> str:
        times = sorted((f"{report[f'{part}_ms']:.{digits}f}" for report in reports), key=float)
        return times[0] if times[0] == times[-1] else f"{times[0]}-{times[-1]}"

    def part(section: dict) -> str:
        found = {name: row for name, row in section.items() if isinstance(row, dict) and "report" in row}
        drafts, tasks = (list(dict.fromkeys(name.split(", ")[i] for name in found)) for i in (0, 1))
        digits = 0 if section["about"]["device"] == "CPU" else 2
        cells = []
        for draft in drafts:
            of_tasks = [found[f"{draft}, {task}"] for task in tasks]
            reports = [row["report"] for row in of_tasks]
            gains = (f"**{row['speedup']:.2f}** ({row['report']['tokens_per_step']:.2f})" for row in of_tasks)
            cells.append([draft, *gains, *(span(reports, part, digits) for part in ("plain", "draft", "verify"))])
        header = " | ".join(["draft @ k", *tasks, "plain step, ms", "draft, ms", "verify, ms"])
        return paragraphs(f"{about(section['about'])}.", table(header, cells))

    return paragraphs(
        *(part(results(f"speculate_{where}")["speed"]) for where in ("h100", "cpu", "cpu_bf16")),
    )


def equality() -> str:
    def part(section: dict) -> str:
        cells = (
            (name, row["equal"], row["ties"], row["faults"], f"{max(abs(d['margin']) for d in row['parted']):.2g}")
            for name, row in section.items()
            if isinstance(row, dict) and "equal" in row
        )
        header = "draft | equal | differ at a near tie | differ elsewhere | largest gap of logits at a near tie"
        return paragraphs(f"{about(section['about'])}.", table(header, cells))

    return paragraphs(*(part(results(f"speculate_{name}")["equality"]) for name in ("equality", "h100")))


def quant(result: dict) -> str:
    """Also printed by quant_table.py, of results that need not be complete: a column that has nothing is left out."""

    def perplexity(basis: str, kind: str) -> float:
        return result.get(basis, {}).get(kind, {}).get("perplexity", math.nan)

    def loss(basis: str, kind: str) -> float:
        return perplexity(basis, kind) / perplexity(basis, "bf16") - 1

    def cells(kind: str) -> list[str]:
        row = generic.get(kind, {}) | own.get(kind, {})
        losses = [f"{perplexity(b, kind):.2f} ({100 * loss(b, kind):+.2f} %)" for b in ("own", "generic")]
        rounding = loss("generic", kind.replace("-gptq", ""))
        recovered = f"{100 * (1 - loss('generic', kind) / rounding):.0f} %" if "gptq" in kind else ""
        speed = f"{row['tokens_per_second']:.1f}" if "tokens_per_second" in row else ""
        cost = "{quantise_seconds:.0f} s, {gigabytes:.1f} GB" if "quantise_seconds" in row else ""
        cost = cost.format(**row, gigabytes=row.get("quantise_memory", 0) / 1e9)
        name = kind.replace("kv-", "bf16, its keys and values in ")
        group = int(kind.partition(".g")[2] or 0)  # with a scale and a zero
        bits = f"{4 + 32 / group:g}" if group else "8" if kind.startswith(("int8", "fp8")) else "16"
        line = [name, bits, f"{row.get('bytes', math.nan) / 1e6:.0f}", *losses, recovered, speed, cost]
        return [cell.replace(" (+nan %)", "").replace("nan %", "-").replace("nan", "-") for cell in line]

    own, generic = result.get("own", {}), result.get("generic", {})
    kinds = sorted(own | generic, key=lambda kind: (int(kind.partition(".g")[2] or 0), kind.partition(".g")[0]))
    header = ["weights", "bits", "MB", "perplexity", "in a generic basis", "GPTQ recovers", "tok/s, CPU"]
    columns = zip([*header, "time, memory to quantise"], *map(cells, kinds))
    names, *rows = zip(*(column for column in columns if {*column[1:]} - {"", "-"}))
    return paragraphs(f"{about(result)}.", table(" | ".join(names), rows), result.get("note", ""))


def quant_7b() -> str:
    result = results("h200")
    cells = (
        (kind, f"{r['seconds']:.0f}", f"{r['host_memory_gigabytes']:.1f}", f"{r['gpu_memory_gigabytes']:.1f}")
        for kind, r in result["quantize_7B"].items()
    )
    commits = ", ".join(sorted({row["commit"] for row in result["quantize_7B"].values()}))
    title = f"{result['device']}, commit {commits}: `quantize.py --device cuda` on a 7B of 13.5 GB in bf16."
    return paragraphs(title, table("weights | seconds | host memory, GB | GPU memory, GB", cells))


def tensor_parallel() -> str:
    result = results("tp")
    gpus = result["gpus"]
    alone = {(r["model"], r["mode"]): r["tokens_per_second"] for r in gpus["1"]["rows"]}
    found = [(r, n) for n, measured in gpus.items() for r in measured["rows"]]
    cells = []
    for r, n in sorted(found, key=lambda row: (row[0]["model"] != "7B", MODES.index(row[0]["mode"]))):
        one = alone.get((r["model"], r["mode"]))
        gain = f"**{r['tokens_per_second'] / one:.2f}**" if one else ""
        cells.append([full_name(r["model"]), r["mode"], n, rate(r), gain, f"{r['fraction']:.3f}"])
    reads = ", ".join(f"{measured['read_bandwidth'] / 1e9:.0f} with {n}" for n, measured in gpus.items())
    header = "model | weights | GPUs | tok/s (min-max) | gain over one | of all GPUs' read bandwidth"
    return paragraphs(f"{about(result)}. GB/s that each GPU reads: {reads}.", table(header, cells))


def two_gpus(result: dict) -> str:
    one, two = (measured["rows"] for measured in result["gpus"].values())
    cells = []
    for a, b in zip(one, two):
        steps = f"{a['step_ms']:.3f} | {b['step_ms']:.3f} | **{a['step_ms'] / b['step_ms']:.2f}**"
        reading = f"{a['prefill_ms']:.1f} | {b['prefill_ms']:.1f} | **{a['prefill_ms'] / b['prefill_ms']:.2f}**"
        cells.append([a["mode"], f"{a['prompt_length']:,}", steps, reading if a["prompt_length"] > 5 else "||"])
    header = "weights | prompt | step, one GPU, ms | two | gain | first token, one GPU, ms | two | gain"
    return paragraphs(f"{about(result)}.", table(header, cells), result.get("note", ""))


def all_reduce() -> str:
    result = results("tp")
    most = max(result["gpus"], key=int)
    times = result["gpus"][most]["all_reduce_us"]
    ours, after = (
        {"all-reduce kernel": "`ops/symmetric.py`"},
        {
            "alone": "no all-reduce",
            "summed in its kernel": "all-reduce in the layer's kernel",
            "all-reduce kernel": "then `ops/symmetric.py`",
        },
    )
    sizes = [size for size in times if "after" not in size]
    ways = list(times[sizes[0]])
    by_size = ([size, *(f"{times[size][way]:.1f}" for way in ways)] for size in sizes)
    (layer,) = (times[size] for size in times if "after" in size)
    return paragraphs(
        f"{most} {result['device']}s in the same run, microseconds in a CUDA graph.",
        table(" | ".join(["size", *(ours.get(way, way) for way in ways)]), by_size),
        "A row-parallel linear layer with an output of 8192 bytes, microseconds:",
        table(" | ".join(after[way] for way in layer), [[f"{us:.1f}" for us in layer.values()]]),
    )


def cpu(result: dict) -> str:
    def spread(v: dict) -> str:
        return f"{v['median']:.0f} ({v['min']:.0f}-{v['max']:.0f})"

    def turns(row: dict, name: str) -> list[str]:
        return [*(spread(row[of][name]) for of in ("ours", "llama.cpp")), f"**{row['ratio'][name]:.2f}**"]

    lengths = {row["prompt"] for row in result["rows"].values()}
    speeds = ([*of.split(", "), *turns(r, "decode"), *turns(r, "prefill")] for of, r in result["rows"].items())
    prompt = f"prompt of {', '.join(map(str, sorted(lengths)))}, tok/s | llama.cpp | ratio"
    parts = [
        f"{result['processor']} ({result['instruction_set']}), torch {result['torch']}, commit {commit(result)}: "
        "`scripts/bench_cpu.py`, median (least-most).",
        table(f"weights | threads | decode, tok/s | llama.cpp | ratio | {prompt}", speeds),
    ]
    if quality := result.get("perplexity"):
        cells = ([kind, f"{r['ours']:.3f}", f"{r.get('llama.cpp', math.nan):.3f}"] for kind, r in quality.items())
        parts.append("Perplexity of a text as llama-perplexity measures it, in windows of 512 tokens:")
        parts.append(table("weights | this | llama.cpp", cells))
    if others := result.get("transformers"):
        cells = ([program, spread(r["prefill"]), spread(r["decode"])] for program, r in others.items())
        parts.append("Beside plain transformers with 2 threads, tok/s:")
        parts.append(table("program, weights | prompt of 2,048 | 16 rows", cells))
    return paragraphs(*parts)


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "speed": speed,
    "rows": rows,
    "prompts": prompts,
    "contexts": contexts,
    "batches": batches,
    "queue": queue,
    "formats": formats,
    "experts": experts,
    "first_token": first_token,
    "others": others,
    "speculation_step": speculation_step,
    "speculation_70b": speculation_70b,
    "real_text": real_text,
    "equality": equality,
    "quant": lambda: quant(results("quant_smollm2")),
    "quant_gemma3": lambda: quant(results("quant_gemma3")),
    "quant_7b": quant_7b,
    "tensor_parallel": tensor_parallel,
    "two_gpus": lambda: paragraphs(*(two_gpus(results(f"tp2{name}_h200")) for name in ("", "_prompts", "_moe"))),
    "all_reduce": all_reduce,
    "cpu": lambda: paragraphs(*(cpu(results(name)) for name in ("cpu_zen4", "cpu_zen4_avx2", "cpu"))),
}

# Colours of middle lightness: the picture has no background, and is read on white and on dark pages.
INK, BAR, LIMIT, MARK = "#768390", "#3b82f6", "#8b98a5", "#f08c00"
BAR_LEFT, BAR_WIDTH, BAR_HEIGHT, LINE, GROUP = 166, 386, 18, 26, 98  # pixels
WIDTH, TOP, RATE_RIGHT, SHARE_RIGHT = 760, 74, 668, 748


def text(x: float, y: float, words: str, size: int = 13, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" {style}>{escape(words)}</text>'


def bar(row: dict, limit: float, scale: float, y: float) -> list[str]:
    """One line of the picture: measured speed inside the outlined limit. scale: pixels for one token a second."""
    middle, right = y + BAR_HEIGHT - 5, 'text-anchor="end"'
    rect = f'<rect x="{BAR_LEFT}" y="{y:g}" height="{BAR_HEIGHT}" rx="2"'
    shapes = [
        text(BAR_LEFT - 12, middle, row["mode"], style=right),
        f'{rect} width="{row["tokens_per_second"] * scale:.1f}" fill="{BAR}"/>',
        f'{rect} width="{limit * scale:.1f}" fill="none" stroke="{LIMIT}" stroke-width="1.5"/>',
        text(RATE_RIGHT, middle, f"{row['tokens_per_second']:.0f} of {limit:.0f}", style=right),
        text(SHARE_RIGHT, middle, f"{100 * row['fraction']:.0f} %", style=f'font-weight="600" {right}'),
    ]
    if other := beside(row):
        x = BAR_LEFT + other["tokens_per_second"] * scale
        shapes.append(f'<path d="M{x:.1f} {y - 3:g}v{BAR_HEIGHT + 6}" stroke="{MARK}" stroke-width="3"/>')
    return shapes


def picture() -> str:
    """Measured speed against the limit, as SVG. Each model has a scale of its own, which ends at its highest limit."""
    result = results("h100")
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    key, right = 44, 'text-anchor="end"'
    shapes = [
        text(12, 20, "Tokens per second at batch 1 on one H100, a scale for each model", 15, 'font-weight="600"'),
        f'<rect x="12" y="{key - 10}" width="22" height="12" rx="2" fill="{BAR}"/>',
        text(40, key, "measured"),
        f'<rect x="120" y="{key - 10}" width="22" height="12" rx="2" fill="none" stroke="{LIMIT}" stroke-width="1.5"/>',
        text(148, key, "limit: read bandwidth / bytes of the weights"),
        f'<path d="M458 {key - 12}v16" stroke="{MARK}" stroke-width="3"/>',
        text(466, key, "gpt-fast"),
        text(RATE_RIGHT, key, "tok/s", style=right),
        text(SHARE_RIGHT, key, "of limit", style=right),
    ]
    for i, model in enumerate(models):
        found = [row for row in result["rows"] if row["model"] == model]
        limits = [result["read_bandwidth"] / row["weight_gigabytes"] / 1e9 for row in found]
        top = TOP + i * GROUP
        shapes.append(text(12, top + LINE + BAR_HEIGHT - 5, full_name(model), style='font-weight="600"'))
        for line, (row, limit) in enumerate(zip(found, limits)):
            shapes += bar(row, limit, BAR_WIDTH / max(limits), top + line * LINE)
    height = TOP + len(models) * GROUP - 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    fonts = "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\""
    return "\n".join([f'{head} role="img" fill="{INK}" {fonts}>', *shapes, "</svg>", ""])


def rebuilt(page: str) -> str:
    """The page with each of its tables made anew. Raises UserError for a table that is not known."""

    def build(found: re.Match) -> str:
        if found[1] not in TABLES:
            raise UserError(f"table {found[1]!r} is not one of {', '.join(TABLES)}")
        return f"<!-- {found[1]} -->\n{TABLES[found[1]]()}\n<!-- /{found[1]} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", build, page, flags=re.S)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 2 where a file is not current")
    args = parser.parse_args()
    made = {name: rebuilt((REPO / name).read_text(encoding="utf-8")) for name in PAGES} | {PICTURE: picture()}
    for name, new in made.items():
        path = REPO / name
        if not args.check:
            path.write_text(new, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != new:
            raise UserError(f"{name} differs from benchmarks/*.json: run scripts/tables.py")
