"""Convert the weights in a checkpoint directory, whatever their format, to model.pth beside them.

Read are Hugging Face's safetensors and .bin, Meta's consolidated.*.pth, llama2.c's stories*.pt and GGUF. A source is a
mapping from tensor names to lazy tensors, so that converting holds about one layer in memory.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import gguf
import torch
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts run from any directory

from gguf_tokenizer import gguf_tokenizer_files

from checkpoint import DTYPES, abridged, new_state_dict, torch_load
from errors import UserError, read_json, run_cli
from formats.config import BUILTIN, builtin, llama3_scaling
from model import ModelConfig, Transformer, rope_table


class Lazy(NamedTuple):
    """A tensor that can tell its shape without being read."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Source:
    """A checkpoint before conversion: its config in Hugging Face's terms, its tensors, and how they are named."""

    config: dict
    tensors: Mapping[str, Lazy]
    names: dict[str, list[str]]  # our name -> the source's names, whose rows are stacked
    interleaved: bool  # RoPE pairs are (2i, 2i+1) already, as in gpt-fast; else (i, i + D/2)
    files: Mapping[str, str] = field(default_factory=dict)  # what it holds beside weights, as Hugging Face's files


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
    "feed_forward.w1": ("mlp.gate_proj", "feed_forward.w1", "ffn_gate"),
    "feed_forward.w3": ("mlp.up_proj", "feed_forward.w3", "ffn_up"),
    "feed_forward.w2": ("mlp.down_proj", "feed_forward.w2", "ffn_down"),
    "attention_norm": ("input_layernorm", "attention_norm", "attn_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm", "ffn_norm"),
}
_FUSED = (("self_attn.qkv_proj", "mlp.gate_up_proj"), None, ("attn_qkv", "ffn_up"))  # Phi-3's: wqkv, and w1 above w3
# Tensors that say nothing a config does not: rotary tables of old exports.
_IGNORED = ("rotary_emb.inv_freq", "rope.freqs", "freqs_cos", "freqs_sin", "rope_freqs.weight")


