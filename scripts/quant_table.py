"""What quantising costs: perplexity, size and CPU speed of every kind of weight and cache, on SmolLM2, in two bases.

    python scripts/quant_table.py [--samples 3]       adds to benchmarks/quant_smollm2.json, and prints it as a table

What the file holds already is kept, so an interrupted run goes on where it was. Times are taken only with --samples:
they need a machine that does nothing else.

SmolLM2's weights here were dequantised from blocks of 32 4-bit integers, so that int4 in groups of 32 finds that very
grid again and is nearly lossless by construction. The generic basis is the same function without the grid: each norm's
gain is folded into the weights after it, and the residual stream is rotated by a random orthogonal matrix (QuaRot,
arXiv 2404.00456).

The text is Python's own reference (pydoc_data.topics): calibration reads its first half, perplexity part of the second.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts run from any directory

if __name__ == "__main__":  # first: what follows takes seconds to import
    from process.command import command

    command("quant_table")

import itertools
import json
import os
import subprocess
import time
from pydoc_data.topics import topics

import torch
from bench import provenance
from tables import quant
from torch import Tensor

import ops
from checkpoint import load_model, new_state_dict
from cli import pick_device
from errors import UserError
from linear import GROUPS, Linear
from process.command import Parser
from process.files import read_json, write_text
from quantize import open_model
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 512  # tokens that perplexity sees at once, and of a calibration sequence
CACHES = {f"kv-{kind}": kind for kind in ops.CACHE_KINDS}  # bf16 weights, keys and values in 8 bits
KINDS = [
    "bf16",
    *CACHES,
    "int8",
    "fp8",
    "fp8-gptq",
    *(f"{kind}.g{G}" for G in GROUPS for kind in ("int4", "int4-gptq")),
]


def texts() -> tuple[str, str]:
    """Text to calibrate on, and held-out text."""
    pages = [topics[name] for name in sorted(topics)]
    half = len(pages) // 2
    return "\n\n".join(pages[:half]), "\n\n".join(pages[half:])


def to_generic_basis(source: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the same function in a random basis of the residual stream; returns its model.pth. The output is untied."""
    model, state, _ = open_model(source)
    folder.mkdir(parents=True, exist_ok=True)
    dim, generator = model.config.dim, torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))[0]
    gains = {"wqkv": "attention_norm", "w1": "ffn_norm", "w3": "ffn_norm"}
    with new_state_dict(folder / "model.pth", {n: t.to("meta", dtype) for n, t in state.items()}) as target:
        for name, tensor in state.items():
            prefix, kind = ".".join(name.split(".")[:2]), name.split(".")[-2]
            if kind in gains:
                tensor = tensor.double() * state[f"{prefix}.{gains[kind]}.weight"].double() @ basis
            elif kind == "output":
                tensor = tensor.double() * state["norm.weight"].double() @ basis
            elif kind == "tok_embeddings":
                tensor = tensor.double() @ basis
            elif kind in ("wo", "w2"):
                tensor = basis.t() @ tensor.double()
            elif kind in ("attention_norm", "ffn_norm", "norm"):
                tensor = torch.ones_like(tensor)
            target[name].copy_(tensor)
    settings = {**read_json(source.parent / "config.json"), "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(settings))
    for file in source.parent.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / "model.pth"


@torch.inference_mode()
def perplexity(path: Path, first: Tensor, tokens: Tensor, device: torch.device, kv_cache: str | None) -> float:
    """exp of the mean negative log-likelihood of `tokens` in windows that begin with `first`, BOS or nothing;
    activations fp32, so that only weights and cache count."""
    model = load_model(path, dtype=torch.float32, device=device)
    for layer in model.modules():
        if isinstance(layer, Linear):  # dequantise once, not in each window
            layer.assign({"weight": layer.dequantized(torch.float32)})
            layer.backends = (ops.plain,)  # what kernels prepared is of the weight that was
    cache = model.cache(1, WINDOW, kv_cache)
    start, total, count = torch.zeros(1, dtype=torch.int32, device=device), 0.0, 0
    for part in tokens.split(WINDOW - len(first)):
        window = torch.cat((first, part)).to(device)
        logits = model(window[None], start, cache.first(len(window)), all_logits=True)[0]
        total += torch.nn.functional.cross_entropy(logits[:-1], window[1:].long(), reduction="sum").item()
        count += len(window) - 1
    return torch.tensor(total / count, dtype=torch.float64).exp().item()


def run(script: str, *args: object) -> tuple[str, float, int]:
    """Run a script of the repository, on the CPU or as told: standard output, seconds, and peak resident bytes."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, ROOT / script, *map(str, args)], stdout=subprocess.PIPE, text=True)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{script} failed")
    return out, time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint_path", type=Path, default=ROOT / "checkpoints/SmolLM2-135M-Instruct/model.pth")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "checkpoints/quant_table")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/quant_smollm2.json")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--bases", nargs="+", choices=("own", "generic"), default=["own", "generic"])
    parser.add_argument("--device", default="cpu", help="of quantising and perplexity; speed is the CPU's")
    parser.add_argument("--tokens", type=int, default=20480, help="held-out tokens; 0: no perplexity")
    parser.add_argument("--calibration_limit", type=int, default=32, help=f"sequences of {WINDOW} tokens")
    parser.add_argument("--samples", type=int, default=0, help="generations to time, in the model's own basis")
    args = parser.parse_args()
    about = {"device": f"{os.cpu_count()} CPU cores", **provenance()}
    results = json.loads(args.output.read_text()) if args.output.exists() else about
    own, generic = args.work_dir / "own", args.work_dir / "generic"
    own.mkdir(parents=True, exist_ok=True)
    for file in args.checkpoint_path.resolve().parent.iterdir():
        if file.name == args.checkpoint_path.name or file.suffix == ".json" or file.name == "tokenizer.model":
            (own / file.name).unlink(missing_ok=True)
            (own / file.name).symlink_to(file)
    if "generic" in args.bases:
        to_generic_basis(own / args.checkpoint_path.name, generic)
    calibration, held_out = texts()
    (args.work_dir / "calibration.txt").write_text(calibration)
    tokenizer = load_tokenizer(own)
    first = torch.tensor(tokenizer.encode(""), dtype=torch.int64)  # BOS, if prompts begin with it
    tokens = torch.tensor(tokenizer.encode(held_out, bos=False)[: args.tokens])
    options = ["--device", args.device, "--calibration_file", args.work_dir / "calibration.txt"]
    options += ["--calibration_seq_length", WINDOW, "--calibration_limit", args.calibration_limit]
    for basis, kind in itertools.product(args.bases, args.kinds):
        entry = results.setdefault(basis, {}).setdefault(kind, {})
        source = generic / "model.pth" if basis == "generic" else own / args.checkpoint_path.name
        plain = kind == "bf16" or kind in CACHES
        path = source if plain else source.with_name(f"{source.stem}_{kind}.pth")
        timed = args.samples and basis == "own" and "tokens_per_second" not in entry
        scored = args.tokens and "perplexity" not in entry
        if not plain and (timed or scored):
            mode, _, group = kind.partition(".g")
            more = ["--mode", mode, "--groupsize", group or 32, *options]
            _, seconds, memory = run("quantize.py", "--checkpoint_path", source, *more)
            entry |= {"quantise_seconds": round(seconds, 1), "quantise_memory": memory} if timed else {}
        if timed:
            how = "--device cpu --compile --prompt 5 --max_new_tokens 100 --temperature 0 --json --num_samples"
            how = [*how.split(), args.samples, *(("--kv_cache", CACHES[kind]) if kind in CACHES else ())]
            out, _, _ = run("generate.py", "--checkpoint_path", path, *how)
            entry["tokens_per_second"] = json.loads(out.splitlines()[-1])["decode_tokens_per_second"]
        if scored:
            found = perplexity(path, first, tokens, pick_device(args.device), CACHES.get(kind))
            entry |= {"tokens": len(tokens), "perplexity": found}
        if timed or scored:
            entry["bytes"] = path.stat().st_size
        write_text(args.output, json.dumps(results, indent=1) + "\n")
        print(basis, kind, json.dumps(entry), flush=True)
    print(quant(results))
