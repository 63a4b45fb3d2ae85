"""Hugging Face's checkpoints: *.safetensors or pytorch_model*.bin, one file or shards with an index, and config.json.

Specification: https://huggingface.co/docs/safetensors, and what transformers' save_pretrained writes.
"""

from collections.abc import Callable
from pathlib import Path

from checkpoint import abridged
from errors import UserError
from formats.config import builtin, family_of, text_config
from formats.families import WRAPPERS
from formats.fields import Field, mapping, read, text
from formats.mixtures import name_experts
from formats.quantization_config import dequantisable
from formats.source import HF, Lazy, Source, named, torch_tensors
from process.files import read_json

VISION = ("visual", "vision_tower", "vision_model", "multi_modal_projector")  # what wrappers call their other parts


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
    if settings := config.get("quantization_config") or config.get("compression_config"):
        tensors = dequantisable(path, settings, tensors)
    family = family_of(text_config(config))
    if config.get("model_type") in WRAPPERS:
        tensors = _text_tensors(tensors)
    elif not any(name.startswith(("model.", family.layers or "model.")) for name in tensors):  # the bare decoder's
        tensors = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in tensors.items()}
    offset = float(family.fixed.get("unit_offset", False))
    return name_experts(named(HF, config, tensors, interleaved=family.interleaved, norm_offset=offset))


def _text_tensors(tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    """The tensors of a wrapper's text model under a text model's names; says which others it leaves out."""
    vision = [name for name in tensors if any(part in VISION for part in name.split("."))]
    if vision:
        kinds = sorted({part for name in vision for part in name.split(".") if part in VISION})
        print(f"left out: {len(vision)} tensors of {', '.join(kinds)}; the text model alone is converted")
    text = {name: tensor for name, tensor in tensors.items() if name not in vision}
    # model.language_model.X of transformers 5, language_model.model.X of older ones
    return {name.replace("language_model.", "", 1): tensor for name, tensor in text.items()}


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
