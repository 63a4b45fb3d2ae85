"""Meta's original releases of Llama: consolidated.NN.pth, a file for each rank of tensor parallelism, and params.json.

Specification: the loading code of https://github.com/meta-llama/llama and https://github.com/meta-llama/llama3.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from errors import UserError, read_json
from formats.config import llama3_scaling
from formats.source import META, Lazy, Source, named, torch_tensors


def open_consolidated(files: list[Path], _: str | None) -> Source:
    """Raises UserError for damaged files, and for ranks that do not belong together."""
    folder = files[0].parent
    params, shards = read_json(folder / "params.json"), [torch_tensors(file) for file in files]
    if len({frozenset(shard) for shard in shards}) != 1:
        raise UserError(f"{folder}: the consolidated files do not hold the same tensors")
    if "norm.weight" not in shards[0]:
        raise UserError("missing tensors: norm.weight")
    dim = shards[0]["norm.weight"].shape[0]
    tensors = {name: _join(name, [shard[name] for shard in shards], dim) for name in shards[0]}
    return named(META, meta_config(params, tensors), tensors, interleaved=True)


def _join(name: str, parts: list[Lazy], dim: int) -> Lazy:
    """The ranks' parts of a tensor, joined along the axis that the kind of layer was cut along."""
    shape = list(parts[0].shape)
    if len(parts) == 1 or len(shape) < 2:
        return parts[0]
    # Llama 2 cut the embedding along features, Llama 3 along the vocabulary: the latter keeps the model's width.
    whole_width = "tok_embeddings" in name and shape[1] == dim
    axis = 0 if whole_width or any(key in name for key in ("wq.", "wk.", "wv.", "w1.", "w3.", "output.")) else 1
    shape[axis] *= len(parts)
    return Lazy(tuple(shape), lambda: torch.cat([part.read() for part in parts], axis))


def meta_config(params: dict, tensors: Mapping[str, Lazy]) -> dict:
    """config.json's terms for Meta's params.json or llama2.c's model_args; tensors tell the sizes they leave out."""
    try:
        vocab_size, dim = tensors["tok_embeddings.weight"].shape
        config = {
            "model_type": "llama",
            "hidden_size": dim,
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": params["n_heads"],
            "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
            "intermediate_size": tensors["layers.0.feed_forward.w1.weight"].shape[0],
            "vocab_size": vocab_size,
            "max_position_embeddings": params.get("max_seq_len") or params.get("max_position_embeddings", 4096),
            "rms_norm_eps": params.get("norm_eps", 1e-5),
            "rope_theta": params.get("rope_theta", 10000.0),
            "tie_word_embeddings": "output.weight" not in tensors,
        }
    except KeyError as error:
        raise UserError(f"the checkpoint's parameters or tensors lack {error}") from None
    if params.get("use_scaled_rope"):
        config["rope_scaling"] = llama3_scaling(float(params.get("rope_scaling_factor", 8.0)))
        config["max_position_embeddings"] = 131072
    return config
