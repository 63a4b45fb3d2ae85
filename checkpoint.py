"""Weights on disk: write and load model*.pth, plain state dicts with gpt-fast's names.

scripts/convert_hf_checkpoint.py makes them from other formats.
"""

import mmap
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import RMSNorm

import ops
from errors import UserError, reason, shown
from linear import Linear, kind_of, quantize_linear
from model import Embedding, Gains, ModelConfig, Transformer
from process.files import read_json, replacing
from tp import TensorParallel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def torch_load(path: Path) -> dict:
    """A .pth, .pt or .bin file, memory-mapped where its format allows. Only tensors and containers are accepted."""
    if not path.is_file():
        fault = f"is a directory; give {path}/model.pth" if path.is_dir() else "is no file"
        raise UserError(f"{path} {fault if path.exists() else 'does not exist; scripts/prepare.sh makes checkpoints'}")
    if path.suffix in (".gguf", ".safetensors"):
        command = f"scripts/convert_hf_checkpoint.py --checkpoint_dir {path.parent}"
        raise UserError(f"{path} is not a model.pth; {command} makes one of it")
    return _load_version(path, _version(path))


def _version(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=2)  # a layer may lie in two shards, which the old format, no zip, reads whole
def _load_version(path: Path, version: tuple[int, ...]) -> dict:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what will be refused, in a line of ours
            state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        if isinstance(state, dict):
            return {_from_disk(name) if type(name) is str else name: value for name, value in state.items()}
        detail = f"it holds a {type(state).__name__}"
    except PermissionError as error:
        raise UserError(reason(error)) from None
    except Exception as error:  # the unpickler's and the zip reader's errors have no common base
        detail = reason(error)[:120]
    raise UserError(f"{path} is truncated or not a file of weights ({detail})")


def _on_disk(name: str) -> str:
    """gpt-fast's names of experts' tensors: cond_ffn.w1 and cond_ffn.scales1 are our w1.weight and w1.scales."""
    short = lambda found: f"{found[2].replace('weight', 'w')}{found[1]}"  # noqa: E731
    return re.sub(r"(?<=\.cond_ffn\.)w([123])\.(weight|scales|zeros|bias)$", short, name)


def _from_disk(name: str) -> str:
    full = lambda found: f"w{found[2]}.{'weight' if found[1] == 'w' else found[1]}"  # noqa: E731
    return re.sub(r"(?<=\.cond_ffn\.)(w|scales|zeros|bias)([123])$", full, name)


def abridged(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


@contextmanager
def new_state_dict(path: Path, like: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Write a state dict larger than memory: yields its tensors, mapped from a temporary file, to be filled in place.

    like: tensors, perhaps on the meta device, of which only names, shapes and dtypes count. The result is an ordinary
    torch.save file, which takes its name once it is complete; on any error nothing is left behind.
    Raises UserError when the disk is full or the directory not writable.
    """
    with replacing(path) as partial:
        try:
            with FakeTensorMode():
                fakes = {_on_disk(name): torch.empty(t.shape, dtype=t.dtype) for name, t in like.items()}
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(fakes, partial)
            if hasattr(os, "posix_fallocate"):  # claim the blocks now: a full disk is an error here, a SIGBUS later
                with partial.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
            with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
                tensors = {_from_disk(k): t for k, t in torch.load(partial, mmap=True, weights_only=True).items()}
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        except RuntimeError:  # PyTorch does not say why
            raise UserError(f"cannot write {path}: the disk is full, or files may not be that large") from None
        yield tensors


def unchanged(*files: Path) -> Callable[[], None]:
    """What raises a UserError once one of these files, which are mapped, is no longer what it is now. Called between
    two tensors, as it can do nothing for one that is being read: a page that is gone by then is a SIGBUS."""
    before = [_version(file) for file in files]

    def check() -> None:
        for file, version in zip(files, before):
            if not file.exists() or _version(file) != version:
                raise UserError(f"{file} was changed while it was read; run the same command again")

    return check


# --- loading ----------------------------------------------------------------------------------------------------------


def read_config(directory: Path) -> ModelConfig:
    """The blueprint of the model in a checkpoint directory: its config.json, or gpt-fast's table by the exact name."""
    if (directory / "config.json").exists():
        return ModelConfig.from_hf(read_json(directory / "config.json"))
    return ModelConfig.from_name(directory.name)


def _dense(path: Path) -> dict[str, Tensor]:
    """The tensors of a model*.pth by name. Raises UserError where there is anything else, such as sparse ones."""
    state = torch_load(path)
    for name, t in state.items():
        found = type(t).__name__
        if type(name) is str and type(t) in (Tensor, torch.nn.Parameter):
            if t.layout is torch.strided and t.is_cpu and not t.is_quantized and not t.is_neg():
                continue
            found = f"a tensor of {t.dtype}, {t.layout}, on {t.device}"
        raise UserError(f"{path}: {shown(name)} is {found}; plain tensors under names are accepted")
    return dict(state)


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
    Raises UserError for a damaged file and for tensors that are not as they must be: what runs on them trusts that.
    """
    state, config = _dense(path), config or read_config(path.parent)
    if (last := f"layers.{config.n_layer - 1}.attention.wo.weight") not in state:
        raise UserError(f"{path} lacks {last}; its config has {config.n_layer} layers")
    with torch.device("meta"):
        model = Transformer(config, tp)
    tied = config.tied and not any(name.startswith("output.") for name in state)
    if tied and quantize is not None and "tok_embeddings.weight" in state:
        state["output.weight"], tied = state["tok_embeddings.weight"], False
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        prefix, _, key = name.rpartition(".")
        modules.setdefault(prefix, {})[key] = tensor

    def placed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = {key for key, t in tensors.items() if key in ("weight", "bias") and t.dtype in DTYPES.values()}
        for key, t in tensors.items():  # what is small; of weights, the first logits tell
            if (key != "weight" or t.ndim == 1) and not (t.is_meta or t.sum(dtype=torch.float32).isfinite()):
                raise UserError(f"{path}: {prefix}.{key} holds NaN or infinite values")
        wanted = torch.float32 if config.unit_offset and isinstance(module, RMSNorm) else dtype
        return {key: ops.upload(t, device, wanted if key in plain else None) for key, t in tensors.items()}

    for prefix, module in model.named_modules():
        own = modules.pop(prefix, {})
        if prefix == "output" and tied:
            module.weight = model.tok_embeddings.weight
        elif isinstance(module, Linear):
            kind_of(module.shape, own, prefix)  # raises what is wrong with them
            own = quantize_linear(quantize, own, prefix, device) if quantize is not None else own
            module.assign(placed(module.shard(own, prefix)), prefix)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                value, shape = own.pop(name, None), list(getattr(module, "shape", parameter.shape))
                if value is None or list(value.shape) != shape or value.dtype not in DTYPES.values():
                    found = "nothing" if value is None else f"{list(value.shape)} of {value.dtype}"
                    raise UserError(
                        f"{path}: {prefix}.{name} needs shape {shape} in {', '.join(DTYPES)}; found {found}"
                    )
                value = module.shard(value) if isinstance(module, (Embedding, Gains)) else value
                setattr(module, name, torch.nn.Parameter(placed({name: value})[name], requires_grad=False))
            modules |= {prefix: own} if own else {}
    if unexpected := sorted(f"{prefix}.{key}".lstrip(".") for prefix, own in modules.items() for key in own):
        raise UserError(f"{path}: unexpected tensors: {abridged(unexpected)}")
    if not model.norm.weight.is_meta:
        model.pack(dtype)
    return model.eval()
