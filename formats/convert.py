"""Convert the weights in a checkpoint directory, whatever their format, to model.pth beside them."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import DTYPES, abridged, new_state_dict, unchanged
from errors import UserError
from formats import gguf, huggingface, llama2c, meta
from formats.config import unread, weight_factors
from formats.quantised import merge
from formats.source import Lazy, Source
from linear import Linear
from model import ModelConfig, Transformer
from process.files import write_text

# The first of these that a directory has files of is read, by a function of the files.
FORMATS: dict[str, Callable[[list[Path]], Source]] = {
    "*.safetensors": huggingface.open_safetensors,
    "pytorch_model*.bin": huggingface.open_bin,
    "consolidated.*.pth": meta.open_consolidated,
    "original/consolidated.*.pth": meta.open_consolidated,
    "stories*.pt": llama2c.open_stories,
    "*.gguf": gguf.open_gguf,
}
# Tensors that say nothing a config does not: rotary tables of old exports.
IGNORED = ("rotary_emb.inv_freq", "rope.freqs", "freqs_cos", "freqs_sin", "rope_freqs.weight")


def open_source(directory: Path, model_name: str | None = None) -> Source:
    """Find out what a directory holds by its files, and open it. Raises UserError when there is nothing to convert.

    model_name: a built-in name that stands for the config.json which Hugging Face weights lack.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    for pattern, opener in FORMATS.items():
        if files := sorted(file for file in directory.glob(pattern) if not file.name.startswith("adapter_")):
            if not model_name:
                return opener(files)
            if opener in (huggingface.open_safetensors, huggingface.open_bin):
                return opener(files, model_name)
            raise UserError(f"{files[0].name} says what the model is; --model_name is for Hugging Face's weights alone")
    if any(directory.glob("adapter_*")):
        raise UserError(f"{directory} holds an adapter (LoRA); merge it into its model first: peft's merge_and_unload")
    raise UserError(f"{directory} holds no weights to convert; accepted: {', '.join(FORMATS)}")


def convert(directory: Path, dtype: torch.dtype | None = torch.bfloat16, model_name: str | None = None) -> Path:
    """Convert whatever `directory` holds to directory/model.pth, and write config.json and tokenizer files where the
    source keeps them inside (GGUF, Meta, llama2.c). Peak memory is about a layer, or two shards that cannot be mapped.

    dtype: of all weights; None: quantised linear layers stay in their bits where a layout of linear.py holds them, and
    all else is bf16. Raises UserError, and leaves no model.pth, for truncated files and missing, unexpected or wrongly
    shaped tensors.
    """
    check = unchanged(*itertools.chain.from_iterable(directory.glob(pattern) for pattern in FORMATS))
    source = open_source(directory, model_name)
    config = ModelConfig.from_hf(source.config)
    if ignored := unread(source.config):
        print(f"this family does not read these keys of config.json, nor does transformers: {', '.join(ignored)}")
    if config.tied and _untied(source):
        config = ModelConfig.from_hf({**source.config, "tie_word_embeddings": False})
    factors, kept, dtype = weight_factors(source.config), dtype is None, dtype or torch.bfloat16
    with torch.device("meta"):
        model = Transformer(config)
    blank = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if config.unit_offset:
        blank |= {name: tensor.float() for name, tensor in blank.items() if name.endswith("norm.weight")}
    if config.tied:  # stored once, as the embedding
        del blank["output.weight"]
    _check(source, config, blank)
    layers = _quantised(source, model, config, factors) if kept else {}
    like = {name: t for name, t in blank.items() if name not in layers}
    like |= {_sibling(name, key): t for name, (own, _) in layers.items() for key, t in own.items()}
    with new_state_dict(directory / "model.pth", like) as target:
        names = [*blank, *(name for name in layers if name not in blank)]
        for name in tqdm(names, desc="converting", unit="tensor", disable=None):
            check()
            if name in layers:
                values = {_sibling(name, key): value for key, value in layers[name][1]().items()}
            else:
                values = {name: source.read(name).view(target[name].shape)}
            for key, value in values.items():
                value = value if source.interleaved else interleave(value, config, name)
                if source.norm_offset and name.endswith("norm.weight"):
                    value = value.float() + source.norm_offset
                if factor := factors.get(_kind(name)):
                    value = value.float() * factor
                target[key].copy_(value)
                if not (target[key] if target[key].itemsize > 1 else target[key].float()).isfinite().all():
                    raise UserError(_not_finite(abridged(source.names[name]), value, dtype))
            del value, values  # before the next is read
        check()
        written = {**source.config, "tie_word_embeddings": config.tied}
        for name, text in {"config.json": json.dumps(written, indent=2), **source.files}.items():
            _write_new(directory / name, text)  # before model.pth is there, whose presence says that all is
    return directory / "model.pth"


