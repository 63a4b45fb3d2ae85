"""Rewrite a checkpoint to int8, fp8 or int4 weights: `python quantize.py --checkpoint_path .../model.pth --mode int8`.

int8, fp8 and int4 stream tensor by tensor from the mapped source to the mapped target; GPTQ goes layer by layer.
"""

if __name__ == "__main__":  # first: what follows takes seconds to import
    from process.command import command

    command("quantize")

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import ops
from checkpoint import load_model, new_state_dict, torch_load, unchanged
from cli import DEFAULT_CHECKPOINT, peak_memory, pick_device, positive
from errors import UserError
from formats.gptq_writer import export
from gptq import Hessian, gptq
from linear import GROUPS, Linear, Plain, quantize_linear, quantizer
from model import KVCache, Mixture, ModelConfig, RMSNorm, Transformer, TransformerBlock, add, rope_tables
from process.command import Parser
from texts import read_text, task_documents
from tokenizer import load_tokenizer

MODES = ("int8", "fp8", "fp8-gptq", "int4", "int4-gptq")
SHORTEST = 32  # tokens of a calibration sequence
FEW = 32  # tokens of an expert with fewer of which GPTQ would fit these alone


def open_model(path: Path) -> tuple[Transformer, dict[str, Tensor], list[str]]:
    """The model of a model.pth on the meta device, its mapped tensors, a tied output under a name of its own, and its
    linear layers' names. Raises UserError when it is quantised already, and for what load_model would refuse.
    """
    state, model = dict(torch_load(path)), load_model(path, device="meta")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    if quantised := [name for name, linear in linears.items() if linear.kind is not Plain]:
        raise UserError(f"{path} is quantised already ({quantised[0]}); give the full-precision checkpoint")
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    return model, state, list(linears)


def write_checkpoint(source: Path, path: Path, state: dict, linears: list[str], mode: str, results: Iterable) -> None:
    """Write a quantised file: in place of each linear layer's weight what `results`, of (name, tensors), has for it,
    all else as it is in `state`, which is mapped from the source."""
    check = unchanged(source)
    pending = {name: state[f"{name}.weight"].to("meta") for name in linears}
    blank = {
        f"{name}.{key}": t.unflatten(0, weight.shape[:-1])
        for name, weight in pending.items()
        for key, t in quantizer(mode)(weight.flatten(0, -2)).items()
    }
    with new_state_dict(path, state | blank) as target:
        for name in state.keys() - blank.keys():
            target[name].copy_(state[name])
            check()
        for name, tensors in tqdm(results, desc="quantising", total=len(linears), unit="layer", disable=None):
            del pending[name]
            for key, tensor in tensors.items():
                target[f"{name}.{key}"].copy_(tensor)
            check()
        assert not pending, f"nothing was made of {list(pending)}"


def quantize_checkpoint(source: Path, target: Path, mode: str, device: torch.device) -> None:
    """Round a checkpoint's linear weights to `mode` (linear.quantizer's). In memory is a tensor at a time.

    Raises UserError and leaves no file when the source is no full-precision checkpoint or holds NaN.
    """
    _, state, linears = open_model(source)
    tensors = ((name, {"weight": state[f"{name}.weight"]}) for name in linears)
    results = ((name, quantize_linear(mode, own, f"{source}: {name}", device)) for name, own in tensors)
    write_checkpoint(source, target, state, linears, mode, results)


# --- GPTQ -------------------------------------------------------------------------------------------------------------

# A linear layer: name, how many experts it is one of, itself, its inputs' Hessian, gptq's aim.
Calibrated = tuple[str, int, Linear, Hessian, Tensor | None]


