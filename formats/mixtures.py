"""Mixtures of experts under Hugging Face's names: the experts' matrices one by one, as all families but two publish
them; all in one tensor (E, N, K), w1's rows above w3's; or gpt-oss's, rows of w1 and w3 in turn, transposed or MXFP4.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from errors import UserError
from formats.config import config_fields
from formats.quantised import MXFP4, stored
from formats.source import Lazy, Source, dense

_MODULES = {  # ours -> one or another of these
    "gate.weight": ("mlp.gate.weight", "block_sparse_moe.gate.weight", "block_sparse_moe.router.layer.weight"),
    "shared_expert_gate.weight": ("mlp.shared_expert_gate.weight",),
    "shared_expert.w1.weight": ("mlp.shared_expert.gate_proj.weight",),
    "shared_expert.w3.weight": ("mlp.shared_expert.up_proj.weight",),
    "shared_expert.w2.weight": ("mlp.shared_expert.down_proj.weight",),
}
_EXPERT = {
    "w1": ("mlp.experts.{}.gate_proj.weight", "block_sparse_moe.experts.{}.w1.weight"),
    "w3": ("mlp.experts.{}.up_proj.weight", "block_sparse_moe.experts.{}.w3.weight"),
    "w2": ("mlp.experts.{}.down_proj.weight", "block_sparse_moe.experts.{}.w2.weight"),
}
_TOGETHER = {  # gate and up -> down
    "mlp.experts.gate_up_proj": "mlp.experts.down_proj",
    "block_sparse_moe.input_linear.weight": "block_sparse_moe.output_linear.weight",
}
LARGEST = 247  # of MXFP4's exponents, 127 more than they are: the kernels' bf16 holds what it makes; 255 is no number


def name_experts(source: Source) -> Source:
    """The source with its mixtures' names and, where a tensor holds several of ours, those in its place."""
    fields = config_fields(source.config)
    for layer in range(fields["n_layer"] if fields.get("n_expert") else 0):
        ours, theirs = f"layers.{layer}.block_sparse_moe", f"model.layers.{layer}"
        gpt_oss = f"{theirs}.mlp.experts.gate_up_proj_bias" in source.tensors
        find = _gpt_oss if gpt_oss else _usual
        source.names.update({f"{ours}.{name}": own for name, own in find(theirs, fields["n_expert"], source.tensors)})
    source.names.update(_sinks(fields))
    return source


def _sinks(fields: dict) -> dict[str, list[str]]:
    layers = range(fields["n_layer"] if fields.get("sinks") else 0)
    return {f"layers.{i}.attention.sink.weight": [f"model.layers.{i}.self_attn.sinks"] for i in layers}


def _usual(theirs: str, experts: int, tensors: dict[str, Lazy]) -> list[tuple[str, list[str]]]:
    def present(names: tuple[str, ...], *which: int) -> str:
        whole = [f"{theirs}.{name.format(*which)}" for name in names]
        return next((name for name in whole if name in tensors), whole[0])

    names = [(ours, [present(other)]) for ours, other in _MODULES.items()]
    for gate_up, down in _TOGETHER.items():
        if f"{theirs}.{gate_up}" in tensors:
            size = (*tensors[f"{theirs}.{gate_up}"].shape, 0, 0)[1] // 2
            halves = {"w1": slice(size), "w3": slice(size, None)}
            found = _derive(f"{theirs}.{gate_up}", tensors, 3, halves) | {"w2": f"{theirs}.{down}"}
            return names + [(f"cond_ffn.{ours}.weight", [name]) for ours, name in found.items()]
    each = {ours: [present(other, e) for e in range(experts)] for ours, other in _EXPERT.items()}
    return names + [(f"cond_ffn.{ours}.weight", whole) for ours, whole in each.items()]


def _gpt_oss(theirs: str, experts: int, tensors: dict[str, Lazy]) -> list[tuple[str, list[str]]]:
    names, prefix = (
        [(f"gate.{key}", [f"{theirs}.mlp.router.{key}"]) for key in ("weight", "bias")],
        f"{theirs}.mlp.experts",
    )
    every, turn = slice(None), {"w1": slice(0, None, 2), "w3": slice(1, None, 2)}
    for name, parts in (("gate_up_proj", turn), ("down_proj", {"w2": every})):
        name = f"{prefix}.{name}"
        if f"{name}_blocks" in tensors:
            tensors[name] = _mxfp4(name, tensors)
        elif whole := tensors.get(name):
            shape = (*whole.shape[:1], *whole.shape[:0:-1])
            tensors[name] = Lazy(shape, lambda name=name, whole=whole: dense(name, whole.read()).transpose(1, 2))
        for key, dims in (("weight", 3), ("bias", 2)):
            found = _derive(name if key == "weight" else f"{name}_bias", tensors, dims, parts)
            names += [(f"cond_ffn.{ours}.{key}", [whole]) for ours, whole in found.items()]
    return names


def _derive(name: str, tensors: dict[str, Lazy], dims: int, parts: Mapping[str, slice]) -> dict[str, str]:
    """Put a tensor of so many axes, by its rows of each expert, in parts. Returns their names. Raises UserError for
    another one."""
    if (whole := tensors.pop(name, None)) is None or len(whole.shape) != dims:
        raise UserError(
            f"wrongly shaped tensor: {name} {list(whole.shape) if whole else 'is missing'}; {dims} axes are needed"
        )
    blank = torch.empty(whole.shape, device="meta")
    for key, rows in parts.items():
        part = (slice(None), rows)
        own = whole.quantised.rows(part) if whole.quantised else None
        read = lambda part=part: dense(name, whole.read())[part]  # noqa: E731
        tensors[f"{name}[{key}]"] = Lazy(tuple(blank[part].shape), read, own)
    return {key: f"{name}[{key}]" for key in parts}


def _mxfp4(name: str, tensors: dict[str, Lazy]) -> Lazy:
    """Matrices (E, N, K) of `blocks` uint8 (E, N, K / 32, 16) and `scales` (E, N, K / 32), whose bytes are linear.py's
    mxfp4."""
    blocks, scales = (tensors.pop(f"{name}_{key}", None) for key in ("blocks", "scales"))
    if not scales or len(blocks.shape) != 4 or blocks.shape != (*scales.shape, 16):
        raise UserError(f"wrongly shaped tensor: {name}_blocks {list(blocks.shape)} and its scales are no MXFP4")

    def read() -> dict[str, Tensor]:
        packed = {"weight": blocks.read().flatten(2), "scales": scales.read()}
        if odd := [t.dtype for t in packed.values() if t.dtype is not torch.uint8]:
            raise UserError(f"{name}_blocks or its scales are {odd[0]}; MXFP4 is uint8")
        if (largest := packed["scales"].max()) > LARGEST:
            raise UserError(f"{name}_scales has {largest}; accepted: exponents up to {LARGEST}")
        return packed

    return stored((*scales.shape[:2], 32 * scales.shape[2]), MXFP4, read)
