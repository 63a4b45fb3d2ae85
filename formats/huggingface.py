"""Hugging Face's checkpoints: *.safetensors or pytorch_model*.bin, one file or shards with an index, and config.json.

Specification: https://huggingface.co/docs/safetensors, and what transformers' save_pretrained writes.
"""

from collections.abc import Callable
from pathlib import Path

from errors import UserError, read_json
from formats.config import builtin
from formats.source import HF, Lazy, Source, named, torch_tensors


def open_safetensors(files: list[Path], model_name: str | None) -> Source:
    """model_name: a built-in name in place of config.json. Raises UserError for damaged or absent files."""
    return _open(_listed(files, "model.safetensors"), _safetensors, model_name)


def open_bin(files: list[Path], model_name: str | None) -> Source:
    """As open_safetensors."""
    return _open(_listed(files, "pytorch_model.bin"), torch_tensors, model_name)


def _open(files: list[Path], reader: Callable[[Path], dict[str, Lazy]], model_name: str | None) -> Source:
    config = builtin(model_name) if model_name else read_json(files[0].parent / "config.json")
    tensors = {name: tensor for file in files for name, tensor in reader(file).items()}
    if not any(name.startswith("model.") for name in tensors):  # saved from the bare decoder
        tensors = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in tensors.items()}
    return named(HF, config, tensors, interleaved=False)


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


def _safetensors(path: Path) -> dict[str, Lazy]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from None
    return {name: Lazy(shape, lambda name=name: file.get_tensor(name)) for name, shape in shapes.items()}
