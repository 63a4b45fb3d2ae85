"""Convert the weights in a checkpoint directory, whatever their format, to model.pth beside them.

Read are Hugging Face's safetensors and .bin, Meta's consolidated.*.pth, llama2.c's stories*.pt and GGUF. A source is a
mapping from tensor names to lazy tensors, so that converting holds about one layer in memory.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import gguf
import torch
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts run from any directory

from gguf_tokenizer import gguf_tokenizer_files

from checkpoint import DTYPES, abridged, model_shapes, new_state_dict, read_json, torch_load
from errors import UserError, run_cli
from model import BUILTIN, ModelConfig, llama3_scaling, rope_table


@dataclass(frozen=True)
class Lazy:
    """A tensor that can tell its shape without being read."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Source:
    """A checkpoint before conversion: its config in Hugging Face's terms, its tensors, and how they are named."""

    config: dict
    tensors: Mapping[str, Lazy]
    names: dict[str, tuple[str, ...]]  # our name -> the source's names, whose rows are stacked
    halves: dict[str, tuple[str, int]]  # our name -> a fused tensor of the source, and which half of its rows
    interleaved: bool  # RoPE pairs are (2i, 2i+1) already, as in gpt-fast; else (i, i + D/2)


# --- names ------------------------------------------------------------------------------------------------------------

# Ours: (Hugging Face's, Meta's and llama2.c's, GGUF's). Several names are stacked along the rows.
_LAYER = {
    "attention.wqkv": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("attention.wq", "attention.wk", "attention.wv"),
        ("attn_q", "attn_k", "attn_v"),
    ),
    "attention.wo": (("self_attn.o_proj",), ("attention.wo",), ("attn_output",)),
    "attention.q_norm": (("self_attn.q_norm",), (), ("attn_q_norm",)),
    "attention.k_norm": (("self_attn.k_norm",), (), ("attn_k_norm",)),
    "feed_forward.w1": (("mlp.gate_proj",), ("feed_forward.w1",), ("ffn_gate",)),
    "feed_forward.w3": (("mlp.up_proj",), ("feed_forward.w3",), ("ffn_up",)),
    "feed_forward.w2": (("mlp.down_proj",), ("feed_forward.w2",), ("ffn_down",)),
    "attention_norm": (("input_layernorm",), ("attention_norm",), ("attn_norm",)),
    "ffn_norm": (("post_attention_layernorm",), ("ffn_norm",), ("ffn_norm",)),
}
_FUSED = {"attention.wqkv": ("self_attn.qkv_proj", None, "attn_qkv")}
_FUSED_HALVES = {
    "feed_forward.w1": (("mlp.gate_up_proj", None, "ffn_up"), 0),
    "feed_forward.w3": (("mlp.gate_up_proj", None, "ffn_up"), 1),
}
_TOP = {
    "tok_embeddings": ("model.embed_tokens", "tok_embeddings", "token_embd"),
    "norm": ("model.norm", "norm", "output_norm"),
    "output": ("lm_head", "output", "output"),
}
_LAYER_PREFIX = ("model.layers", "layers", "blk")
# Tensors that say nothing a config does not: rotary tables of old exports.
_IGNORED = ("rotary_emb.inv_freq", "rope.freqs", "freqs_cos", "freqs_sin", "rope_freqs.weight")


def _name_maps(style: int, n_layer: int, fused: bool) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, int]]]:
    """Names of the tensors of one style (0 Hugging Face, 1 Meta, 2 GGUF), for weights and biases."""
    names = {f"{ours}.weight": (f"{theirs[style]}.weight",) for ours, theirs in _TOP.items()}
    halves = {}
    for layer, (ours, theirs), kind in itertools.product(range(n_layer), _LAYER.items(), ("weight", "bias")):
        target, prefix = f"layers.{layer}.{ours}.{kind}", f"{_LAYER_PREFIX[style]}.{layer}"
        if fused and ours in _FUSED:
            names[target] = (f"{prefix}.{_FUSED[ours][style]}.{kind}",)
        elif fused and ours in _FUSED_HALVES:
            alias, half = _FUSED_HALVES[ours]
            halves[target] = (f"{prefix}.{alias[style]}.{kind}", half)
        else:
            names[target] = tuple(f"{prefix}.{name}.{kind}" for name in theirs[style])
    return names, halves


# --- sources ----------------------------------------------------------------------------------------------------------


