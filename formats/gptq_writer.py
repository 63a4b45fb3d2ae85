"""Our int4 files as GPTQ checkpoints, which transformers, vLLM and GPTQModel load: gptq_file.py's format, version 1."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import load_model, torch_load
from errors import UserError, shown
from formats.convert import interleave
from formats.source import HF, named
from linear import Int4, Linear
from process.files import read_json, replacing, write_text

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose tensors are ours, but for names and the order of rows


def export(path: Path) -> Path:
    """Write an int4 model*.pth, its output layer in bf16, and the tokenizer beside it as a GPTQ checkpoint. Returns
    its directory. Raises UserError for what is not int4, a family that is not supported, or not on GPTQ's grid."""
    from safetensors.torch import save_file

    settings = read_json(path.with_name("config.json"))
    if (family := settings.get("model_type")) not in FAMILIES:
        raise UserError(f"cannot export model_type {shown(family)}; supported: {', '.join(FAMILIES)}")
    model, state = load_model(path, device="meta"), torch_load(path)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    groups = {own.kind is Int4 and 2 * own.weight.shape[1] // own.scales.shape[1] for own in linears.values()}
    if len(groups) != 1 or False in groups:
        raise UserError(f"{path} is no int4 checkpoint; make one with --mode int4-gptq")
    out, (group,), config = {}, groups, model.config
    heads = [count * config.head_dim for count in (config.n_head, config.n_local_heads, config.n_local_heads)]
    layers = dict.fromkeys(f"model.layers.{i}." for i in range(config.n_layer))
    names = named(HF, settings, layers, interleaved=False).names
    for name in (name for name in state if name.endswith(("weight", "bias"))):
        module, _, key = name.rpartition(".")
        own, linear = {key: state[name]}, linears.get(module) if key == "weight" else None
        if linear:
            own = {k: state[f"{module}.{k}"] for k in ("weight", "scales", "zeros") if f"{module}.{k}" in state}
        if module == "output":
            own = {key: linear.assign(own).dequantized(torch.bfloat16)}
        order = interleave(torch.arange(len(state[name])), config, name).argsort()
        parts = [t[order].split(heads if ".wqkv." in name else len(order)) for t in own.values()]
        for theirs, *rows in zip(names[name], *parts):
            is_int4 = len(rows) == 3
            out |= packed(theirs, *rows, linear.in_features) if is_int4 else {theirs: rows[0].contiguous()}
    how = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": group, "sym": False}
    settings |= {"quantization_config": how | {"desc_act": False, "lm_head": False}, "tie_word_embeddings": False}
    folder = path.with_name(f"{path.stem}-gptq")
    folder.mkdir(exist_ok=True)
    for pattern in ("tokenizer*", "special_tokens_map.json", "generation_config.json", "chat_template*"):
        for file in path.parent.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    with replacing(folder / "model.safetensors") as partial:
        save_file(out, partial, {"format": "pt"})
    write_text(folder / "config.json", json.dumps(settings | {"torch_dtype": "float16"}, indent=2) + "\n")
    return folder


def packed(name: str, weight: Tensor, scales: Tensor, zeros: Tensor, K: int) -> dict[str, Tensor]:
    """GPTQ's tensors of an int4 weight (N, K)."""
    module, group = name.removesuffix(".weight"), 2 * weight.shape[1] // scales.shape[1]
    points, half = 8 - zeros.float() / scales.float(), scales.half()
    if not torch.equal(half.float(), scales.float()) or not torch.equal(points, points.round().clamp(1, 15)):
        raise UserError(f"{module} has zeros or scales that GPTQ's files cannot hold; --mode int4-gptq makes others")
    if K % 8 or len(weight) % 8:
        raise UserError(f"{module} is {len(weight)} x {K}; GPTQ's files hold multiples of 8")
    q = torch.stack((weight & 15, weight >> 4), -1).flatten(1)[:, :K]
    own = {"qweight": words(q).t(), "qzeros": words((points - 1).t()), "scales": half.t()}
    own["g_idx"] = torch.arange(K, dtype=torch.int32) // group
    return {f"{module}.{key}": t.contiguous() for key, t in own.items()}


def words(q: Tensor) -> Tensor:
    """Integers 0..15 (N, n), 8 of a row in an int32, the first one lowest: (N, n / 8)."""
    return (q.int().unflatten(1, (-1, 8)) << torch.arange(0, 32, 4, dtype=torch.int32)).sum(2, dtype=torch.int32)
