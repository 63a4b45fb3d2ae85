"""Everything that is fast, behind one seam. This is the only door.

Above it nobody asks which device, dtype or number of rows goes where; below it nobody knows what a model family is.
Each op is an ordered list of backends, of which the first one that supports the arguments serves. The last one is plain
PyTorch: it runs everywhere, and tests compare the others with it. What only a kernel wants to know is prepared when
weights are laid out (`prepare_linear`, `prepare_attention`), and travels inside the layer.
"""

import torch
from torch import nn

from ops import cpu
from ops.ahead import compiled_ahead
from ops.attention import attention
from ops.attention import prepare as prepare_attention
from ops.common import MAX_ROWS, triton
from ops.cpu_library import physical_cores
from ops.cpu_step import layers, serves
from ops.cpu_step import prepare as prepare_layers
from ops.embedding import embed
from ops.experts import glu, mixture, route
from ops.experts import prepare as prepare_mixture
from ops.graph import Repeated, capture, has_graphs
from ops.kv_cache import DTYPES as CACHE_KINDS
from ops.kv_cache import allocate as new_cache
from ops.linear import FEW_ROWS, linear, plain
from ops.linear import prepare as prepare_linear
from ops.matmul_rate import matmul_rate
from ops.memory import free_memory
from ops.ngram import copy_match, find
from ops.packing import dequantize, group_size
from ops.prefill_cudnn import plan as plan_prefill
from ops.read_bandwidth import read_bandwidth
from ops.rms_norm import add_norm
from ops.rounding import int4_grid, inverse_factor, round_columns
from ops.sampling import logit_threshold, sample
from ops.symmetric import all_reduce
from ops.upload import upload
from ops.verify import verify

__all__ = [
    "CACHE_KINDS",
    "Repeated",
    "add_norm",
    "all_reduce",
    "attention",
    "capture",
    "chunk_tokens",
    "compiled_ahead",
    "copy_match",
    "dequantize",
    "embed",
    "find",
    "free_memory",
    "glu",
    "group_size",
    "has_graphs",
    "has_kernels",
    "int4_grid",
    "inverse_factor",
    "layers",
    "linear",
    "logit_threshold",
    "matmul_rate",
    "mixture",
    "new_cache",
    "physical_cores",
    "plain",
    "plan_prefill",
    "prepare_attention",
    "prepare_layers",
    "prepare_linear",
    "prepare_mixture",
    "read_bandwidth",
    "round_columns",
    "route",
    "row_limits",
    "sample",
    "upload",
    "verify",
]


def has_kernels(model: nn.Module) -> bool:
    """Whether every op of a decode step is a kernel of ours, so that a compiler has nothing to add."""
    weight = model.norm.weight
    return serves(model) or _on_triton(weight.device, weight.dtype)


def _on_triton(device: torch.device, dtype: torch.dtype) -> bool:
    return has_graphs(device) and triton is not None and dtype.itemsize == 2


def row_limits(device: torch.device, dtype: torch.dtype) -> tuple[int, ...]:
    """The numbers of rows beyond which ops take another path, in order. Rows are tokens of all sequences together, and
    for attention tokens of one."""
    if _on_triton(device, dtype):
        return (MAX_ROWS,)
    if device.type != "cpu":
        return ()
    return (cpu.MAX_ROWS,) if cpu.ready() and dtype is not torch.float16 else (FEW_ROWS,)


def chunk_tokens(device: torch.device, rows: int) -> int:
    """How many tokens of each of so many rows are read at once: enough for the matrix units, while what a layer makes
    of them takes little memory."""
    return max(1, (8192 if has_graphs(device) else 2048) // rows)