def _kind(name: str) -> str:
    """The name of a tensor's module, without its layer."""
    module = name.rpartition(".")[0]
    return module.split(".", 2)[2] if module.startswith("layers.") else module


def _sibling(name: str, key: str) -> str:
    return f"{name.rpartition('.')[0]}.{key}"


def _quantised(source: Source, model: Transformer, config: ModelConfig, factors: dict) -> dict[str, tuple]:
    """The weights of linear layers that stay in their bits, by name: their tensors' likes, and what reads them. Says in
    a line which of a quantised source's do not."""
    linears = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)]
    names = {n: source.names[n] for n in linears if n in source.names and _kind(n) not in factors}
    if config.tied:
        names["output.weight"] = source.names["tok_embeddings.weight"]
    parts = {name: [source.tensors[theirs] for theirs in own] for name, own in names.items()}
    apart = {name for name, own in parts.items() if ".cond_ffn." in name and len(own) > 1}  # experts one by one
    layers = {name: layer for name, own in parts.items() if (layer := merge(own, name in apart))}
    wide = {name: own for name, own in parts.items() if name not in layers and any(p.quantised or p.why for p in own)}
    for why in sorted({_why(own) for own in wide.values()}):
        of = [name.removesuffix(".weight") for name, own in wide.items() if _why(own) == why]
        print(f"{len(of)} of {len(linears)} linear layers become bf16 ({why}): {abridged(of)}", file=sys.stderr)
    return layers


def _why(parts: list[Lazy]) -> str:
    alike = len({part.quantised and part.quantised.layout for part in parts}) == 1
    otherwise = "experts in groups of 8 bits fit no layout" if alike else "their parts are of several kinds"
    return next((part.why for part in parts if part.why), otherwise)


def _not_finite(names: str, value: Tensor, dtype: torch.dtype) -> str:
    """What to say of weights that are not finite in a dtype."""
    largest = (value if value.itemsize > 1 else value.float()).abs().max()
    if not largest.isfinite():
        return f"{names} holds NaN or infinite weights"
    fitting = [name for name, wider in DTYPES.items() if largest.to(wider).isfinite()]
    short = {dtype: name for name, dtype in DTYPES.items()}[dtype]
    return f"{names} holds {largest:g}, too large for {short}; --dtype that holds it: {' or '.join(fitting) or 'none'}"


def _untied(source: Source) -> bool:
    """Whether a source that calls its output tied stores another one (some fine-tunes do)."""
    pair = ("output.weight", "tok_embeddings.weight")
    stored = all(source.names[name][0] in source.tensors for name in pair)
    return stored and not torch.equal(*map(source.read, pair))


def _check(source: Source, config: ModelConfig, blank: dict[str, Tensor]) -> None:
    """Raises UserError where the source's tensors are not those that make `blank`'s, in names and in shapes."""
    needed = {name: source.names.get(name) or [name] for name in blank}
    used = set(itertools.chain.from_iterable(needed.values()))
    if missing := used - source.tensors.keys():
        raise UserError(f"missing tensors: {abridged(sorted(missing))}")
    if config.tied:
        used.update(source.names["output.weight"])
    if unexpected := [n for n in source.tensors if n not in used and not n.endswith(IGNORED)]:
        raise UserError(f"unexpected tensors: {abridged(sorted(unexpected))}")
    for name, tensor in blank.items():
        parts = [source.tensors[n].shape for n in needed[name]]
        experts = tensor.ndim == 3 and len(parts) > 1  # each one's matrix by itself
        shape = tuple(tensor.flatten(0, 1).shape if experts else tensor.shape)
        if any(part[1:] != shape[1:] or not part for part in parts) or sum(part[0] for part in parts) != shape[0]:
            detail = ", ".join(f"{n} {list(part)}" for n, part in zip(needed[name], parts))
            raise UserError(f"wrongly shaped tensor: {detail}; {name} needs {list(shape)}")


def interleave(value: Tensor, config: ModelConfig, name: str) -> Tensor:
    """Hugging Face rotates (i, i + rotary/2), gpt-fast (2i, 2i+1): reorder the rows of each query and key head."""
    D, rotary = config.head_dim, config.rotary_dim or config.head_dim
    if ".wqkv." in name:
        heads = config.n_head + config.n_local_heads
    elif name.endswith(("q_norm.weight", "k_norm.weight")) or ".whole_norm." in name:
        heads = len(value) // D
    else:
        return value
    order = torch.arange(D)
    order[:rotary] = torch.arange(rotary).view(2, rotary // 2).t().flatten()
    rotated = value[: heads * D].view(heads, D, *value.shape[1:])[:, order].flatten(0, 1)
    return torch.cat((rotated, value[heads * D :]))


def _write_new(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, unless there is one."""
    if not path.exists():
        write_text(path, text)
