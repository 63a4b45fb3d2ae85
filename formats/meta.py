"""Meta's original releases of Llama: consolidated.NN.pth, a file for each rank of tensor parallelism, and params.json.

Specification: the loading code of https://github.com/meta-llama/llama and https://github.com/meta-llama/llama3.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from errors import UserError, shown
from formats.config import KEYS, ROPE_TYPES, llama3_scaling
from formats.fields import Field, flag, read
from formats.source import META, Lazy, Source, dense, named, torch_tensors
from process.files import read_json


def _absent(field: Field) -> Field:
    return replace(field, default=None)


PARAMS: dict[str, Field] = {
    "dim": _absent(KEYS["hidden_size"]),
    "n_layers": KEYS["num_hidden_layers"],
    "n_heads": KEYS["num_attention_heads"],
    "n_kv_heads": _absent(KEYS["num_key_value_heads"]),
    "max_seq_len": _absent(KEYS["max_position_embeddings"]),
    "max_position_embeddings": replace(KEYS["max_position_embeddings"], default=4096),
    "norm_eps": replace(KEYS["rms_norm_eps"], default=1e-5),
    "rope_theta": replace(KEYS["rope_theta"], default=10000.0),
    "use_scaled_rope": flag(default=False),
    "rope_scaling_factor": replace(ROPE_TYPES["llama3"]["factor"], default=8.0),
}


def open_consolidated(files: list[Path]) -> Source:
    """Raises UserError for damaged files, and for ranks that do not belong together."""
    path = files[0].with_name("params.json")
    params, shards = read_json(path), [torch_tensors(file) for file in files]
    if len({frozenset(shard) for shard in shards}) != 1:
        raise UserError(f"{path.parent}: the consolidated files do not hold the same tensors")
    dim = _shape("norm.weight", shards[0], 1)[0]
    tensors = {name: _join(name, [shard[name] for shard in shards], dim) for name in shards[0]}
    return named(META, meta_config(path, params, tensors), tensors, where=path, interleaved=True)


def _join(name: str, parts: list[Lazy], dim: int) -> Lazy:
    """The ranks' parts of a tensor, joined along the axis that the kind of layer was cut along."""
    shape = list(parts[0].shape)
    if any(list(part.shape) != shape for part in parts):
        raise UserError(f"the consolidated files hold {shown(name)} of several shapes")
    if len(parts) == 1 or len(shape) < 2:
        return parts[0]
    # Llama 2 cut the embedding along features, Llama 3 along the vocabulary: the latter keeps the model's width.
    whole_width = "tok_embeddings" in name and shape[1] == dim
    axis = 0 if whole_width or any(key in name for key in ("wq.", "wk.", "wv.", "w1.", "w3.", "output.")) else 1
    shape[axis] *= len(parts)
    return Lazy(tuple(shape), lambda: torch.cat([dense(name, part.read()) for part in parts], axis))


def meta_config(where: Path, params: dict, tensors: Mapping[str, Lazy]) -> dict:
    """config.json's terms for Meta's params.json or llama2.c's model_args; tensors tell the sizes they leave out."""
    values = read(where, PARAMS, params)
    vocab_size, dim = _shape("tok_embeddings.weight", tensors, 2)
    if values["dim"] not in (None, dim):
        raise UserError(f"{where}: dim is {values['dim']}, but tok_embeddings.weight has rows of {dim}")
    config = {
        "model_type": "llama",
        "hidden_size": dim,
        "num_hidden_layers": values["n_layers"],
        "num_attention_heads": values["n_heads"],
        "num_key_value_heads": values["n_kv_heads"] or values["n_heads"],
        "intermediate_size": _shape("layers.0.feed_forward.w1.weight", tensors, 2)[0],
        "vocab_size": vocab_size,
        "max_position_embeddings": values["max_seq_len"] or values["max_position_embeddings"],
        "rms_norm_eps": values["norm_eps"],
        "rope_theta": values["rope_theta"],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if values["use_scaled_rope"]:
        config["rope_scaling"] = llama3_scaling(values["rope_scaling_factor"])
        config["max_position_embeddings"] = 131072
    return config


def _shape(name: str, tensors: Mapping[str, Lazy], dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there. Raises UserError."""
    if name not in tensors or len(tensors[name].shape) != dimensions:
        found = f"; {name} has shape {list(tensors[name].shape)}" if name in tensors else ""
        raise UserError(f"missing tensors: {name} of {dimensions} dimensions{found}")
    return tensors[name].shape
