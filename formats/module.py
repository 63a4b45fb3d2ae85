"""A quantised module of a checkpoint: its tensors by what its scheme calls them, each checked as it is read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError
from formats.source import Lazy

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Module:
    name: str
    tensors: dict[str, Lazy]  # "qweight", "scales", ...
    scheme: str  # for messages

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def shape(self, key: str, *sizes: int | None) -> tuple[int, ...]:
        """A tensor's shape. Raises UserError where it is not there, or not of these sizes (None: of any)."""
        if key not in self.tensors:
            raise UserError(f"{self.name} lacks {key}, which a module quantised by {self.scheme} has")
        shape = self.tensors[key].shape
        if sizes and (len(shape) != len(sizes) or any(b not in (None, a) for a, b in zip(shape, sizes))):
            needed = ["any" if size is None else size for size in sizes]
            raise UserError(f"{self.name}.{key} has shape {list(shape)}; {self.scheme} needs {needed}".replace("'", ""))
        return shape

    def read(self, key: str, *dtypes: torch.dtype) -> Tensor:
        """A tensor that has one of these dtypes. Raises UserError for others."""
        tensor = self.tensors[key].read()
        if tensor.dtype not in dtypes:
            found, *accepted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
            raise UserError(f"{self.name}.{key} is {found}; {self.scheme} has {' or '.join(accepted)}")
        return tensor


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """int32 words, each of 32 / bits unsigned integers along a dimension, the lowest bits first -> uint8."""
    parts = [(words >> shift & (1 << bits) - 1).to(torch.uint8) for shift in range(0, 32, bits)]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)