def _source(style: int, config: dict, tensors: dict[str, Lazy], interleaved: bool, **more) -> Source:
    """Name the weights and biases of a source in one of the styles."""
    names = {f"{ours}.weight": [f"{theirs[style]}.weight"] for ours, theirs in _TOP.items()}
    qkv, gate_up = _FUSED[style] or ("", "")
    fused = qkv and any(f".{qkv}." in name for name in tensors)
    for layer, kind in itertools.product(range(ModelConfig.from_hf(config).n_layer), ("weight", "bias")):
        our_layer, their_layer = f"layers.{layer}", f"{_LAYERS[style]}.{layer}"
        for ours, theirs in _LAYER.items():
            names[f"{our_layer}.{ours}.{kind}"] = [f"{their_layer}.{name}.{kind}" for name in theirs[style].split()]
        if fused:
            names[f"{our_layer}.attention.wqkv.{kind}"] = [f"{their_layer}.{qkv}.{kind}"]
            whole = tensors.pop(name := f"{their_layer}.{gate_up}.{kind}", None)
            for half, ours in enumerate(("w1", "w3")):
                names[f"{our_layer}.feed_forward.{ours}.{kind}"] = [f"{name}[{half}]"]
                if whole:
                    shape = (whole.shape[0] // 2, *whole.shape[1:])
                    tensors[f"{name}[{half}]"] = Lazy(shape, lambda t=whole, half=half: t.read().chunk(2)[half])
    return Source(config, tensors, names, interleaved, **more)


# --- sources ----------------------------------------------------------------------------------------------------------


def open_source(directory: Path, model_name: str | None = None) -> Source:
    """Find out what a directory holds by its files, and open it. Raises UserError when there is nothing to convert.

    model_name: a built-in name that stands for the config.json which Hugging Face weights lack.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    if files := sorted(directory.glob("*.safetensors")):
        return _hugging_face(_listed(files, "model.safetensors"), _safetensors, model_name)
    if files := sorted(directory.glob("pytorch_model*.bin")):
        return _hugging_face(_listed(files, "pytorch_model.bin"), _torch_file, model_name)
    for folder in (directory, directory / "original"):
        if files := sorted(folder.glob("consolidated.*.pth")):
            return _meta(folder, files)
    for pattern, reader in (("stories*.pt", _llama2c), ("*.gguf", _gguf)):
        if files := sorted(directory.glob(pattern)):
            if len(files) > 1:
                raise UserError(f"{directory} holds several models: {', '.join(f.name for f in files)}; keep one")
            return reader(files[0])
    raise UserError(
        f"{directory} holds no weights to convert; accepted: *.safetensors, pytorch_model*.bin, consolidated.*.pth, "
        "stories*.pt, *.gguf"
    )


def _listed(files: list[Path], name: str) -> list[Path]:
    """The file of that name or its shards in an index; files beside them (consolidated.safetensors) do not count."""
    directory, index = files[0].parent, files[0].with_name(f"{name}.index.json")
    if not index.exists():
        return [file for file in files if file.name == name] or files
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map")
    shards = [directory / shard for shard in sorted(set(weight_map.values()))]
    if absent := [shard.name for shard in shards if not shard.exists()]:
        raise UserError(f"{directory} lacks {', '.join(absent)}, which {index.name} names; download again")
    return shards


def _hugging_face(files: list[Path], reader: Callable[[Path], dict[str, Lazy]], model_name: str | None) -> Source:
    config = builtin(model_name) if model_name else read_json(files[0].parent / "config.json")
    tensors = {name: tensor for file in files for name, tensor in reader(file).items()}
    if not any(name.startswith("model.") for name in tensors):  # saved from the bare decoder
        tensors = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in tensors.items()}
    return _source(HF, config, tensors, interleaved=False)


def _safetensors(path: Path) -> dict[str, Lazy]:
    try:
        file = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from None
    return {name: Lazy(shape, lambda name=name: file.get_tensor(name)) for name, shape in shapes.items()}


def _torch_file(path: Path) -> dict[str, Lazy]:
    tensors = torch_load(path)  # not kept: of files that cannot be mapped, torch_load keeps but the latest two
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if isinstance(t, Tensor)}
    return {name: Lazy(shape, lambda name=name: torch_load(path)[name]) for name, shape in shapes.items()}


def _meta(folder: Path, files: list[Path]) -> Source:
    """Meta's original release: one file per tensor-parallel rank, joined along the dimension each layer was cut."""
    params, shards = read_json(folder / "params.json"), [_torch_file(file) for file in files]
    if len({frozenset(shard) for shard in shards}) != 1:
        raise UserError(f"{folder}: the consolidated files do not hold the same tensors")
    if "norm.weight" not in shards[0]:
        raise UserError("missing tensors: norm.weight")
    dim = shards[0]["norm.weight"].shape[0]
    tensors = {name: _join(name, [shard[name] for shard in shards], dim) for name in shards[0]}
    return _source(META, _meta_config(params, tensors), tensors, interleaved=True)


def _join(name: str, parts: list[Lazy], dim: int) -> Lazy:
    shape = list(parts[0].shape)
    if len(parts) == 1 or len(shape) < 2:
        return parts[0]
    # Llama 2 cut the embedding along features, Llama 3 along the vocabulary: the latter keeps the model's width.
    whole_width = "tok_embeddings" in name and shape[1] == dim
    axis = 0 if whole_width or any(key in name for key in ("wq.", "wk.", "wv.", "w1.", "w3.", "output.")) else 1
    shape[axis] *= len(parts)
    return Lazy(tuple(shape), lambda: torch.cat([part.read() for part in parts], axis))


def _meta_config(params: dict, tensors: dict[str, Lazy]) -> dict:
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


def _llama2c(path: Path) -> Source:
    checkpoint = torch_load(path)
    if not isinstance(checkpoint.get("model"), dict) or not isinstance(checkpoint.get("model_args"), dict):
        raise UserError(f"{path} is not a llama2.c checkpoint: it lacks 'model' or 'model_args'")
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
    shared = [weights.get(f"{name}.weight", torch.empty(0)) for name in ("output", "tok_embeddings")]
    if torch.equal(*shared):  # llama2.c stores a tied matrix twice
        weights.pop("output.weight", None)
    tensors = {name: Lazy(tuple(t.shape), lambda t=t: t) for name, t in weights.items()}
    return _source(META, _meta_config(checkpoint["model_args"], tensors), tensors, interleaved=True)


# --- GGUF -------------------------------------------------------------------------------------------------------------

# GGUF architectures, called like model_types: whether q and k are interleaved already (llama.cpp's llama_rope_type).
_GGUF = {"llama": True, "smollm3": True, "qwen2": False, "qwen3": False, "phi3": False}
INSTEAD = "convert the Hugging Face checkpoint instead"


def _gguf(path: Path) -> Source:
    try:
        reader = gguf.GGUFReader(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, OSError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is truncated or not a GGUF file ({error})") from None
    arch = meta.get("general.architecture")
    if arch not in _GGUF:
        raise UserError(f"GGUF architecture {arch!r} is not supported; supported: {', '.join(sorted(_GGUF))}")
    files = gguf_tokenizer_files(meta)
    meta = {key.removeprefix(f"{arch}."): value for key, value in meta.items()}
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = Lazy(shape, lambda t=tensor, shape=shape: _dequantize(t, shape))
    try:
        heads, dim = meta["attention.head_count"], meta["embedding_length"]
        head_dim = meta.get("attention.key_length", dim // heads)
        config = {
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
    except KeyError as error:
        raise UserError(f"{path} lacks the key {arch}.{error.args[0]}") from None
    config["rope_scaling"] = _gguf_rope_scaling(path, meta, tensors, config)
    return _source(GGUF, config, tensors, _GGUF[arch], files=files)


def _dequantize(tensor: gguf.ReaderTensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).view(shape)
    except NotImplementedError:  # all that the package says of a type it has no code for
        kind = tensor.tensor_type.name
        raise UserError(f"{tensor.name} has GGUF type {kind}, which the gguf package cannot dequantise") from None


def _gguf_rope_scaling(path: Path, meta: dict, tensors: dict[str, Lazy], config: dict) -> dict | None:
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


# --- conversion -------------------------------------------------------------------------------------------------------


def convert(directory: Path, dtype: torch.dtype = torch.bfloat16, model_name: str | None = None) -> Path:
    """Convert whatever `directory` holds to directory/model.pth, and write config.json and tokenizer files where the
    source keeps them inside (GGUF, Meta, llama2.c). Peak memory is about a layer, or two shards that cannot be mapped.

    Raises UserError, and leaves no model.pth, for truncated files and missing, unexpected or wrongly shaped tensors.
    """
    source = open_source(directory, model_name)
    config = ModelConfig.from_hf(source.config)
    if config.tied and _untied(source):
        config = ModelConfig.from_hf({**source.config, "tie_word_embeddings": False})
    with torch.device("meta"):
        blank = {name: tensor.to(dtype) for name, tensor in Transformer(config).state_dict().items()}
    if config.tied:  # stored once, as the embedding
        del blank["output.weight"]
    _check(source, config, blank)
    with new_state_dict(directory / "model.pth", blank) as target:
        for name, tensor in tqdm(target.items(), desc="converting", unit="tensor", disable=None):
            value = torch.cat([source.tensors[n].read() for n in source.names[name]])
            if not value.isfinite().all():
                raise UserError(f"{' + '.join(source.names[name])} holds NaN or infinite weights")
            tensor.copy_(value if source.interleaved else _interleave(value, config, name))
        for name, text in {"config.json": json.dumps(source.config, indent=2), **source.files}.items():
            if not (path := directory / name).exists():  # before model.pth, whose presence says that all is there
                partial = path.with_name(f"{name}.tmp")
                try:
                    partial.write_text(text, encoding="utf-8")
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
    return directory / "model.pth"


def _untied(source: Source) -> bool:
    """Whether a source that calls its output tied stores another one (some fine-tunes do)."""
    output, embedding = (source.tensors.get(*source.names[f"{name}.weight"]) for name in ("output", "tok_embeddings"))
    return output is not None and embedding is not None and not torch.equal(output.read(), embedding.read())


def _check(source: Source, config: ModelConfig, blank: dict[str, Tensor]) -> None:
    needed = {name: source.names.get(name) or [name] for name in blank}
    used = set(itertools.chain.from_iterable(needed.values()))
    if missing := used - source.tensors.keys():
        raise UserError(f"missing tensors: {abridged(sorted(missing))}")
    if config.tied:
        used.update(source.names["output.weight"])
    if unexpected := [n for n in source.tensors if n not in used and not n.endswith(_IGNORED)]:
        raise UserError(f"unexpected tensors: {abridged(sorted(unexpected))}")
    for name, tensor in blank.items():
        shape, parts = tuple(tensor.shape), [source.tensors[n].shape for n in needed[name]]
        if (sum(part[0] for part in parts), *shape[1:]) != shape or any(part[1:] != shape[1:] for part in parts):
            detail = ", ".join(f"{n} {list(part)}" for n, part in zip(needed[name], parts))
            raise UserError(f"wrongly shaped tensor: {detail}; {name} needs {list(shape)}")


def _interleave(value: Tensor, config: ModelConfig, name: str) -> Tensor:
    """Hugging Face rotates (i, i + rotary/2), gpt-fast (2i, 2i+1): reorder the rows of each query and key head."""
    if ".wqkv." not in name and not name.endswith(("q_norm.weight", "k_norm.weight")):
        return value
    heads = config.n_head + config.n_local_heads if ".wqkv." in name else 1
    D, rotary = config.head_dim, config.rotary_dim or config.head_dim
    order = torch.arange(D)
    order[:rotary] = torch.arange(rotary).view(2, rotary // 2).t().flatten()
    rotated = value[: heads * D].view(heads, D, *value.shape[1:])[:, order].flatten(0, 1)
    return torch.cat((rotated, value[heads * D :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_dir", type=Path, default=Path("checkpoints/SmolLM2-135M-Instruct"))
    parser.add_argument("--model_name", choices=sorted(BUILTIN), help="for weights without a config.json")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the weights in model.pth")
    args = parser.parse_args()
    print(f"Saved {convert(args.checkpoint_dir, DTYPES[args.dtype], args.model_name)}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
