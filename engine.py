"""A model with its run state: what prefills, decodes a step, compiles it, and hands tokens to the host."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

import kernels
from errors import UserError
from model import Transformer
from sampling import Sampler
from speculate import MAX_K, Speculator
from tokenizer import Tokenizer

PREFILL_CHUNK = 512  # tokens a row; bounds the score matrix of a long prompt
SHORT_ROWS = 8  # tokens that a captured prefill takes at once: launching them one by one takes longer than running
DECODE_BLOCK = 8  # steps a GPU takes at a time: the host reads the tokens of one block while the next runs
MAX_DEFAULT_CONTEXT = 8192  # cache length of a chat when --max_seq_length does not say


class Engine:
    """A model with its run state: one cache of fixed size, the device-side position and token of each row, and the
    decode step, compiled once. Prompts of any length up to the cache reuse all of it.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int = 1,
        max_seq_length: int | None = None,
        sampler: Sampler | None = None,
        compile: bool = False,
        compile_prefill: bool = False,
        draft: Transformer | str | None = None,
        speculate_k: int | str = 5,
    ):
        """draft: a model that guesses speculate_k tokens a round, or "prompt_lookup"; see speculate.py."""
        self.model, self.tokenizer, self.sampler = model, tokenizer, sampler or Sampler()
        self.device, self.batch_size = model.norm.weight.device, batch_size
        length = max_seq_length or min(model.config.block_size, MAX_DEFAULT_CONTEXT)
        self.cache = model.cache(batch_size, length)
        self.pos = torch.zeros(batch_size, dtype=torch.int64, device=self.device)  # position of the token to feed
        # Tokens by position; a full cache still has one to come, and a round there writes MAX_K + 1 behind it.
        self.history = torch.zeros(batch_size, length + 2 + MAX_K, dtype=torch.int64, device=self.device)
        self.rng = torch.zeros(2, dtype=torch.int64, device=self.device)  # seed and number of draws
        self.compile_seconds = 0.0
        self._step, self._prefill = self._eager_step, self._eager_prefill  # replaced by their compiled selves
        self.block = DECODE_BLOCK if self.device.type == "cuda" else 1  # steps between two looks at the tokens
        self._block = None  # so many in one CUDA graph, which saves the time between graphs
        self.short, self._short_prefill = 0, None  # tokens a row of a captured prefill, where there is one
        self.speculator = Speculator(self, draft, speculate_k) if draft is not None else None
        if compile or compile_prefill:
            start = time.perf_counter()
            self._compile(compile, compile_prefill)
            self.synchronize()
            self.compile_seconds = time.perf_counter() - start

    def _compile(self, decode: bool, prefill: bool) -> None:
        # Where every hot operation is a kernel of ours, the CUDA graph alone is what torch.compile would add.
        inductor = not (self.device.type == "cuda" and kernels.fits(self.model.norm.weight[None]))
        # Engines share the limit on compilations of a function, each of which is wanted.
        limit = torch._dynamo.config.patch(recompile_limit=1000) if inductor or prefill else nullcontext()
        with torch.inference_mode(), limit:
            if prefill:
                self._prefill = torch.compile(self._eager_prefill, fullgraph=True, dynamic=True)
                for n in (2, 5, 10, 20, 40):  # layers choose by the number of rows: visit each choice
                    tokens = self.history[:, : min(n, self.cache.length)].clone()
                    self._prefill(tokens, torch.zeros_like(self.pos), torch.zeros_like(self.pos))
            capture = _cuda_graph if self.device.type == "cuda" else None
            if decode:
                # Static: automatic dynamic shapes, as a second model would set off, break nested regions.
                step = torch.compile(self._eager_step, fullgraph=True, dynamic=False) if inductor else self._eager_step
                step()
                self._step = capture(step) if capture else step
                if capture:
                    self._block = None if self.speculator else capture(lambda: _repeat(step, self.block), warm_up=0)
                    self.short = max(1, SHORT_ROWS // self.batch_size)
                    tokens = torch.zeros(self.batch_size, self.short, dtype=torch.int64, device=self.device)
                    zeros = torch.zeros_like(self.pos)
                    self._short_prefill = capture(self._eager_prefill, tokens, zeros, zeros.clone())
                if self.speculator:
                    self.speculator.compile(step, inductor, capture)
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Start the random numbers anew: the same seed and calls give the same tokens."""
        if not -(2**63) <= seed < 2**63:
            raise UserError(f"the seed is {seed}; accepted: 64-bit integers")
        self.rng.copy_(torch.tensor([seed, 0]))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _eager_step(self) -> None:
        """Feed each row's token at its position, sample the next one, advance. Everything stays on the device."""
        logits = self.model(self.history, self.pos, self.cache, new=1)[:, -1]
        self.sampler(logits, self.history, self.pos, self.rng)

    def _eager_prefill(self, tokens: Tensor, start: Tensor, last: Tensor, context: int = 0) -> Tensor:
        return self.model(tokens, start, self.cache, last=last, context=context)[:, -1]

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], start: int = 0) -> None:
        """Read the prompts from position `start` on (what the cache holds before it stays), and sample one token each.

        prompts: one list of token ids a row, each with at least start + 1 ids; shorter rows are padded, and what
        padding leaves in the cache is overwritten before it can be seen.
        """
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        if longest > self.cache.length:
            raise UserError(f"the prompt has {longest} tokens; the cache holds {self.cache.length} (--max_seq_length)")
        padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
        self.history[:, :longest] = padded.to(self.device)
        end = torch.tensor(lengths, device=self.device)
        logits = None
        a = start
        while a < longest:
            left = longest - a
            size = self.short if left <= 2 * self.short else min(left, PREFILL_CHUNK)
            if size == self.short:
                prefill, context = self._short_prefill, ()
            elif self._prefill == self._eager_prefill or size == 1:
                prefill, context = self._eager_prefill, (a + size,)
            else:  # torch.compile would make a graph of its own for each bound of the context, and for one token
                prefill, context = self._prefill, ()
            # A captured prefill may reach past the prompt, where it repeats the last token: padding like any other.
            tokens = self.history[:, torch.arange(a, a + size, device=self.device).clamp(max=longest - 1)]
            chunk = prefill(tokens, torch.full_like(self.pos, a), (end - 1 - a).clamp(0, size - 1), *context)
            logits = chunk.clone() if logits is None else torch.where((end > a)[:, None], chunk, logits)
            a += size
        if self.speculator:
            self.speculator.prefill(start, longest)
        self.pos.copy_(end - 1)
        self.sampler(logits, self.history, self.pos, self.rng)

    @torch.inference_mode()
    def decode(self, steps: int, live: list[bool]) -> Iterator[list[int]]:
        """The token that prefill sampled, then `steps` more: yields each step's tokens, one a row. Rows that the caller
        marks as not live any more may yield anything.

        On a GPU the tokens of a block of steps are fetched while the next block runs, so the device never waits for
        the host, and stopping early throws away at most two blocks.
        """
        if self.speculator:
            yield from self.speculator.decode(steps, live)
            return
        begin = self.pos.clone()
        pending: deque[tuple[Tensor, Callable[[], None]]] = deque()

        def fetch(first: int, count: int) -> None:
            index = begin[:, None] + torch.arange(first, first + count, device=self.device)
            pending.append(self.to_host(self.history.gather(1, index)))

        fetch(0, 1)
        done = 0
        while done < steps:
            yield from _drain(pending, keep=1 if self.block > 1 else 0)
            count = (steps - done) % self.block or self.block  # single steps come first: they start sooner
            if self._block and count == self.block:
                self._block()
            else:
                _repeat(self._step, count)
            fetch(done + 1, count)
            done += count
        yield from _drain(pending, keep=0)

    @staticmethod
    def to_host(tokens: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Start copying tokens to the host; the callable waits until they are there."""
        if tokens.device.type != "cuda":
            return tokens.cpu(), lambda: None
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event.synchronize


def _repeat(step: Callable[[], None], count: int) -> None:
    for _ in range(count):
        step()


def _drain(pending: deque, keep: int) -> Iterator[list[list[int]]]:
    while len(pending) > keep:
        host, wait = pending.popleft()
        wait()
        yield from host.t().tolist()


def _cuda_graph(function: Callable[..., Tensor | None], *inputs: Tensor, warm_up=2) -> Callable[..., Tensor | None]:
    """Capture a function that reads `inputs` and otherwise only fixed tensors. The result copies its arguments there,
    replays, and returns the captured output, which the next call overwrites.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):  # compiles kernels and makes library handles, which capturing must not do
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*inputs)

    def replay(*values: Tensor) -> Tensor | None:
        for fixed, value in zip(inputs, values):
            fixed.copy_(value)
        graph.replay()
        return output

    return replay
