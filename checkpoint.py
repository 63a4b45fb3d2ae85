"""Weights on disk: write and load model*.pth, plain state dicts with gpt-fast's names.

scripts/convert_hf_checkpoint.py makes them from other formats.
"""

import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from errors import UserError
from linear import Linear, linear_from_tensors, quantize_linear
from model import ModelConfig, Transformer
from tp import TensorParallel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; an object is needed")
    return value


@lru_cache(maxsize=2)  # a file in the old format cannot be mapped: then one shard is resident at a time
def torch_load(path: Path) -> dict:
    """A .pth, .pt or .bin file, memory-mapped where its format allows. Only tensors and containers are accepted."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # the unpickler's and the zip reader's errors have no common base
        if "mmap can only be used" not in str(error):
            raise UserError(_unreadable(path, error)) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(_unreadable(path, error)) from None


def _unreadable(path: Path, error: Exception) -> str:
    detail = " ".join(str(error).split())[:120] or type(error).__name__
    return f"{path} is truncated or not a file of weights ({detail})"


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of model.pth. A tied output is stored once, as the embedding."""
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if not (config.tied and name == "output.weight")}


def abridged(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextmanager
def new_state_dict(path: Path, spec: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> Iterator[dict[str, Tensor]]:
    """Write a state dict larger than memory: yields its tensors, mapped from a temporary file, to be filled in place.

    spec: name -> (shape, dtype). On success the file takes its name at once; on any error nothing is left behind.
    The result is an ordinary torch.save file. Raises UserError when the disk is full or the directory not writable.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with FakeTensorMode():
            fakes = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in spec.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(fakes, partial)
        with partial.open("r+b") as file:  # claim the blocks now: a full disk is an error here, a SIGBUS later
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            tensors = torch.load(partial, mmap=True, weights_only=True)
        yield tensors
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}") from None
    finally:
        partial.unlink(missing_ok=True)


# --- loading ----------------------------------------------------------------------------------------------------------


def read_config(directory: Path) -> ModelConfig:
    """The blueprint of the model in a checkpoint directory: its config.json, or gpt-fast's table by the exact name."""
    if (directory / "config.json").exists():
        return ModelConfig.from_hf(read_json(directory / "config.json"))
    return ModelConfig.from_name(directory.name)


def load_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    quantize: str | None = None,
    config: ModelConfig | None = None,
    tp: TensorParallel | None = None,
) -> Transformer:
    """Load a model*.pth of any kind (told from its tensors), ready to run on `device` with activations of `dtype`.

    quantize: "int8", "int4", "int4:64", "fp8", ... to quantise a full-precision checkpoint on the way.
    tp: read and load this rank's part only.
    Raises UserError for a missing or damaged file and for missing, unexpected or wrongly shaped tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; scripts/prepare.sh makes it")
    config = config or read_config(path.parent)
    with torch.device("meta"):
        whole, model = Transformer(config), Transformer(config, tp)
    state = dict(torch_load(path))
    tied = config.tied and not any(name.startswith("output.") for name in state)
    for prefix, module in whole.named_modules():
        own = {name: state.pop(f"{prefix}.{name}") for name in _own(state, prefix)}
        if isinstance(module, Linear) and not (tied and prefix == "output"):
            if quantize:
                own = quantize_linear(quantize, own, prefix)
            linear_from_tensors(module.in_features, module.out_features, own, prefix)  # raises what is wrong with them
            own = {
                k: v.to(device, dtype if v.dtype in DTYPES.values() and k in ("weight", "bias") else None)
                for k, v in model.tp.shard(prefix, own, config).items()
            }
            part = model.get_submodule(prefix)
            model.set_submodule(prefix, linear_from_tensors(part.in_features, part.out_features, own, prefix))
        else:
            for name, parameter in module.named_parameters(recurse=False):
                if prefix == "output" and tied:
                    continue
                value = own.pop(name, None)
                if value is None or value.shape != parameter.shape:
                    found = "nothing" if value is None else list(value.shape)
                    raise UserError(f"{path}: {prefix}.{name} needs shape {list(parameter.shape)}; found {found}")
                value = model.tp.shard(prefix, {name: value}, config)[name].to(device, dtype)
                setattr(model.get_submodule(prefix), name, torch.nn.Parameter(value, requires_grad=False))
    if state:
        raise UserError(f"{path}: unexpected tensors: {abridged(sorted(state))}")
    if tied:
        model.output.weight = model.tok_embeddings.weight
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack(dtype)
    return model.eval()


def _own(state: dict[str, Tensor], prefix: str) -> list[str]:
    """Names of the tensors that belong to the module `prefix` itself."""
    start = f"{prefix}."
    return [name[len(start) :] for name in state if name.startswith(start) and "." not in name[len(start) :]]
