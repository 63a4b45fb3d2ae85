"""The layout of a GGUF file: its metadata and where its tensors lie, each count and offset checked against the file.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError, shown
from formats.fields import integer, read

_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))  # value types -> struct's codes
_STRING, _ARRAY, _UINT32, _UINT64 = 8, 9, 4, 10
_DEEPEST = 4  # arrays in arrays
_DIMENSIONS = 4
_HEADER = {"general.alignment": integer(high=2**20, default=32)}


class GGUFTensor(NamedTuple):
    shape: tuple[int, ...]  # rows first, as PyTorch has them
    kind: Any  # its GGMLQuantizationType
    data: memoryview


@dataclass(frozen=True)
class GGUFFile:
    path: Path
    metadata: dict[str, Any]  # numbers, strings and lists of them
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """The file, mapped. Raises UserError for one that is truncated or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        cursor = _Cursor(data)
        if (magic := bytes(cursor.take(4))) != b"GGUF":
            raise ValueError(f"it begins with {magic}")
        if (version := cursor.value(_UINT32)) not in (2, 3):
            raise ValueError(f"its version is {version}")
        n_tensors, n_values = cursor.value(_UINT64), cursor.value(_UINT64)
        metadata = cursor.table(n_values, lambda: cursor.value(cursor.value(_UINT32)))
        infos = cursor.table(n_tensors, cursor.tensor_info)
        alignment = read(path, _HEADER, metadata)["general.alignment"]
        start = math.ceil(cursor.at / alignment) * alignment
        tensors = {name: _tensor(name, *info, data[start:], alignment) for name, info in infos.items()}
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is truncated or not a GGUF file ({str(error)[:120]})") from None
    return GGUFFile(path, metadata, tensors)


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int, data: memoryview, alignment: int) -> GGUFTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    quantisation = GGMLQuantizationType(kind)  # a ValueError for one that the package does not know
    block, block_bytes = GGML_QUANT_SIZES[quantisation]
    size = math.prod(shape) // block * block_bytes
    if shape[-1] % block or offset % alignment or offset + size > len(data):
        raise ValueError(f"tensor {shown(name)} of {size} bytes at {offset} does not fit")
    return GGUFTensor(shape, quantisation, data[offset : offset + size])


class _Cursor:
    """Reads a header from its start on. Nothing is trusted: each method raises ValueError where the file ends."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError("it ends within its header")
        self.at += size
        return self.data[self.at - size : self.at]

    def value(self, kind: int, depth: int = 0) -> Any:
        if code := _NUMBERS.get(kind):
            return self.numbers(code, 1)[0]
        if kind == _STRING:
            return str(self.take(self.value(_UINT64)), "utf-8")
        if kind != _ARRAY or depth == _DEEPEST:
            raise ValueError(f"it holds a value of type {kind}" + f" in {depth} arrays" * (depth > 0))
        each, count = self.value(_UINT32), self.value(_UINT64)
        if code := _NUMBERS.get(each):
            return list(self.numbers(code, count))
        return [self.value(each, depth + 1) for _ in range(count)]

    def numbers(self, code: str, count: int) -> tuple:
        data = self.take(struct.calcsize(f"<{code}") * count)
        return struct.unpack(f"<{count}{code}", data)

    def table(self, count: int, entry: Callable[[], Any]) -> dict[str, Any]:
        """So many names, each with what `entry` reads after it."""
        found: dict[str, Any] = {}
        for _ in range(count):
            if (name := self.value(_STRING)) in found:
                raise ValueError(f"it holds {shown(name)} twice")
            found[name] = entry()
        return found

    def tensor_info(self) -> tuple[tuple[int, ...], int, int]:
        """Shape, quantisation and offset."""
        if not 0 < (n := self.value(_UINT32)) <= _DIMENSIONS:
            raise ValueError(f"a tensor has {n} dimensions")
        return self.numbers("Q", n)[::-1], self.value(_UINT32), self.value(_UINT64)