def gptq_checkpoint(
    source: Path,
    target: Path,
    mode: str,
    sequences: list[Tensor],
    device: torch.device,
    *,
    offload: bool = False,
    **options,
) -> int:
    """Quantise a checkpoint by GPTQ to `mode` (linear.quantizer's), layer by layer, each calibrated on the output of
    the quantised ones before it, and aimed at what the exact ones make.

    sequences: calibration tokens, int64 (B, S) each; offload: keep activations in host memory; options: gptq.gptq's.
    Returns how many experts' matrices met too few tokens to calibrate on, and were rounded to nearest.
    Raises UserError and leaves no file when the source is no full-precision checkpoint or activations are not finite.
    """
    few = []
    model, state, linears = open_model(source)
    # CPUs without half-precision arithmetic calibrate faster in fp32, and no CPU worse.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    home = torch.device("cpu") if offload else device
    model.config.check_tokens(tokens.flatten().tolist() for tokens in sequences)
    table, scaled = state["tok_embeddings.weight"], model.tok_embeddings.scaled
    activations = [(scaled(table[tokens].to(home, dtype)),) * 2 for tokens in sequences]

    def results() -> Iterator[tuple[str, dict[str, Tensor]]]:
        made: dict[str, list[dict[str, Tensor]]] = {}
        for name, experts, linear, hessian, aim in calibrated(model, state, activations, device):
            if not linear.weight.isfinite().all():
                raise UserError(f"{source}: {name} holds NaN or infinite weights")
            if experts and hessian.tokens < FEW:
                few.append(name)
                own = quantizer(mode)(linear.weight)
            else:
                own = gptq(linear.weight, hessian.mean, mode, aim=aim, **options)
            whole = ops.dequantize(own["weight"], own["scales"], own.get("zeros"), linear.weight.dtype)
            linear.weight.data = whole[:, : linear.in_features]
            made.setdefault(name, []).append(own)
            if len(made[name]) == max(1, experts):
                parts = made.pop(name)
                yield name, {key: torch.stack([part[key] for part in parts]) for key in own} if experts else own

    write_checkpoint(source, target, state, linears, mode, results())
    return len(few)


