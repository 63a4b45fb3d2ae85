"""Hugging Face's checkpoints: *.safetensors or pytorch_model*.bin, one file or shards with an index, and config.json.

Specification: https://huggingface.co/docs/safetensors, and what transformers' save_pretrained writes.
"""

from collections.abc import Callable
from pathlib import Path

from checkpoint import abridged
from errors import UserError
from formats.config import builtin
from formats.fields import Field, mapping, read, text
from formats.source import HF, Lazy, Source, named, torch_tensors
from process.files import read_json


def _names_files(value: object) -> frozenset[str]:
    """The files that a weight_map names, all of its own directory."""
    names = [text().parse(name) for name in mapping().parse(value).values()]
    if not names or not all(name.isprintable() and Path(name).name == name not in ("", "..") for name in names):
        raise ValueError
    return frozenset(names)


INDEX = {"weight_map": Field("an object, each value the name of a file in the same directory", _names_files)}


def open_safetensors(files: list[Path], model_name: str | None = None) -> Source:
    """model_name: a built-in name in place of config.json. Raises UserError for damaged or absent files."""
    return _open(_listed(files, "model.safetensors"), _safetensors, model_name)


def open_bin(files: list[Path], model_name: str | None = None) -> Source:
    """As open_safetensors."""
    return _open(_listed(files, "pytorch_model.bin"), torch_tensors, model_name)


def _open(files: list[Path], reader: Callable[[Path], dict[str, Lazy]], model_name: str | None) -> Source:
    path = files[0].with_name("config.json")
    if model_name and path.exists():
        raise UserError(f"{path} says what the model is; --model_name is for weights without it")
    config = builtin(model_name) if model_name else read_json(path)
    tensors = {name: tensor for file in files for name, tensor in reader(file).items()}
    if not any(name.startswith("model.") for name in tensors):  # saved from the bare decoder
        tensors = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in tensors.items()}
    return named(HF, config, tensors, interleaved=False)


def _listed(files: list[Path], name: str) -> list[Path]:
    """The file of that name or its shards in an index; files beside them (consolidated.safetensors) do not count."""
    whole, index = [file for file in files if file.name == name], files[0].with_name(f"{name}.index.json")
    if not index.exists():
        return whole or files
    shards = [index.with_name(shard) for shard in sorted(read(index, INDEX, read_json(index))["weight_map"])]
    absent = [shard.name for shard in shards if not shard.exists()]
    if absent and not whole:  # beside a whole file, the index is of an older save
        raise UserError(f"{index.parent} lacks {abridged(absent)}, which {index.name} names; download again")
    return whole if absent else shards


def _safetensors(path: Path) -> dict[str, Lazy]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path} is not a regular file")
    try:
        file = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({str(error)[:120]})") from None
    return {name: Lazy(shape, lambda name=name: file.get_tensor(name)) for name, shape in shapes.items()}
