"""GGUF: *.gguf, one file of weights, hyperparameters and tokenizer. The PyPI package gguf parses and dequantises it.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from formats.config import llama3_scaling
from formats.gguf_tokenizer import gguf_tokenizer_files
from formats.source import GGUF, Lazy, Source, named, only
from model import ModelConfig, rope_table

# Architectures, called like model_types: whether q and k are interleaved already (llama.cpp's llama_rope_type).
ARCHITECTURES = {"llama": True, "smollm3": True, "qwen2": False, "qwen3": False, "phi3": False}
INSTEAD = "convert the Hugging Face checkpoint instead"


def open_gguf(files: list[Path], _: str | None) -> Source:
    """Raises UserError for a damaged file, and for an architecture, tokenizer or scaling that is not supported."""
    from gguf import GGUFReader  # the PyPI package, not this file

    path = only(files)
    try:
        reader = GGUFReader(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, OSError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is truncated or not a GGUF file ({error})") from None
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UserError(f"GGUF architecture {arch!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    tokenizer_files = gguf_tokenizer_files(meta)
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = Lazy(shape, lambda t=tensor, shape=shape: _dequantize(t).view(shape))
    meta = {key.removeprefix(f"{arch}."): value for key, value in meta.items()}
    try:
        config = _config(arch, meta, tensors)
    except KeyError as error:
        raise UserError(f"{path} lacks the key {arch}.{error.args[0]}") from None
    config["rope_scaling"] = _rope_scaling(path, meta, tensors, config)
    return named(GGUF, config, tensors, interleaved=ARCHITECTURES[arch], files=tokenizer_files)


def _dequantize(tensor: Any) -> Tensor:
    """The values of one of GGUFReader's tensors, flat or not."""
    from gguf.quants import dequantize

    try:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    except NotImplementedError:  # all that the package says of a type it has no code for
        kind = tensor.tensor_type.name
        raise UserError(f"{tensor.name} has GGUF type {kind}, which the gguf package cannot dequantise") from None


def _config(arch: str, meta: Mapping[str, Any], tensors: Mapping[str, Lazy]) -> dict:
    """config.json's terms for the file's keys, which come without the architecture before them."""
    heads, dim = meta["attention.head_count"], meta["embedding_length"]
    head_dim = meta.get("attention.key_length", dim // heads)
    return {
        "model_type": arch,
        "hidden_size": dim,
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": meta["feed_forward_length"],
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else 0,
        "max_position_embeddings": meta["context_length"],
        "rms_norm_eps": meta["attention.layer_norm_rms_epsilon"],
        "rope_theta": meta.get("rope.freq_base", 10000.0),
        "partial_rotary_factor": meta.get("rope.dimension_count", head_dim) / head_dim,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": arch == "llama" and "blk.0.attn_q.bias" in tensors,
        "sliding_window": meta.get("attention.sliding_window"),
        # The file does not say: every fourth layer of SmolLM3 goes without.
        "no_rope_layers": [int(i % 4 != 3) for i in range(meta["block_count"])] if arch == "smollm3" else None,
    }


def _rope_scaling(path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Lazy], config: dict) -> dict | None:
    kind, factor = meta.get("rope.scaling.type"), meta.get("rope.scaling.factor")
    if kind == "yarn":
        original = meta.get("rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if "rope_factors_long.weight" in tensors:
        raise UserError(f"{path}: longrope GGUF files are not supported; {INSTEAD}")
    if "rope_freqs.weight" not in tensors:
        return None
    # Llama 3.1's scaling is stored as its divisors. Recover the factor, and check that nothing else is in them.
    divisors = tensors["rope_freqs.weight"].read().flatten()
    scaling = llama3_scaling(float(divisors.max()))
    plain, scaled = (rope_table(ModelConfig.from_hf({**config, "rope_scaling": s}), 2) for s in (None, scaling))
    angle = [torch.atan2(table[1, :, 1], table[1, :, 0]) for table in (plain, scaled)]
    if not torch.allclose(angle[0] / angle[1], divisors, rtol=1e-3):
        raise UserError(f"{path}: rope_freqs.weight is not Llama 3.1's scaling; {INSTEAD}")
    return scaling
