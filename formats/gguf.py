"""GGUF: *.gguf, weights, hyperparameters and tokenizer in one file or in parts. The PyPI package gguf dequantises it.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import abridged
from errors import UserError, shown
from formats.config import KEYS, ROPE_TYPES, config_fields, family_of, llama3_scaling
from formats.fields import NEEDED, Field, integer, read, read_one, text
from formats.gguf_blocks import quantised
from formats.gguf_file import GGUFFile, GGUFTensor, read_gguf
from formats.gguf_tokenizer import gguf_tokenizer_files
from formats.source import GGUF, Lazy, Source, named, one_model
from model import ModelConfig, rope_table

# Architectures, called like model_types: whether q and k are interleaved already (llama.cpp's llama_rope_type).
ARCHITECTURES = {"llama": True, "smollm3": True, "qwen2": False, "qwen3": False, "phi3": False}
ARCHITECTURES |= dict.fromkeys(("gemma", "gemma2", "gemma3", "olmo2"), False)
MODEL_TYPES = {"gemma3": "gemma3_text"}  # of those that are called otherwise
INSTEAD = "convert the Hugging Face checkpoint instead"
# The file's keys, which come after the architecture's name, in config.json's terms; those of _OPTIONAL may be absent.
TERMS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_OPTIONAL = ("num_key_value_heads", "head_dim", "rope_theta", "sliding_window", *list(TERMS.values())[-2:])
# Gemma's largest models, by their layers, scale scores by hidden_size / num_attention_heads, the others by head_dim.
_LARGEST = {"gemma2": 46, "gemma3": 62}
SCALING = {
    "rope.scaling.type": text(("none", "linear", "yarn", "longrope"), default="none"),
    "rope.scaling.original_context_length": replace(KEYS["original_max_position_embeddings"], default=None),
}
SPLIT = {
    "split.no": integer(0, 99998, default=0),
    "split.count": integer(0, 99999, default=0),
    "split.tensors.count": integer(0, default=None),
}
_PART = re.compile(r"(.*)-\d{5}-of-\d{5}")


def open_gguf(files: list[Path]) -> Source:
    """Raises UserError for a damaged file, and for an architecture, tokenizer or scaling that is not supported."""
    one_model(files, {match[1] if (match := _PART.fullmatch(file.stem)) else file.stem for file in files})
    path, parts = files[0], [read_gguf(file) for file in files]
    stored = _joined(parts)
    meta = parts[0].metadata
    arch = meta.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"GGUF architecture {shown(arch)} is not supported; supported: {known}")
    tensors = {name: _lazy(name, t) for name, t in stored.items()}
    config = _config(path, arch, meta, tensors)
    config["rope_scaling"] = _rope_scaling(path, arch, meta, tensors, config)
    more = {"interleaved": ARCHITECTURES[arch], "files": gguf_tokenizer_files(meta)}
    return named(GGUF, config, tensors, where=path, **more)


def _joined(parts: list[GGUFFile]) -> dict[str, GGUFTensor]:
    """The tensors of all parts of a model. Raises UserError where some are missing or of another model."""
    path, splits = parts[0].path, [read(part.path, SPLIT, part.metadata) for part in parts]
    count = max(1, splits[0]["split.count"])
    if any(max(1, split["split.count"]) != count for split in splits):
        raise UserError(f"{path.parent}: the parts of {path.name} are not of one model: their split.count differs")
    found = [split["split.no"] for split in splits]
    if missing := sorted(set(range(count)) - set(found)):
        stem = match[1] if (match := _PART.fullmatch(path.stem)) else path.stem
        names = [f"{stem}-{no + 1:05}-of-{count:05}.gguf" for no in missing]
        raise UserError(f"{path.parent} lacks {abridged(names)}: all parts of a model are needed")
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    stored, total = sum(len(part.tensors) for part in parts), splits[0]["split.tensors.count"]
    if len(parts) != count or len(tensors) != stored or total not in (None, stored):
        raise UserError(f"{path.parent}: the {len(parts)} parts of {path.name} do not fit together")
    return tensors


def _lazy(name: str, tensor: GGUFTensor) -> Lazy:
    rows = torch.frombuffer(tensor.data, dtype=torch.uint8) if len(tensor.data) else torch.empty(0, dtype=torch.uint8)
    own = quantised(tensor.kind.name, rows.view(tensor.shape[0], -1), tensor.shape)
    floating = own or tensor.kind.name in ("F64", "F32", "F16", "BF16")
    why = "" if floating else f"GGUF type {tensor.kind.name} fits no layout"
    return Lazy(tensor.shape, lambda: _dequantize(name, tensor), own, why)


def _dequantize(name: str, tensor: GGUFTensor) -> Tensor:
    import numpy as np
    from gguf.quants import dequantize

    if tensor.kind.name == "F64":
        return torch.frombuffer(tensor.data, dtype=torch.float64).view(tensor.shape)
    rows = np.frombuffer(tensor.data, np.uint8).reshape(*tensor.shape[:-1], -1)
    try:
        return torch.from_numpy(dequantize(rows, tensor.kind).reshape(tensor.shape).copy())
    except NotImplementedError:  # all that the package says of a type it has no code for
        raise UserError(
            f"{shown(name)} has GGUF type {tensor.kind.name}, which the gguf package cannot dequantise"
        ) from None


def _config(path: Path, arch: str, meta: Mapping[str, Any], tensors: Mapping[str, Lazy]) -> dict:
    """The file's keys in config.json's terms."""

    def field(ours: str) -> Field:
        return replace(KEYS[ours], default=None if ours in _OPTIONAL else NEEDED)

    table = {f"{arch}.{theirs}": field(ours) for theirs, ours in TERMS.items()}
    config = dict(zip(TERMS.values(), read(path, table, meta).values()))
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path}: missing tensors: token_embd.weight of two dimensions")
    config |= {
        "model_type": MODEL_TYPES.get(arch, arch),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": arch == "llama" and "blk.0.attn_q.bias" in tensors,
    }
    head_dim = config_fields(config, path)["head_dim"]
    rotating = read_one(path, key := f"{arch}.rope.dimension_count", integer(2, head_dim, head_dim), meta.get(key))
    if "partial_rotary_factor" in family_of(config).keys:
        config["partial_rotary_factor"] = rotating / head_dim
    elif rotating < head_dim:
        raise UserError(f"{path}: {key} is {rotating}; accepted: {head_dim}, all of a head")
    if arch in _LARGEST:
        whole = config["num_hidden_layers"] == _LARGEST[arch]
        width = config["hidden_size"] // config["num_attention_heads"] if whole else head_dim
        config["query_pre_attn_scalar"] = width
    return {**config, "head_dim": head_dim}


def _rope_scaling(
    path: Path, arch: str, meta: Mapping[str, Any], tensors: Mapping[str, Lazy], config: dict
) -> dict | None:
    kind, original = read(path, {f"{arch}.{key}": field for key, field in SCALING.items()}, meta).values()
    if kind in ("linear", "yarn"):
        factor = read_one(path, key := f"{arch}.rope.scaling.factor", ROPE_TYPES[kind]["factor"], meta.get(key))
        return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    if kind == "longrope" or "rope_factors_long.weight" in tensors:
        raise UserError(f"{path}: longrope GGUF files are not supported; {INSTEAD}")
    if "rope_freqs.weight" not in tensors:
        return None
    # Llama 3.1's scaling is stored as its divisors. Recover the factor, and check that nothing else is in them.
    divisors, plain = tensors["rope_freqs.weight"].read(), rope_table(ModelConfig.from_hf(config), 2)
    factor = float(divisors.max()) if divisors.shape == plain.shape[1:2] else 0.0
    scaling = llama3_scaling(factor if factor >= 1 else 1.0)  # less, or NaN, is not Llama's
    scaled = rope_table(ModelConfig.from_hf({**config, "rope_scaling": scaling}), 2)
    angle = [torch.atan2(table[1, :, 1], table[1, :, 0]) for table in (plain, scaled)]
    if not factor >= 1 or not torch.allclose(angle[0] / angle[1], divisors, rtol=1e-3):
        raise UserError(f"{path}: rope_freqs.weight is not Llama 3.1's scaling; {INSTEAD}")
    return scaling
