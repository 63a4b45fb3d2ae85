"""Rewrite a checkpoint to int8, fp8 or int4 weights: `python quantize.py --checkpoint_path .../model.pth --mode int8`.

int8, fp8 and int4 stream tensor by tensor from the mapped source to the mapped target; int4-gptq goes layer by layer.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import model_shapes, new_state_dict, read_config, torch_load
from errors import UserError, run_cli
from generate import DEFAULT_CHECKPOINT, pick_device
from gptq import Hessian, gptq
from linear import GROUPS, Int4Linear, Linear, quantize_linear, quantizer
from model import KVCache, ModelConfig, RMSNorm, Transformer, TransformerBlock
from tokenizer import load_tokenizer
from tp import TensorParallel

CHUNK = 1 << 22  # weights quantised at a time: bounds the memory that the largest output layer takes
SHORTEST = 32  # tokens of a calibration sequence


def open_model(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The blueprint and the mapped full-precision tensors of a model.pth, a tied output under a name of its own.

    Raises UserError when it is quantised already, and for missing, unexpected or wrongly shaped tensors.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; scripts/prepare.sh makes it")
    config, state = read_config(path.parent), dict(torch_load(path))
    if quantised := [n for n, t in state.items() if n.endswith(".scales") or t.dtype.itemsize < 2]:
        raise UserError(f"{path} is quantised already ({quantised[0]}); give the full-precision checkpoint")
    shapes = model_shapes(config)
    if config.tied and "output.weight" in state:
        shapes["output.weight"] = shapes["tok_embeddings.weight"]
    for name in sorted(shapes.keys() | state.keys()):
        expected, found = shapes.get(name), tuple(state[name].shape) if name in state else None
        if expected != found:
            raise UserError(f"{path}: {name} has shape {found} where config.json implies {expected}")
    if config.tied:
        state.setdefault("output.weight", state["tok_embeddings.weight"])
    return config, state


def linear_names(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        return [name for name, module in Transformer(config).named_modules() if isinstance(module, Linear)]


@contextmanager
def new_checkpoint(path: Path, config: ModelConfig, state: dict[str, Tensor], mode: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of the quantised file, to be filled: linear weights in `mode`'s layout, all else copied already."""
    spec = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
    for name in linear_names(config):
        weight = state[f"{name}.weight"].to("meta")
        spec |= {f"{name}.{key}": (tuple(t.shape), t.dtype) for key, t in quantizer(mode)(weight).items()}
    with new_state_dict(path, spec) as target:
        for name in target.keys() & state.keys() - {f"{name}.weight" for name in linear_names(config)}:
            target[name].copy_(state[name])
        yield target


