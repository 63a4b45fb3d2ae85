"""CUDA graphs: a sequence of kernels that the host launches at once."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Output = TypeVar("Output")


def has_graphs(device: torch.device) -> bool:
    """Whether it is a GPU that captures, or the meta device, which stands for one (see ahead.py)."""
    return device.type in ("cuda", "meta")


def capture(
    function: Callable[..., Output], *inputs: Tensor, warm_up: int = 2, pool: object = None
) -> Callable[..., Output]:
    """Capture a function that reads `inputs` and otherwise only fixed tensors. The result copies its arguments there,
    replays, and returns the captured output, which the next call overwrites.

    warm_up: how often to run before, which compiles kernels and makes library handles, as capturing must not. pool:
    memory (torch.cuda.graph_pool_handle) to share with graphs whose outputs are read before this one is replayed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = function(*inputs)

    def replay(*values: Tensor) -> Output:
        for fixed, value in zip(inputs, values):
            fixed.copy_(value)
        graph.replay()
        return output

    return replay


ROOM = 2**32  # bytes that are free where another graph is made, whose memory is its own


def has_room(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > ROOM


class Repeated:
    """A function of tokens (B, S), captured for an S when its like is met for the second time: capturing takes longer
    than one call."""

    def __init__(self, function: Callable[[Tensor], Output], step: int, longest: int, pool: object):
        """S is padded to a multiple of `step`, or to `longest`; pool: see `capture`."""
        self.function, self.step, self.longest, self.pool = function, step, longest, pool
        self.graphs: dict[int, Callable[[Tensor], Output] | None] = {}  # None when met once

    def __call__(self, tokens: Tensor) -> Output | None:
        """The captured output, which the next call overwrites, or None when this S is met for the first time, or there
        is no room."""
        size = min(-(-tokens.shape[1] // self.step) * self.step, self.longest)
        first = size not in self.graphs
        if first or (self.graphs[size] is None and not has_room(tokens.device)):
            self.graphs[size] = None
            return None
        tokens = F.pad(tokens, (0, size - tokens.shape[1]))
        if self.graphs[size] is None:
            self.graphs[size] = capture(self.function, tokens, warm_up=1, pool=self.pool)
        return self.graphs[size](tokens)