def calibrated(
    model: Transformer, state: dict[str, Tensor], activations: list[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[Calibrated]:
    """Each linear layer with the Hessian of its inputs and what it should make of them, in the order in which they run;
    of experts, each one by itself. What the caller makes of a layer's weight counts for the next ones. Only a block is
    resident; `activations`, each with what it would be if nothing was quantised, are consumed."""

    def load(name: str, dtype: torch.dtype | None = activations[0][0].dtype) -> nn.Module:
        names = [n for n in state if n.startswith(f"{name}.")]
        module = model.get_submodule(name)
        module.load_state_dict({n.removeprefix(f"{name}."): state[n].to(device, dtype) for n in names}, assign=True)
        return module

    for i in range(model.config.n_layer):
        block = load(f"layers.{i}")
        for name, *rest in calibrated_block(model.config, i, block, activations, device):
            yield f"layers.{i}.{name}", *rest
        block.to("meta")
    yield from calibrated_inputs(activations, load("norm"), device, {"output": load("output", None)})


def calibrated_block(
    config: ModelConfig, layer: int, block: TransformerBlock, activations: list[tuple[Tensor, Tensor]], device
) -> Iterator[Calibrated]:
    """`calibrated` for a block, whose output replaces its input in `activations`."""

    def attention(x: Tensor) -> Tensor:
        cache = KVCache(replace(config, n_layer=1), *x.shape[:2], dtype=x.dtype, device=device)
        start, rope = torch.zeros(len(x), dtype=torch.int32, device=device), rope_tables(config, x.shape[1], device)
        norms = block.attention_norm, block.post_attention_norm
        return block.attention(x, norms, start, cache.layers[0], rope[layer])

    def feed_forward(x: Tensor) -> Tensor:
        return mixture(x, block.ffn_norm) if mixture else block.feed_forward(x, block.ffn_norm, block.post_ffn_norm)

    mixture = block.block_sparse_moe
    own = "block_sparse_moe.shared_expert" if mixture else "feed_forward"
    for part, norms, first, last in (
        (attention, (block.attention_norm, block.post_attention_norm), ("attention.wqkv",), "attention.wo"),
        (feed_forward, (block.ffn_norm, block.post_ffn_norm), (f"{own}.w1", f"{own}.w3"), f"{own}.w2"),
    ):
        (norm, post_norm), experts = norms, mixture if part is feed_forward else None
        after, inputs = [part(exact.to(device)).to(exact.device) for _, exact in activations], []
        if experts:
            for name, *rest in calibrated_experts(experts, norm, [x for x, _ in activations], device):
                yield f"block_sparse_moe.cond_ffn.{name}", *rest, None
        if not experts or experts.shared_expert:
            yield from calibrated_inputs(activations, norm, device, {name: block.get_submodule(name) for name in first})
            linear = block.get_submodule(last)
            alone = not experts and not post_norm  # in adding to x, and can make good what x lacks
            hessian = Hessian(linear.in_features, device, linear.out_features if alone else 0)
            recorder = linear.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
            for (x, _), exact in zip(activations, after):
                part(x.to(device))
                y = exact.to(device) - x.to(device)
                hessian.add(inputs[-1], y if linear.bias is None else y - linear.bias)
                inputs[-1] = inputs[-1].to(x.device)
            recorder.remove()
            yield last, 0, linear, hessian, hessian.products
        for i, (x, _) in enumerate(activations):
            x = x.to(device)
            made = part(x) if experts else add(x, linear, inputs[i].to(device), post_norm)
            activations[i] = made.to(after[i].device), after[i]


def calibrated_experts(
    mixture: Mixture, norm: RMSNorm, activations: list[Tensor], device: torch.device
) -> Iterator[tuple]:
    """`calibrated` for experts, each on the tokens that are sent to it."""
    inputs = [norm(x.to(device)).flatten(0, -2) for x in activations]
    met = [ops.route(mixture, h)[0].to(x.device) for h, x in zip(inputs, activations)]
    inputs = [h.to(x.device) for h, x in zip(inputs, activations)]
    layers = {name: getattr(mixture.cond_ffn, name) for name in ("w1", "w3", "w2")}
    for layer in layers.values():
        layer.weight.data = layer.weight.clone()  # of what may be mapped from the source
    for e in range(n := len(mixture.gate.weight)):
        x = torch.cat([h[(index == e).any(1)] for h, index in zip(inputs, met)]).to(device)
        for name, layer in layers.items():
            if name == "w2":
                biases = [None if layers[name].bias is None else layers[name].bias[e] for name in ("w1", "w3")]
                gate_up = (F.linear(x, layers[name].weight[e], bias) for name, bias in zip(("w1", "w3"), biases))
                x = ops.glu(mixture, *gate_up)
            if name != "w3":
                hessian = Hessian(x.shape[1], device)
                hessian.add(x)
            with torch.device("meta"):
                own = Linear(layer.in_features, layer.out_features).assign({"weight": layer.weight[e]})
            yield name, n, own, hessian
            layer.weight.data[e] = own.weight


def calibrated_inputs(
    activations: list[tuple[Tensor, Tensor]], norm: RMSNorm | None, device: torch.device, linears: dict[str, Linear]
) -> Iterator[Calibrated]:
    """`calibrated` for linear layers that read norm(x), or x."""
    hessian = Hessian(activations[0][0].shape[-1], device, activations[0][0].shape[-1])
    for pair in activations:
        hessian.add(*(norm(x.to(device)) if norm else x.to(device) for x in pair))
    for name, linear in linears.items():
        yield name, 0, linear, hessian, linear.weight.float() @ hessian.products


# --- calibration text -------------------------------------------------------------------------------------------------


def calibration_sequences(
    documents: Iterable[str], encode: Callable[[str], list[int]], length: int, limit: int, *, pad: bool = False
) -> list[Tensor]:
    """Up to `limit` sequences of `length` tokens, int64 (B, S) batches of about 2048 tokens. Raises UserError for none.

    Documents are joined and cut; with `pad`, each begins a sequence of its own, and its shorter end counts as well, at
    its own length. A sequence begins with what encode("") gives: BOS, if the model's prompts begin with it.
    """
    first = encode("")
    rows, rest, tokens, size = [], [], len(first), length - len(first)
    for ids in (encode(document)[len(first) :] for document in documents):
        tokens += len(ids)
        ids = rest + ids
        pieces = (first + ids[a : a + size] for a in range(0, len(ids), size))
        rows += [piece for piece in pieces if len(piece) >= (SHORTEST if pad else length)]
        rest = [] if pad else ids[len(ids) - len(ids) % size :]
        if len(rows) >= limit:
            break
    if not rows:
        raise UserError(f"calibration needs a sequence of {length} tokens; the text has {tokens}")
    full = [row for row in rows[:limit] if len(row) == length]
    batches = list(torch.tensor(full).split(max(1, 2048 // length))) if full else []
    return batches + [torch.tensor([row]) for row in rows[:limit] if len(row) < length]


# --- command line -----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT, help="a full-precision model.pth")
    parser.add_argument("--mode", "-q", default="int8", choices=MODES)
    parser.add_argument("--groupsize", type=int, default=32, choices=GROUPS, help="int4: weights that share a scale")
    parser.add_argument("--label", default="_", help="what stands between the source's name and the mode's")
    parser.add_argument(
        "--export", choices=("gptq",), help="write an int4 checkpoint in this format, for other programs"
    )
    parser.add_argument("--device", help="where to compute: cpu, cuda, ...; by default a GPU where there is one")
    group = parser.add_argument_group("int4-gptq and fp8-gptq")
    group.add_argument("--calibration_tasks", nargs="+", default=["wikitext"], help="lm-eval tasks to calibrate on")
    group.add_argument("--calibration_file", type=Path, help="a text to calibrate on instead")
    group.add_argument("--include_path", type=Path, help="directory of further lm-eval tasks")
    group.add_argument("--calibration_limit", type=positive, default=1000, help="most sequences to calibrate on")
    group.add_argument("--calibration_seq_length", type=int, default=100, help="tokens of a sequence")
    group.add_argument("--pad_calibration_inputs", action="store_true", help="join no documents; use short ones too")
    group.add_argument("--percdamp", type=float, default=0.01, help="dampening, a share of the Hessian's diagonal")
    group.add_argument("--blocksize", type=positive, default=128, help="columns between updates of the others")
    group.add_argument("--mse", action=argparse.BooleanOptionalAction, default=True, help="search each group's range")
    group.add_argument("--offload", action="store_true", help="keep the calibration activations in host memory")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    start, args = time.perf_counter(), parse_args(argv)
    if args.calibration_seq_length < SHORTEST:
        raise UserError(f"--calibration_seq_length {args.calibration_seq_length} is too short; at least {SHORTEST}")
    if not 0 <= args.percdamp < 1:
        raise UserError(f"--percdamp {args.percdamp} is not within 0 and 1")
    source, device = args.checkpoint_path, pick_device(args.device)
    if args.export:
        print(f"wrote {export(source)}")
        return
    suffix = f"{args.mode}.g{args.groupsize}" if args.mode.startswith("int4") else args.mode
    target = source.parent / f"{source.stem}{args.label}{suffix}.pth"
    try:
        mode, _, calibrate = args.mode.partition("-")
        mode += f":{args.groupsize}" * (mode == "int4")
        if calibrate:
            file, length, limit = args.calibration_file, args.calibration_seq_length, args.calibration_limit
            documents = [read_text(file)] if file else task_documents(args.calibration_tasks, args.include_path)
            encode = load_tokenizer(source.parent).encode
            sequences = calibration_sequences(documents, encode, length, limit, pad=args.pad_calibration_inputs)
            options = {name: getattr(args, name) for name in ("percdamp", "blocksize", "mse", "offload")}
            few = gptq_checkpoint(source, target, mode, sequences, device, **options)
            if few:
                print(f"rounded {few} matrices of experts that met fewer than {FEW} calibration tokens to nearest")
        else:
            quantize_checkpoint(source, target, mode, device)
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory on {device}; try --offload (of GPTQ) or --device cpu") from None
    if args.mode.startswith("int4"):
        _, state, linears = open_model(source)
        widths = [state[f"{name}.weight"].shape[-1] for name in linears]
        if padded := [K for K in widths if K % args.groupsize]:
            sizes = ", ".join(f"{K} to {K + -K % args.groupsize}" for K in sorted(set(padded)))
            print(f"padded {len(padded)} of {len(widths)} layers, whose inputs the group does not divide: {sizes}")
    memory = f"{peak_memory() / 1e9:.1f} GB of memory at most, with what it read and wrote of mapped files"
    if device.type == "cuda":
        memory += f", and {torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB of the GPU's"
    print(f"wrote {target} ({target.stat().st_size / 1e9:.3f} GB)")
    print(f"in {time.perf_counter() - start:.0f} s, with {memory}")
