"""llama2.c's training checkpoints: one stories*.pt of weights in Meta's names and model_args.

Specification: train.py and model.py of https://github.com/karpathy/llama2.c.
"""

from pathlib import Path

import torch

from checkpoint import torch_load
from errors import UserError
from formats.meta import meta_config
from formats.source import META, Lazy, Source, named, only


def open_stories(files: list[Path], _: str | None) -> Source:
    """Raises UserError for a file that is damaged or another program's."""
    checkpoint = torch_load(path := only(files))
    if not isinstance(checkpoint.get("model"), dict) or not isinstance(checkpoint.get("model_args"), dict):
        raise UserError(f"{path} is not a llama2.c checkpoint: it lacks 'model' or 'model_args'")
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
    shared = [weights.get(f"{name}.weight", torch.empty(0)) for name in ("output", "tok_embeddings")]
    if torch.equal(*shared):  # llama2.c stores a tied matrix twice
        weights.pop("output.weight", None)
    tensors = {name: Lazy(tuple(t.shape), lambda t=t: t) for name, t in weights.items()}
    return named(META, meta_config(checkpoint["model_args"], tensors), tensors, interleaved=True)
