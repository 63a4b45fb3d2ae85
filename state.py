"""Run state of a batch: what changes while it generates, apart from the model's blueprint and weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from model import KVCache, Transformer
from sampling import Sampler

MAX_K = 15  # draft tokens of a speculation step: verifying feeds one more, and decode kernels take 16 rows


@dataclass
class RunState:
    """Everything is on the device, so that a step needs nothing of the host."""

    sampler: Sampler
    vocab_size: int  # the model's; a draft may have another
    cache: KVCache  # the model's; a draft has its own
    history: Tensor  # int64 (B, T + 2 + MAX_K), tokens by position
    pos: Tensor  # int64 (B,), position of the token to feed
    rng: Tensor  # int64 (2,), seed and number of draws

    @classmethod
    def new(
        cls, model: Transformer, batch_size: int, length: int, sampler: Sampler, kv_cache: str | None = None
    ) -> "RunState":
        """State for so many rows of so many tokens; kv_cache: see Transformer.cache."""
        device = model.norm.weight.device
        # A full cache still has one token to come, and a speculation step there writes MAX_K + 1 behind it.
        shapes = ((batch_size, length + 2 + MAX_K), (batch_size,), (2,))
        tensors = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes)
        return cls(sampler, model.config.vocab_size, model.cache(batch_size, length, kv_cache), *tensors)

    def step(self, model: Transformer, cache: KVCache, pos: Tensor, rows: int = 1) -> Tensor:
        """Feed the `rows` tokens that end at pos (B,), draw the next one, write it behind them and advance pos. Returns
        the logits it was drawn from, fp32 (B, V): those that a draft lacks are minus infinity, others than V are cut.
        """
        start = pos - (rows - 1) if rows > 1 else pos
        missing = self.vocab_size - model.config.vocab_size
        history = self.history.clamp(max=model.config.vocab_size - 1) if missing > 0 else self.history
        x = model.hidden(model.tok_embeddings(history, start, rows), start, cache)
        logits = model.logits(x[:, -1:])[:, -1]
        logits = F.pad(logits, (0, missing), value=-torch.inf) if missing else logits
        logits = self.sampler.penalized(logits, self.history, pos)
        self.sampler.draw(logits, self.rng, self.history, pos)
        return logits

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.pos.is_cuda:
            torch.cuda.synchronize(self.pos.device)


def feed(
    hidden: Callable[[Tensor, Tensor, int], Tensor], tokens: Tensor, start: Tensor, end: int = 0, size: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Feed tokens (B, S) from position start (B,) on in chunks of at most `size` tokens a row, by default what the
    device reads best: yields the offset in S of each and what the output layer reads of it (B, >= s, C).

    hidden(tokens, start, end) computes that for a chunk; end bounds the positions in use, for all tokens and then for
    a chunk, or is 0 if the host knows none.
    """
    B, S = tokens.shape
    most = ops.chunk_tokens(tokens.device, B)
    size = min(size or most, most)
    for a in range(0, S, size):
        part = tokens[:, a : a + size]
        yield a, hidden(part, start + a, end and end - S + a + part.shape[1])


def to_host(tokens: Tensor) -> Callable[[], list]:
    """Start copying tokens to the host. The result waits until they are there and returns them as lists."""
    if not tokens.is_cuda:
        return tokens.tolist
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> list:
        event.synchronize()
        return host.tolist()

    return wait
