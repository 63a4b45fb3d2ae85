"""A checkpoint before conversion: lazy tensors, a config in Hugging Face's terms, and which tensors make which of ours.

Converting then holds about one layer in memory.
"""

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoint import abridged, torch_load
from errors import UserError, shown
from formats.config import config_fields, family_of, text_config

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Lazy(NamedTuple):
    """A tensor that can tell its shape without being read."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    quantised: Any = None  # a quantised.Quantised, if the file's bits can stay as they are
    why: str = ""  # if they cannot


@dataclass(frozen=True)
class Source:
    config: dict  # in Hugging Face's terms
    tensors: Mapping[str, Lazy]
    names: dict[str, list[str]]  # our name -> the source's names, whose rows are stacked
    interleaved: bool  # RoPE pairs are (2i, 2i+1) already, as in gpt-fast; else (i, i + D/2)
    norm_offset: float = 0.0  # what norms' weights lack
    files: Mapping[str, str] = field(default_factory=dict)  # what it holds beside weights, as Hugging Face's files

    def read(self, name: str) -> Tensor:
        """The source's rows for our tensor of this name."""
        return torch.cat([dense(theirs, self.tensors[theirs].read()) for theirs in self.names[name]])


def dense(name: str, tensor: Tensor) -> Tensor:
    """The tensor, if a cast is all it needs. Raises UserError for integers, fp8, complex, sparse or no data at all."""
    if tensor.dtype not in _FLOATS or tensor.layout is not torch.strided or tensor.is_meta:
        layout = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        found = f"{str(tensor.dtype).removeprefix('torch.')} and {layout}"
        raise UserError(f"{shown(name)} is {found}; accepted: strided float64, float32, float16 or bfloat16")
    return tensor


def tensors_of(where: object, values: Mapping, read: Callable[[str], Tensor]) -> dict[str, Lazy]:
    """The tensors among what torch.save wrote. Raises UserError for names that are no texts."""
    if odd := [name for name in values if not isinstance(name, str)]:
        raise UserError(f"{where}: {shown(odd[0])} is no tensor's name; a text is needed")
    shapes = {name: tuple(t.shape) for name, t in values.items() if isinstance(t, Tensor)}
    return {name: Lazy(shape, lambda name=name: read(name)) for name, shape in shapes.items()}


def torch_tensors(path: Path) -> dict[str, Lazy]:
    """The tensors of a file that torch.save wrote, such as .pth and .bin. Raises UserError for a damaged one."""
    # The file's dict is not kept: of files that cannot be mapped, torch_load keeps but the latest two.
    return tensors_of(path, torch_load(path), lambda name: torch_load(path)[name])


def one_model(files: list[Path], models: Collection) -> None:
    """Raises UserError for files of several models."""
    if len(models) > 1:
        raise UserError(f"{files[0].parent} holds several models: {abridged([f.name for f in files])}; keep one")


# --- names ------------------------------------------------------------------------------------------------------------

HF, META, GGUF = 0, 1, 2  # columns of the tables below; Meta's names are llama2.c's, too
_LAYERS = ("model.layers", "layers", "blk")
_TOP = {
    "tok_embeddings": ("model.embed_tokens", "tok_embeddings", "token_embd"),
    "norm": ("model.norm", "norm", "output_norm"),
    "output": ("lm_head", "output", "output"),
}
_LAYER = {  # several names are stacked along the rows
    "attention.wqkv": (
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attention.wq attention.wk attention.wv",
        "attn_q attn_k attn_v",
    ),
    "attention.wo": ("self_attn.o_proj", "attention.wo", "attn_output"),
    "attention.q_norm": ("self_attn.q_norm", "", "attn_q_norm"),
    "attention.k_norm": ("self_attn.k_norm", "", "attn_k_norm"),
    "attention.whole_norm.queries": ("self_attn.q_norm", "", "attn_q_norm"),
    "attention.whole_norm.keys": ("self_attn.k_norm", "", "attn_k_norm"),
    "feed_forward.w1": ("mlp.gate_proj", "feed_forward.w1", "ffn_gate"),
    "feed_forward.w3": ("mlp.up_proj", "feed_forward.w3", "ffn_up"),
    "feed_forward.w2": ("mlp.down_proj", "feed_forward.w2", "ffn_down"),
    "attention_norm": ("input_layernorm", "attention_norm", "attn_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm", "ffn_norm"),
    "post_attention_norm": ("", "", "post_attention_norm"),
    "post_ffn_norm": ("", "", "post_ffw_norm"),
}
_FUSED_QKV = ("self_attn.qkv_proj", "", "attn_qkv")
_FUSED_GATE_UP = ("mlp.gate_up_proj", "", "ffn_up")  # w1 above w3, where there is no gate


