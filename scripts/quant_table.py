"""What quantising costs: perplexity, size and CPU speed of every kind of weight, on SmolLM2, in two bases.

    python scripts/quant_table.py            writes benchmarks/quant_smollm2.json and prints it as a table

What the file holds already is kept, so an interrupted run goes on where it was, and speed can be measured apart.

SmolLM2's weights here were dequantised from blocks of 32 4-bit integers, so that int4 in groups of 32 finds that very
grid again and is nearly lossless by construction. The generic basis is the same function without the grid: each norm's
gain is folded into the weights after it, and the residual stream is rotated by a random orthogonal matrix (QuaRot,
arXiv 2404.00456).

The text is Python's own reference (pydoc_data.topics): calibration reads its first half, perplexity part of the second.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import load_model, new_state_dict, read_json
from errors import run_cli
from generate import pick_device
from linear import GROUPS, Linear
from model import KVCache
from quantize import calibration_sequences, gptq_checkpoint, open_model, quantize_checkpoint
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 512  # tokens that perplexity sees at once
KINDS = ["bf16", "int8", "fp8", *(f"{kind}.g{G}" for G in GROUPS for kind in ("int4", "int4-gptq"))]


def texts() -> tuple[str, str]:
    """Text to calibrate on, and held-out text."""
    pages = [topics[name] for name in sorted(topics)]
    half = len(pages) // 2
    return "\n\n".join(pages[:half]), "\n\n".join(pages[half:])


def to_generic_basis(source: Path, folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write the same function in a random basis of the residual stream; returns its model.pth. The output is untied."""
    config, state, _ = open_model(source)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(config.dim, config.dim, dtype=torch.float64, generator=generator))[0]
    gains = {"wqkv": "attention_norm", "w1": "ffn_norm", "w3": "ffn_norm"}
    with new_state_dict(folder / "model.pth", {n: (tuple(t.shape), dtype) for n, t in state.items()}) as target:
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
def perplexity(path: Path, tokens: Tensor, device: torch.device) -> float:
    """exp of the mean negative log-likelihood in windows; activations fp32, so that only the weights count."""
    model = load_model(path, dtype=torch.float32, device=device)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear):  # dequantise once, not in each window
            tensors = {"weight": layer.dequantized(torch.float32)}
            model.set_submodule(name, Linear.from_tensors(layer.in_features, layer.out_features, tensors))
    cache = KVCache(model.config, 1, WINDOW, dtype=torch.float32, device=device)
    start, total, count = torch.zeros(1, dtype=torch.int32, device=device), 0.0, 0
    for window in tokens.to(device).split(WINDOW):
        logits = model(window[None], start, cache, all_logits=True, context=len(window))[0]
        total += torch.nn.functional.cross_entropy(logits[:-1], window[1:].long(), reduction="sum").item()
        count += len(window) - 1
    return torch.tensor(total / count, dtype=torch.float64).exp().item()


def write(source: Path, target: Path, kind: str, calibration: list[Tensor], device: torch.device) -> float:
    """Quantise `source`, unless the kind is its own; returns the seconds it took."""
    start = time.perf_counter()
    mode, _, group = kind.partition(".g")
    if mode == "int4-gptq":
        gptq_checkpoint(source, target, int(group), calibration, device)
    elif mode != "bf16":
        quantize_checkpoint(source, target, f"int4:{group}" if group else mode, device)
    return time.perf_counter() - start


def decode_speed(path: Path, samples: int) -> float:
    """Median decode tok/s of generate.py --compile, a process of its own as users run it."""
    options = "--device cpu --compile --prompt 5 --max_new_tokens 100 --temperature 0 --json"
    command = [sys.executable, "generate.py", "--checkpoint_path", str(path.absolute()), *options.split()]
    command += ["--num_samples", str(samples)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return json.loads(out.splitlines()[-1])["decode_tokens_per_second"]


def table(results: dict[str, dict[str, dict]]) -> str:
    """Markdown. A loss is the perplexity above bf16's; what GPTQ recovers is a share of the loss of rounding."""
    lines = [
        "| weights | MB | CPU tok/s | perplexity | loss | generic basis | loss | recovered |",
        "|---|---|---|---|---|---|---|---|",
    ]
    own, generic = (results.get(basis, {}) for basis in ("own", "generic"))
    for kind in (kind for kind in KINDS if own.get(kind) and generic.get(kind)):
        a, b = own[kind], generic[kind]
        loss = b["perplexity"] / generic["bf16"]["perplexity"] - 1
        rounding = generic.get(kind.replace("-gptq", ""), b)["perplexity"] / generic["bf16"]["perplexity"] - 1
        lines.append(
            f"| {kind} | {a['bytes'] / 1e6:.0f} | {a.get('tokens_per_second', 0):.1f} | {a['perplexity']:.3f} "
            f"| {100 * (a['perplexity'] / own['bf16']['perplexity'] - 1):+.2f} % | {b['perplexity']:.3f} "
            f"| {100 * loss:+.2f} % | {f'{100 * (1 - loss / rounding):.0f} %' if 'gptq' in kind else ''} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, default=ROOT / "checkpoints/SmolLM2-135M-Instruct/model.pth")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "checkpoints/quant_table")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/quant_smollm2.json")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--bases", nargs="+", choices=("own", "generic"), default=["own", "generic"])
    parser.add_argument("--device", default="cpu", help="of quantising and perplexity; speed is the CPU's")
    parser.add_argument("--tokens", type=int, default=20480, help="held-out tokens")
    parser.add_argument("--calibration_limit", type=int, default=64, help="sequences of 512 tokens")
    parser.add_argument("--samples", type=int, default=3, help="generations to time; 0: none")
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    own = args.work_dir / "own"
    own.mkdir(parents=True, exist_ok=True)
    for file in args.checkpoint_path.resolve().parent.iterdir():
        if file.name == args.checkpoint_path.name or file.suffix == ".json" or file.name == "tokenizer.model":
            (own / file.name).unlink(missing_ok=True)
            (own / file.name).symlink_to(file)
    sources = {"own": own / args.checkpoint_path.name}
    if "generic" in args.bases:
        sources["generic"] = to_generic_basis(sources["own"], args.work_dir / "generic")
    encode = load_tokenizer(sources["own"].parent).encode
    calibration_text, held_out = texts()
    tokens = torch.tensor(encode(held_out)[: args.tokens])
    device = pick_device(args.device)
    for basis in args.bases:
        for kind in args.kinds:
            source, entry = sources[basis], results.setdefault(basis, {}).setdefault(kind, {})
            path = source if kind == "bf16" else source.with_name(f"model_{kind}.pth")
            if "perplexity" not in entry:
                calibration = calibration_sequences([calibration_text], encode, WINDOW, args.calibration_limit)
                entry["quantise_seconds"] = round(write(source, path, kind, calibration, device), 1)
                entry |= {"bytes": path.stat().st_size, "tokens": len(tokens)}
                entry["perplexity"] = perplexity(path, tokens, device)
            if args.samples and basis == "own" and "tokens_per_second" not in entry:
                entry["tokens_per_second"] = decode_speed(path, args.samples)
            args.output.write_text(json.dumps(results, indent=2))
            print(basis, kind, json.dumps(entry), flush=True)
    print(table(results))


if __name__ == "__main__":
    run_cli(main)