def open_source(directory: Path, model_name: str | None = None) -> Source:
    """Find out what a directory holds by its files, and open it. Raises UserError when there is nothing to convert.

    model_name: a built-in name that stands for the config.json which Hugging Face weights lack.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    if files := sorted(directory.glob("*.safetensors")):
        return _hugging_face(_listed(directory, files, "model.safetensors.index.json"), _safetensors, model_name)
    if files := sorted(directory.glob("pytorch_model*.bin")):
        return _hugging_face(_listed(directory, files, "pytorch_model.bin.index.json"), _torch_file, model_name)
    for folder in (directory, directory / "original"):
        if files := sorted(folder.glob("consolidated.*.pth")):
            return _meta(folder, files)
    if files := sorted(directory.glob("stories*.pt")):
        return _llama2c(_only(files))
    if files := sorted(directory.glob("*.gguf")):
        return _gguf(_only(files))
    raise UserError(
        f"{directory} holds no weights to convert; accepted: *.safetensors, pytorch_model*.bin, consolidated.*.pth, "
        "stories*.pt, *.gguf"
    )


def _only(files: list[Path]) -> Path:
    if len(files) > 1:
        raise UserError(f"{files[0].parent} holds several models: {', '.join(f.name for f in files)}; keep one")
    return files[0]


def _listed(directory: Path, files: list[Path], index_name: str) -> list[Path]:
    """The shards an index names (files beside them, such as Meta's consolidated.safetensors, do not count)."""
    if not (directory / index_name).exists():
        return _prefer_model(files)
    weight_map = read_json(directory / index_name).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{directory / index_name} has no weight_map")
    shards = [directory / name for name in sorted(set(weight_map.values()))]
    if absent := [shard.name for shard in shards if not shard.exists()]:
        raise UserError(f"{directory} lacks {', '.join(absent)}, which {index_name} names; download again")
    return shards


def _prefer_model(files: list[Path]) -> list[Path]:
    return [file for file in files if file.name in ("model.safetensors", "pytorch_model.bin")] or files


def _hugging_face(files: list[Path], reader: Callable[[Path], dict[str, Lazy]], model_name: str | None) -> Source:
    config = BUILTIN[model_name] if model_name else read_json(files[0].parent / "config.json")
    tensors: dict[str, Lazy] = {}
    for file in files:
        tensors.update(reader(file))
    if tensors and not any(name.startswith("model.") for name in tensors):  # saved from the bare decoder
        tensors = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in tensors.items()}
    fused = any(name.endswith("qkv_proj.weight") for name in tensors)
    return Source(config, tensors, *_name_maps(0, _layers(config), fused), interleaved=False)


def _layers(config: dict) -> int:
    return ModelConfig.from_hf(config).n_layer


def _safetensors(path: Path) -> dict[str, Lazy]:
    try:
        file = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from None
    return {name: Lazy(shape, lambda name=name: file.get_tensor(name)) for name, shape in shapes.items()}


def _torch_file(path: Path) -> dict[str, Lazy]:
    return {
        name: Lazy(tuple(t.shape), lambda name=name: torch_load(path)[name]) for name, t in torch_load(path).items()
    }


def _meta(folder: Path, files: list[Path]) -> Source:
    """Meta's original release: one file per tensor-parallel rank, joined along the dimension each layer was cut."""
    params = read_json(folder / "params.json")
    shards = [_torch_file(file) for file in files]
    if len({frozenset(shard) for shard in shards}) != 1:
        raise UserError(f"{folder}: the consolidated files do not hold the same tensors")
    if "norm.weight" not in shards[0]:
        raise UserError("missing tensors: norm.weight")
    dim = shards[0]["norm.weight"].shape[0]
    tensors = {name: _join(name, [shard[name] for shard in shards], dim) for name in shards[0]}
    config = _meta_config(params, {name: tensor.shape for name, tensor in tensors.items()})
    return Source(config, tensors, *_name_maps(1, config["num_hidden_layers"], False), interleaved=True)


def _join(name: str, parts: list[Lazy], dim: int) -> Lazy:
    if len(parts) == 1 or len(parts[0].shape) < 2:
        return parts[0]
    # Llama 2 cut the embedding along features, Llama 3 along the vocabulary: the latter keeps the model's width.
    whole_width = "tok_embeddings" in name and parts[0].shape[1] == dim
    axis = 0 if whole_width or any(key in name for key in ("wq.", "wk.", "wv.", "w1.", "w3.", "output.")) else 1
    shape = list(parts[0].shape)
    shape[axis] *= len(parts)
    return Lazy(tuple(shape), lambda: torch.cat([part.read() for part in parts], axis))