def named(style: int, config: dict, tensors: dict[str, Lazy], where: object = "config.json", **more) -> Source:
    """The Source of tensors that are named in one of the styles. where: of config; more: the Source's other fields.

    Raises UserError of config, and where there are not as many layers as it says.
    """
    family = family_of(text_config(config))
    top = {ours: theirs[style] for ours, theirs in _TOP.items()}
    layer_names, prefix = {ours: theirs[style] for ours, theirs in _LAYER.items()}, _LAYERS[style]
    if style == HF:
        layer_names |= family.tensors
        top |= {ours: family.tensors[ours] for ours in top if ours in family.tensors}
        prefix = family.layers or prefix
    names = {f"{ours}.weight": [f"{theirs}.weight"] for ours, theirs in top.items()}
    n_layer, starts = config_fields(config, where)["n_layer"], f"{prefix}."
    layers = {name.removeprefix(starts).partition(".")[0] for name in tensors if name.startswith(starts)}
    if not layers:  # another program's file
        absent = {f"{starts}*", *itertools.chain.from_iterable(names.values())} - tensors.keys()
        raise UserError(f"missing tensors: {abridged(sorted(absent))}")
    if n_layer > len(layers):  # before any is built
        raise UserError(f"missing tensors: {where} has {n_layer} layers; there are tensors of {len(layers)}")
    qkv, gate_up, gate = _FUSED_QKV[style], _FUSED_GATE_UP[style], layer_names["feed_forward.w1"]
    fused_qkv = qkv and any(f".{qkv}." in name for name in tensors)
    fused_up = gate_up and any(f".{gate_up}." in name for name in tensors)
    fused_up = fused_up and not any(f".{gate}." in name for name in tensors)
    for layer, kind in itertools.product(range(n_layer), ("weight", "bias")):
        our_layer, their_layer = f"layers.{layer}", f"{prefix}.{layer}"
        for ours, theirs in layer_names.items():
            names[f"{our_layer}.{ours}.{kind}"] = [f"{their_layer}.{name}.{kind}" for name in theirs.split()]
        if fused_qkv:
            names[f"{our_layer}.attention.wqkv.{kind}"] = [f"{their_layer}.{qkv}.{kind}"]
        if fused_up:
            halves = _halves(f"{their_layer}.{gate_up}.{kind}", tensors)
            names |= {f"{our_layer}.feed_forward.{ours}.{kind}": [half] for ours, half in zip(("w1", "w3"), halves)}
    return Source(config, tensors, names, **more)


def _halves(name: str, tensors: dict[str, Lazy]) -> list[str]:
    """Put the upper and the lower half of a tensor, if it is there, in its place. Returns their names."""
    halves = [f"{name}[0]", f"{name}[1]"]
    if whole := tensors.pop(name, None):
        rows = whole.shape[0] if whole.shape else 0
        for i, half in enumerate(halves):
            shape = ((rows + 1 - i) // 2, *whole.shape[1:])  # halves of an odd size then fit nowhere
            part = slice(i * ((rows + 1) // 2), (i + 1) * ((rows + 1) // 2))
            own = whole.quantised.rows(part) if whole.quantised else None
            tensors[half] = Lazy(shape, lambda i=i: dense(name, whole.read()).chunk(2)[i], own, whole.why)
    return halves
