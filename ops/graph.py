"""CUDA graphs: a sequence of kernels that the host launches at once."""

from collections.abc import Callable
from typing import TypeVar

import torch
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