def _meta_config(params: dict, shapes: dict[str, tuple[int, ...]]) -> dict:
    """config.json's terms for Meta's params.json or llama2.c's model_args; tensors tell the sizes they leave out."""
    try:
        vocab_size, dim = shapes["tok_embeddings.weight"]
        config = {
            "model_type": "llama",
            "hidden_size": dim,
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": params["n_heads"],
            "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
            "intermediate_size": shapes["layers.0.feed_forward.w1.weight"][0],
            "vocab_size": vocab_size,
            "max_position_embeddings": params.get("max_seq_len") or params.get("max_position_embeddings", 4096),
            "rms_norm_eps": params.get("norm_eps", 1e-5),
            "rope_theta": params.get("rope_theta", 10000.0),
            "tie_word_embeddings": "output.weight" not in shapes,
        }
    except KeyError as error:
        raise UserError(f"the checkpoint's parameters or tensors lack {error}") from None
    if params.get("use_scaled_rope"):
        factor = float(params.get("rope_scaling_factor", 8.0))
        config["rope_scaling"] = llama3_scaling(factor)
        config["max_position_embeddings"] = 131072
    return config


def _llama2c(path: Path) -> Source:
    checkpoint = torch_load(path)
    if not isinstance(checkpoint.get("model"), dict) or not isinstance(checkpoint.get("model_args"), dict):
        raise UserError(f"{path} is not a llama2.c checkpoint: it lacks 'model' or 'model_args'")
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
    tied = torch.equal(
        weights.get("output.weight", torch.empty(0)), weights.get("tok_embeddings.weight", torch.empty(0))
    )
    if tied:  # llama2.c stores the shared matrix twice
        weights.pop("output.weight")
    tensors = {name: Lazy(tuple(t.shape), lambda t=t: t) for name, t in weights.items()}
    config = _meta_config(checkpoint["model_args"], {name: lazy.shape for name, lazy in tensors.items()})
    return Source(config, tensors, *_name_maps(1, config["num_hidden_layers"], False), interleaved=True)


# --- GGUF -------------------------------------------------------------------------------------------------------------

