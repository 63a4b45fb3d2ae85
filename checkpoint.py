"""Weights on disk: write and load model*.pth, plain state dicts with gpt-fast's names.

scripts/convert_hf_checkpoint.py makes them from other formats.
"""

import mmap
import os
import signal
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from errors import UserError, read_json
from linear import Linear, linear_from_tensors, quantize_linear, quantizer
from model import ModelConfig, Transformer
from tp import TensorParallel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHUNK = 1 << 20  # weights quantised at a time


def torch_load(path: Path) -> dict:
    """A .pth, .pt or .bin file, memory-mapped where its format allows. Only tensors and containers are accepted."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; scripts/prepare.sh makes checkpoints")
    stat = path.stat()
    return _load_version(path, (stat.st_ino, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=2)  # a layer may lie in two shards, which the old format, no zip, reads whole
def _load_version(path: Path, version: tuple[int, ...]) -> dict:
    try:
        state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        if isinstance(state, dict):
            return state
        detail = f"it holds a {type(state).__name__}"
    except Exception as error:  # the unpickler's and the zip reader's errors have no common base
        detail = " ".join(str(error).split())[:120] or type(error).__name__
    raise UserError(f"{path} is truncated or not a file of weights ({detail})")


def abridged(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


@contextmanager
def new_state_dict(path: Path, like: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Write a state dict larger than memory: yields its tensors, mapped from a temporary file, to be filled in place.

    like: tensors, perhaps on the meta device, of which only names, shapes and dtypes count. The result is an ordinary
    torch.save file, which takes its name once it is complete; on any error, Ctrl-C or SIGTERM nothing is left behind.
    Raises UserError when the disk is full or the directory not writable.
    """
    partial = path.with_name(path.name + ".tmp")
    main = threading.current_thread() is threading.main_thread()  # which alone receives signals
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number)) if main else None
    try:
        try:
            with FakeTensorMode():
                fakes = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in like.items()}
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(fakes, partial)
            if hasattr(os, "posix_fallocate"):  # claim the blocks now: a full disk is an error here, a SIGBUS later
                with partial.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
            with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
                tensors = torch.load(partial, mmap=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise UserError(f"cannot write {path}: {reason}") from None
        yield tensors
        partial.replace(path)
    finally:
        if partial.exists():  # on a read-only file system, removing what is not there is an error too
            partial.unlink()
        if main:
            signal.signal(signal.SIGTERM, previous)


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

    quantize: "int8", "int4", "int4:64", "fp8", ... to quantise a full-precision checkpoint on the way, each tensor on
    `device`: what quantize.py would have written. tp: read and load this rank's part only.
    Raises UserError for a missing or damaged file and for missing, unexpected or wrongly shaped tensors.
    """
    state = dict(torch_load(path))
    config = config or read_config(path.parent)
    with torch.device("meta"):
        whole, model = Transformer(config), Transformer(config, tp)
    tied = config.tied and not any(name.startswith("output.") for name in state)
    if tied and quantize and "tok_embeddings.weight" in state:
        state["output.weight"], tied = state["tok_embeddings.weight"], False

    def placed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of a module's tensors, where and as they are to be."""
        return {
            name: t.to(device, dtype if name in ("weight", "bias") and t.dtype in DTYPES.values() else None)
            for name, t in model.tp.shard(prefix, tensors, config).items()
        }

    for prefix, module in whole.named_modules():
        part = model.get_submodule(prefix)
        if prefix == "output" and tied:
            part.weight = model.tok_embeddings.weight
        elif isinstance(module, Linear):
            own = {n.rpartition(".")[2]: state.pop(n) for n in list(state) if n.rpartition(".")[0] == prefix}
            linear_from_tensors(module.in_features, module.out_features, own, prefix)  # raises what is wrong with them
            own = placed(prefix, quantized(quantize, own, prefix, device) if quantize else own)
            model.set_submodule(prefix, linear_from_tensors(part.in_features, part.out_features, own, prefix))
        else:
            for name, parameter in module.named_parameters(recurse=False):
                value = state.pop(f"{prefix}.{name}", None)
                if value is None or value.shape != parameter.shape:
                    found = "nothing" if value is None else list(value.shape)
                    raise UserError(f"{path}: {prefix}.{name} needs shape {list(parameter.shape)}; found {found}")
                setattr(part, name, torch.nn.Parameter(placed(prefix, {name: value})[name], requires_grad=False))
    if state:
        raise UserError(f"{path}: unexpected tensors: {abridged(sorted(state))}")
    model.pack(dtype)
    return model.eval()


def quantized(mode: str, tensors: dict[str, Tensor], name: str, device: torch.device | str) -> dict[str, Tensor]:
    """quantize_linear's result, made on `device` some rows at a time: fp32 copies of a large output would not fit."""
    weight = tensors["weight"]
    out = {key: torch.empty_like(t, device=device) for key, t in quantizer(mode)(weight.to("meta")).items()}
    step = max(1, CHUNK // weight.shape[1])
    for rows in (slice(start, start + step) for start in range(0, len(weight), step)):
        piece = quantize_linear(mode, {**tensors, "weight": weight[rows].to(device)}, name)
        for key, tensor in out.items():
            tensor[rows] = piece[key]
    return tensors | out
