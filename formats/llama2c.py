"""llama2.c's training checkpoints: one stories*.pt of weights in Meta's names and model_args.

Specification: train.py and model.py of https://github.com/karpathy/llama2.c.
"""

from pathlib import Path

import torch

from checkpoint import torch_load
from formats.fields import mapping, read
from formats.meta import meta_config
from formats.source import META, Source, dense, named, one_model, tensors_of

CHECKPOINT = {"model": mapping(), "model_args": mapping()}


def open_stories(files: list[Path]) -> Source:
    """Raises UserError for a file that is damaged or another program's."""
    one_model(files, files)
    weights, args = read(files[0], CHECKPOINT, torch_load(files[0])).values()
    stored = tensors_of(files[0], weights, weights.__getitem__)
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in stored.items()}
    shared = ("output.weight", "tok_embeddings.weight")
    if all(name in tensors for name in shared) and torch.equal(*(dense(name, tensors[name].read()) for name in shared)):
        del tensors["output.weight"]  # llama2.c stores a tied matrix twice
    return named(META, meta_config(files[0], args, tensors), tensors, where=files[0], interleaved=True)