# GGUF architecture: (model_type, whether its q and k rows are interleaved already; see llama.cpp's llama_rope_type).
_GGUF = {
    "llama": ("llama", True),
    "smollm3": ("smollm3", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "phi3": ("phi3", False),
}


@lru_cache(maxsize=1)  # parsing a vocabulary takes seconds
def _gguf_reader(path: Path) -> tuple[gguf.GGUFReader, dict]:
    try:
        reader = gguf.GGUFReader(path)
        return reader, {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, OSError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is truncated or not a GGUF file ({error})") from None


def _gguf(path: Path) -> Source:
    reader, meta = _gguf_reader(path)
    arch = meta.get("general.architecture")
    if arch not in _GGUF:
        raise UserError(f"GGUF architecture {arch!r} is not supported; supported: {', '.join(sorted(_GGUF))}")
    model_type, interleaved = _GGUF[arch]

    def get(key: str, default: object = None) -> object:
        value = meta.get(f"{arch}.{key}", default)
        if value is None:
            raise UserError(f"{path} lacks the key {arch}.{key}")
        return value

    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = Lazy(shape, lambda t=tensor, shape=shape: _dequantize(t, shape))
    heads, dim = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", dim // heads)
    config = {
        "model_type": model_type,
        "hidden_size": dim,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length"),
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else 0,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "partial_rotary_factor": get("rope.dimension_count", head_dim) / head_dim,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if window := meta.get(f"{arch}.attention.sliding_window"):
        config["sliding_window"] = window
    if model_type == "llama" and "blk.0.attn_q.bias" in tensors:
        config["attention_bias"] = True
    if scaling := _gguf_rope_scaling(path, arch, meta, tensors, config):
        config["rope_scaling"] = scaling
    fused = "blk.0.attn_qkv.weight" in tensors
    return Source(config, tensors, *_name_maps(2, config["num_hidden_layers"], fused), interleaved)


def _dequantize(tensor: gguf.ReaderTensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).view(shape)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise UserError(f"{tensor.name} has GGUF type {kind}, which the gguf package cannot dequantise") from None


def _gguf_rope_scaling(path: Path, arch: str, meta: dict, tensors: dict[str, Lazy], config: dict) -> dict | None:
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    factor = meta.get(f"{arch}.rope.scaling.factor")
    original = meta.get(f"{arch}.rope.scaling.original_context_length")
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if "rope_factors_long.weight" in tensors:
        raise UserError(f"{path}: longrope GGUF files are not supported; convert the Hugging Face checkpoint instead")
    if "rope_freqs.weight" not in tensors:
        return None
    # Llama 3.1's scaling is stored as its divisors. Recover the factor, and check that nothing else is in them.
    divisors = tensors["rope_freqs.weight"].read().flatten()
    scaling = llama3_scaling(float(divisors.max()))
    plain, scaled = (rope_table(ModelConfig.from_hf({**config, "rope_scaling": s}), 2) for s in (None, scaling))
    angle = [torch.atan2(table[1, :, 1], table[1, :, 0]) for table in (plain, scaled)]
    if not torch.allclose(angle[0] / angle[1], divisors, rtol=1e-3):
        raise UserError(
            f"{path}: rope_freqs.weight is not Llama 3.1's scaling; convert the Hugging Face checkpoint instead"
        )
    return scaling


# --- conversion -------------------------------------------------------------------------------------------------------


def convert(directory: Path, dtype: torch.dtype = torch.bfloat16, model_name: str | None = None) -> Path:
    """Convert whatever `directory` holds to directory/model.pth, and write config.json and tokenizer files where the
    source keeps them inside (GGUF, Meta, llama2.c). Peak memory is about one layer, or a shard of an unmappable file.

    Raises UserError, and leaves no model.pth, for truncated files and missing, unexpected or wrongly shaped tensors.
    """
    source = open_source(directory, model_name)
    config = ModelConfig.from_hf(source.config)
    if config.tied and _untied(source):
        config = ModelConfig.from_hf({**source.config, "tie_word_embeddings": False})
    shapes = model_shapes(config)
    _check(source, config, shapes)
    side_files = _side_files(directory, source)  # before the long work, since a vocabulary may be refused
    with new_state_dict(directory / "model.pth", {name: (shape, dtype) for name, shape in shapes.items()}) as target:
        for name, tensor in tqdm(target.items(), desc="converting", unit="tensor", disable=None):
            value = _convert_tensor(source, config, name)
            if not value.isfinite().all():
                raise UserError(f"{' + '.join(_sources(source, name))} holds NaN or infinite weights")
            tensor.copy_(value)
    for name, text in side_files.items():
        if not (directory / name).exists():
            _atomic_text(directory / name, text)
    return directory / "model.pth"


def _untied(source: Source) -> bool:
    """Whether a source that calls its output tied stores another one (some fine-tunes do)."""
    output, embedding = (source.tensors.get(source.names[f"{name}.weight"][0]) for name in ("output", "tok_embeddings"))
    return output is not None and embedding is not None and not torch.equal(output.read(), embedding.read())


def _sources(source: Source, name: str) -> tuple[str, ...]:
    return (source.halves[name][0],) if name in source.halves else source.names.get(name, ())


def _check(source: Source, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    missing = [n for name in shapes for n in _sources(source, name) or (name,) if n not in source.tensors]
    if missing:
        raise UserError(f"missing tensors: {abridged(sorted(set(missing)))}")
    used = {n for name in shapes for n in _sources(source, name)}
    tied_copy = set(source.names["output.weight"]) if config.tied else set()
    unexpected = [n for n in source.tensors if n not in used | tied_copy and not n.endswith(_IGNORED)]
    if unexpected:
        raise UserError(f"unexpected tensors: {abridged(sorted(unexpected))}")
    for name, shape in shapes.items():
        parts = [source.tensors[n] for n in _sources(source, name)]
        rows = sum(part.shape[0] for part in parts) // (2 if name in source.halves else 1)
        found = (rows, *parts[0].shape[1:])
        if found != shape or any(part.shape[1:] != shape[1:] for part in parts):
            detail = ", ".join(f"{n} {list(source.tensors[n].shape)}" for n in _sources(source, name))
            raise UserError(f"wrongly shaped tensor: {detail}; {name} needs {list(shape)}")


def _convert_tensor(source: Source, config: ModelConfig, name: str) -> Tensor:
    value = torch.cat([source.tensors[n].read() for n in _sources(source, name)])
    if name in source.halves:
        value = value.chunk(2)[source.halves[name][1]]
    rotates = ".wqkv." in name or name.endswith(("q_norm.weight", "k_norm.weight"))
    if source.interleaved or not rotates:
        return value
    # Hugging Face rotates (i, i + rotary/2); gpt-fast rotates (2i, 2i+1): reorder the rows of each query and key head.
    heads = config.n_head + config.n_local_heads if ".wqkv." in name else 1
    D, rotary = config.head_dim, config.rotary_dim or config.head_dim
    order = torch.arange(D)
    order[:rotary] = torch.arange(rotary).view(2, rotary // 2).t().flatten()
    rotated = value[: heads * D].view(heads, D, *value.shape[1:])[:, order].flatten(0, 1)
    return torch.cat((rotated, value[heads * D :]))


def _side_files(directory: Path, source: Source) -> dict[str, str]:
    """What the source keeps beside or inside its weights, as the files of a Hugging Face directory: name -> text."""
    files = {"config.json": json.dumps(source.config, indent=2)}
    if ggufs := sorted(directory.glob("*.gguf")):
        files |= gguf_tokenizer_files(_gguf_reader(ggufs[0])[1])
    return files


def _atomic_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_dir", type=Path, default=Path("checkpoints/SmolLM2-135M-Instruct"))
    parser.add_argument("--model_name", choices=sorted(BUILTIN), help="for weights without a config.json")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the weights in model.pth")
    args = parser.parse_args()
    print(f"Saved {convert(args.checkpoint_dir, DTYPES[args.dtype], args.model_name)}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