def quantize_checkpoint(source: Path, target: Path, mode: str, device: torch.device) -> None:
    """Round a checkpoint's linear weights to `mode` (linear.quantizer's). In memory is a chunk of a tensor at a time.

    Raises UserError and leaves no file when the source is no full-precision checkpoint or holds NaN.
    """
    config, state = open_model(source)
    names = linear_names(config)
    weights = sum(state[f"{name}.weight"].numel() for name in names)
    with new_checkpoint(target, config, state, mode) as tensors, _progress(weights) as progress:
        for name in names:
            weight = state[f"{name}.weight"]
            rows = max(1, CHUNK // weight.shape[1])
            for start in range(0, len(weight), rows):
                chunk = {"weight": weight[start : start + rows].to(device)}
                for key, value in quantize_linear(mode, chunk, f"{source}: {name}").items():
                    tensors[f"{name}.{key}"][start : start + rows].copy_(value)
                progress.update(chunk["weight"].numel())


def _progress(weights: int) -> tqdm:
    return tqdm(total=weights, desc="quantising", unit="weight", unit_scale=True)


# --- GPTQ -------------------------------------------------------------------------------------------------------------


class Recorder(Linear):
    """A linear layer that accumulates its inputs' Hessian while it works."""

    def forward(self, x: Tensor, norm: RMSNorm | None = None, **fused) -> Tensor:
        self.hessian.add(x if norm is None else norm(x))
        return super().forward(x, norm, **fused)


def gptq_checkpoint(
    source: Path,
    target: Path,
    group: int,
    sequences: list[Tensor],
    device: torch.device,
    *,
    offload: bool = False,
    **options,
) -> None:
    """Quantise a checkpoint by GPTQ, layer by layer, each calibrated on the output of the quantised ones before it.

    sequences: calibration tokens, int (B, S) each; offload: keep activations in host memory; options: gptq.gptq's.
    Raises UserError and leaves no file when the source is no full-precision checkpoint or activations are not finite.
    """
    config, state = open_model(source)
    # CPUs without half-precision arithmetic calibrate faster in fp32, and no CPU worse.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    home = torch.device("cpu") if offload else device
    embedding = state["tok_embeddings.weight"]
    activations = [embedding[tokens.long()].to(home, dtype) for tokens in sequences]
    pending = {name: state[f"{name}.weight"].numel() for name in linear_names(config)}
    with (
        new_checkpoint(target, config, state, f"int4:{group}") as tensors,
        _progress(sum(pending.values())) as progress,
    ):

        def quantize(name: str, weight: Tensor, hessian: Hessian) -> Tensor:
            """Quantise a layer into the file; returns what its weight has become."""
            if not weight.isfinite().all():
                raise UserError(f"{source}: {name} holds NaN or infinite weights")
            q, scales, zeros = gptq(weight, hessian.mean, group, **options)
            packed = Int4Linear.tensors(q, scales, zeros)
            for key, value in packed.items():
                tensors[f"{name}.{key}"].copy_(value)
            progress.update(pending.pop(name))
            return Int4Linear.from_tensors(weight.shape[1], weight.shape[0], packed).dequantized(dtype)

        for i in range(config.n_layer):
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            quantize_block(config, i, own, activations, device, dtype, lambda n, w, h, p=prefix: quantize(p + n, w, h))
        norm = RMSNorm(config.dim, config.norm_eps).to(device, dtype)
        norm.weight.copy_(state["norm.weight"])
        hessian = input_hessian(activations, norm, device)
        quantize("output", state["output.weight"].to(device), hessian)
        assert not pending, f"quantize_block knows nothing of {pending}"


def quantize_block(
    config: ModelConfig,
    layer: int,
    state: dict[str, Tensor],
    activations: list[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    quantize: Callable[[str, Tensor, Hessian], Tensor],
) -> None:
    """Quantise one block's linears in the order in which they run, and replace `activations` by the block's output."""
    with torch.device("meta"):
        block = TransformerBlock(config, layer, TensorParallel())
    block.load_state_dict({name: t.to(device, dtype) for name, t in state.items()}, assign=True)
    one = replace(config, n_layer=1)
    caches = {
        shape: KVCache(one, *shape, dtype=dtype, device=device) for shape in {tuple(x.shape[:2]) for x in activations}
    }

    def attention(x: Tensor) -> Tensor:
        B, S, _ = x.shape
        start, cache = torch.zeros(B, dtype=torch.int32, device=device), caches[B, S]
        return block.attention(x, block.attention_norm, start, cache.k[0], cache.v[0], cache.rope, S)

    def feed_forward(x: Tensor) -> Tensor:
        return block.feed_forward(x, block.ffn_norm)

    for part, norm, first, last in (
        (attention, block.attention_norm, ("attention.wqkv",), "attention.wo"),
        (feed_forward, block.ffn_norm, ("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2"),
    ):
        hessian = input_hessian(activations, norm, device)
        for name in first:
            linear = block.get_submodule(name)
            linear.weight.data = quantize(name, linear.weight, hessian)
        linear = block.get_submodule(last)
        recorder = Recorder.from_tensors(linear.in_features, linear.out_features, dict(linear.named_parameters()))
        recorder.hessian = Hessian(linear.in_features, device)
        block.set_submodule(last, recorder)
        for x in activations:
            part(x.to(device))
        block.set_submodule(last, linear)
        linear.weight.data = quantize(last, linear.weight, recorder.hessian)
        for i, x in enumerate(activations):
            activations[i] = part(x.to(device)).to(x.device)


def input_hessian(activations: Iterable[Tensor], norm: RMSNorm, device: torch.device) -> Hessian:
    """The Hessian of the linear layers that read norm(x)."""
    hessian = Hessian(len(norm.weight), device)
    for x in activations:
        hessian.add(norm(x.to(device)))
    return hessian


# --- calibration text -------------------------------------------------------------------------------------------------


def task_documents(tasks: list[str], include_path: Path | None = None) -> Iterator[str]:
    """The text of each document of lm-eval tasks: what a model would read, and the answer it should give."""
    from lm_eval.tasks import TaskManager  # heavy, and of no use to the other modes

    try:
        for task in TaskManager(include_path=include_path and str(include_path)).load(tasks)["tasks"].values():
            split = next(s for s in ("training", "validation", "test") if getattr(task, f"has_{s}_docs")())
            for doc in getattr(task, f"{split}_docs")():
                target = task.doc_to_target(doc)
                if isinstance(target, int):
                    target = task.doc_to_choice(doc)[target]
                prompt = task.doc_to_text(doc)
                yield task.config.target_delimiter.join(t for t in (prompt, target) if isinstance(t, str) and t)
    except Exception as error:  # data sets come from the net, and anything can be wrong with them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot read calibration task {' '.join(tasks)} ({reason}); give a text with --calibration_file"
        ) from None


def calibration_sequences(
    documents: Iterable[str], encode: Callable[[str], list[int]], length: int, limit: int, *, pad: bool = False
) -> list[Tensor]:
    """Up to `limit` sequences of `length` tokens, int64 (B, S) batches of about 2048 tokens.

    Documents are joined and cut; with `pad`, each begins a sequence of its own, and its shorter end counts as well.
    (Nothing needs padding: a sequence runs at its own length, which is the same under causal attention.)
    Raises UserError when there is not one sequence.
    """
    full, short, buffer, tokens = [], [], [], 0
    for document in documents:
        ids = encode(document)
        tokens += len(ids)
        buffer += ids
        while len(buffer) >= length and len(full) + len(short) < limit:
            full.append(buffer[:length])
            buffer = buffer[length:]
        if len(full) + len(short) >= limit:
            break
        if pad:
            if len(buffer) >= SHORTEST:
                short.append(buffer)
            buffer = []
    if not full and not short:
        raise UserError(f"calibration needs a sequence of {length} tokens; the text has {tokens}")
    batches = list(torch.tensor(full).split(max(1, 2048 // length))) if full else []
    return batches + [torch.tensor([ids]) for ids in short]


# --- command line -----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT, help="a full-precision model.pth")
    parser.add_argument("--mode", "-q", default="int8", choices=("int8", "fp8", "int4", "int4-gptq"))
    parser.add_argument(
        "--groupsize", type=int, default=32, help="int4: weights that share a scale: 32, 64, 128 or 256"
    )
    parser.add_argument("--label", default="_", help="what stands between the source's name and the mode's")
    parser.add_argument("--device", help="where to compute: cpu, cuda, ...; by default a GPU where there is one")
    group = parser.add_argument_group("int4-gptq")
    group.add_argument(
        "--calibration_tasks", nargs="+", default=["wikitext"], help="lm-eval tasks whose text calibrates"
    )
    group.add_argument("--calibration_file", type=Path, help="a text to calibrate on instead")
    group.add_argument("--include_path", type=Path, help="directory of further lm-eval tasks")
    group.add_argument("--calibration_limit", type=int, default=1000, help="most sequences to calibrate on")
    group.add_argument("--calibration_seq_length", type=int, default=100, help="tokens of a sequence")
    group.add_argument(
        "--pad_calibration_inputs", action="store_true", help="do not join documents; use short ones too"
    )
    group.add_argument("--percdamp", type=float, default=0.01, help="dampening, a share of the Hessian's diagonal")
    group.add_argument("--blocksize", type=int, default=128, help="columns between updates of the rest of the weight")
    group.add_argument("--mse", action=argparse.BooleanOptionalAction, default=True, help="search each group's range")
    group.add_argument("--offload", action="store_true", help="keep the calibration activations in host memory")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    if args.groupsize not in GROUPS:
        raise UserError(f"--groupsize {args.groupsize} is not supported; accepted: {', '.join(map(str, GROUPS))}")
    if args.calibration_seq_length < SHORTEST:
        raise UserError(f"--calibration_seq_length {args.calibration_seq_length} is too short; at least {SHORTEST}")
    for name in ("calibration_limit", "blocksize"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} is not positive")
    if not 0 <= args.percdamp < 1:
        raise UserError(f"--percdamp {args.percdamp} is not within 0 and 1")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check(args)
    source, device = args.checkpoint_path, pick_device(args.device)
    suffix = f"{args.mode}.g{args.groupsize}" if args.mode.startswith("int4") else args.mode
    target = source.with_name(f"{source.stem}{args.label}{suffix}.pth")
    if args.mode == "int4-gptq":
        sequences = read_calibration(args)
        options = {name: getattr(args, name) for name in ("percdamp", "blocksize", "mse", "offload")}
        gptq_checkpoint(source, target, args.groupsize, sequences, device, **options)
    else:
        quantize_checkpoint(source, target, f"int4:{args.groupsize}" if args.mode == "int4" else args.mode, device)
    if args.mode.startswith("int4"):
        report_padding(read_config(source.parent), args.groupsize)
    print(f"wrote {target} ({target.stat().st_size / 1e9:.3f} GB)")


def read_calibration(args: argparse.Namespace) -> list[Tensor]:
    if args.calibration_file:
        try:
            documents = [args.calibration_file.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --calibration_file {args.calibration_file}: {error}") from None
    else:
        documents = task_documents(args.calibration_tasks, args.include_path)
    encode = load_tokenizer(args.checkpoint_path.parent).encode
    length, limit = args.calibration_seq_length, args.calibration_limit
    return calibration_sequences(documents, encode, length, limit, pad=args.pad_calibration_inputs)


def report_padding(config: ModelConfig, group: int) -> None:
    """Say which layers the group size does not divide."""
    with torch.device("meta"):
        linears = {n: m for n, m in Transformer(config).named_modules() if isinstance(m, Linear)}
    padded = {m.in_features for m in linears.values() if m.in_features % group}
    if padded:
        count = sum(m.in_features in padded for m in linears.values())
        sizes = ", ".join(f"{K} to {K + -K % group}" for K in sorted(padded))
        print(f"padded {count} of {len(linears)} layers, whose inputs {group} does not divide: {sizes}")


if __name__ == "__main__":
    run_cli(main)
