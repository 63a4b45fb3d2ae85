"""A model with its run state: what prefills, decodes a step, compiles it, and hands tokens to the host."""

import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

import ops
from errors import UserError
from model import KVCache, Transformer
from sampling import Sampler
from speculate import PROMPT_LOOKUP, Speculator
from state import RunState, feed, to_host

# Tokens of all rows together that captured prefills feed at once: launching their kernels one by one takes longer than
# running them, as far as some hundred tokens.
CAPTURED = (8, 16, 32, 64, 128, 192, 256, 384, 512)
AGAIN, STEP = 2048, 256  # so do prompts of up to AGAIN, captured in steps when their like is read for the second time
SHARED = 512  # tokens that reading a common prefix once saves, from which it is worth its copy
DECODE_BLOCK = 8  # steps a GPU takes at a time: the host reads the tokens of one block while the next runs
MAX_DEFAULT_CONTEXT = 8192  # cache length of a chat when --max_seq_length does not say


@contextmanager
def compiling() -> Iterator[None]:
    """Around calls that torch.compile serves, whose limit on compilations of a function engines share, each of which is
    wanted. Raises UserError where it fails, mostly for want of a C++ compiler."""
    try:
        with torch._dynamo.config.patch(recompile_limit=1000):
            yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error.inner_exception).strip().splitlines()[0]
        raise UserError(f"no working C++ compiler? torch.compile failed ({reason}); run without --compile") from error


def compile_blocks(model: Transformer) -> Callable[[Tensor, Tensor, KVCache], Tensor]:
    """model.hidden with its blocks compiled for symbolic sizes: one graph serves all layers and lengths, and all
    numbers of rows but one. For more tokens than ops.row_limits: up to there kernels are as fast, and their choices
    graphs of their own. The model stays as it is."""
    import torch.fx.experimental._config as symbolic  # with torch.compile, which takes seconds to import

    blocks = [torch.compile(layer.forward, fullgraph=True, dynamic=True) for layer in model.layers]

    def hidden(x: Tensor, input_pos: Tensor, cache: KVCache) -> Tensor:
        # Sizes that happen to be equal when a graph is made must not count as one.
        with symbolic.patch(use_duck_shape=False), compiling():
            for block, kv, rope in zip(blocks, cache.layers, cache.rope):
                x = block(x, input_pos, kv, rope)
        return x

    return hidden


class Engine:
    """A model with its run state: one cache of fixed size, the device-side position and tokens of each row, and the
    decode step, compiled once. Prompts of any length up to the cache reuse all of it."""

    def __init__(
        self,
        model: Transformer,
        *,
        stop_ids: Set[int] = frozenset(),
        batch_size: int = 1,
        max_seq_length: int | None = None,
        sampler: Sampler | None = None,
        compile: bool = False,
        compile_prefill: bool = False,
        draft: Transformer | str | None = None,
        speculate_k: int | str | None = None,
        kv_cache: str | None = None,
    ):
        """stop_ids: what ends a row unless `generate` is told; draft, speculate_k: see Speculator; kv_cache: the
        draft's, too, see Transformer.cache."""
        self.model, self.stop_ids, self.batch_size = model, stop_ids, batch_size
        length = max_seq_length or min(model.config.block_size, MAX_DEFAULT_CONTEXT)
        self.state = state = RunState.new(model, batch_size, length, sampler or Sampler(), kv_cache)
        self.device = state.pos.device
        self.few = max(ops.row_limits(self.device, model.dtype), default=0)  # rows that kernels serve

        def step() -> None:
            state.step(model, state.cache, state.pos)

        self._step = self._eager_step = step  # the former is replaced by its compiled self
        self.block = DECODE_BLOCK if ops.has_graphs(self.device) else 1  # steps between two looks at the tokens
        self._block: Callable | None = None  # so many in one CUDA graph, which saves the time between graphs
        self._captured: dict[int, Callable] = {}  # prefills, by the tokens of a row
        self._again: Callable | None = None  # those of whole prompts, when their like is met again
        self._long: Callable | None = None  # compile_blocks'
        self.speculator = None
        if draft is not None:
            self.speculator = Speculator(model, state, step, draft, speculate_k, before=self._grow)
        draft_cache = self.speculator and self.speculator.draft.cache
        self.caches = [state.cache] + ([draft_cache] if draft_cache else [])
        self.span = 0  # tokens of the longest row, or more
        self.compile_seconds = 0.0
        if compile or compile_prefill:
            self.compile(compile, compile_prefill)

    def compile(self, decode: bool = True, prefill: bool = False) -> None:
        """Compile the decode step, the blocks of long prompts, or both. Starts the random numbers anew."""
        begin = time.perf_counter()
        with torch.inference_mode():
            if prefill:
                self._compile_prefill()
            if decode:
                # Where every hot operation is a kernel of ours, a CUDA graph is all that torch.compile would add.
                inductor = not ops.has_kernels(self.model)
                with compiling() if inductor else nullcontext():
                    self._compile_decode(inductor)
        self.seed(0)
        self.state.synchronize()
        self.compile_seconds += time.perf_counter() - begin

    def _compile_prefill(self) -> None:
        self._long, state = compile_blocks(self.model), self.state
        for n in sorted({self.few // self.batch_size + 1, self.few + 1}):  # attention counts the tokens of one row
            if n <= state.cache.length:
                x = self.model.tok_embeddings(state.history[:, :n])
                self._long(x, torch.zeros(self.batch_size, dtype=torch.int64), state.cache)  # positions on the host

    def _compile_decode(self, inductor: bool) -> None:
        # Static: automatic dynamic shapes, as a second model would set off, break nested regions.
        step = torch.compile(self._eager_step, fullgraph=True, dynamic=False) if inductor else self._eager_step
        step()
        graphs = ops.has_graphs(self.device)
        self._step = ops.capture(step) if graphs else step
        if graphs:
            if not self.speculator:
                self._block = ops.capture(lambda: [step() for _ in range(self.block)], warm_up=0)
            self._capture_prefill()
            ops.plan_prefill(self.model.layers[0].attention, self.state.cache.k[0])
        if self.speculator:
            self.speculator.compile(step, inductor, ops.capture if graphs else None)

    def _capture_prefill(self) -> None:
        pool, start = torch.cuda.graph_pool_handle(), torch.zeros_like(self.state.pos)  # of all: read at once
        self._again = ops.Repeated(self._whole, STEP // self.batch_size or 1, self.state.cache.length, pool)
        for size in sorted({max(1, size // self.batch_size) for size in CAPTURED}):
            if size <= self.state.cache.length:
                self._captured[size] = ops.capture(functools.partial(self._known, size), start, pool=pool)
        self._draw = ops.capture(self._draw, self.model.tok_embeddings(self.state.history, length=1)[:, 0], pool=pool)

    def seed(self, seed: int) -> None:
        """Start the random numbers anew: the same seed and calls give the same tokens."""
        if not -(2**63) <= seed < 2**63:
            raise UserError(f"the seed is {seed}; accepted: 64-bit integers")
        self.state.rng.copy_(torch.tensor([seed, 0]))

    def fit(self, length: int) -> bool:
        """Expect sequences of so many tokens. Returns whether RoPE is another for them (longrope), so that what is in
        the caches has to be read again."""
        self.span = length
        return sum(cache.fit(length) for cache in self.caches) > 0

    def _limit(self) -> float:
        return min((cache.limit for cache in self.caches), default=math.inf)

    def _grow(self, count: int) -> None:
        """Before steps that feed so many tokens to each row: where they make sequences longer than RoPE holds for, read
        all again with what holds for these, as transformers does."""
        self.span += count
        if self.span > self._limit() and self.fit((end := int(self.state.pos.max())) + count):
            start = torch.zeros_like(self.state.pos, device="cpu")  # known to the host
            for _ in feed(self._read, self.state.history[:, :end], start, end):
                pass
            if self.speculator:
                self.speculator.prefill(0, end)

    def _read(self, tokens: Tensor, start: Tensor, end: int) -> Tensor:
        """Feed a chunk (B, S) of what the history holds, perhaps padding: what the output layer reads (B, C) of each
        row's last token, if that is in the chunk, until the next call."""
        S, most = tokens.shape[1], tokens.shape[1] + self.state.history.shape[1] - end
        if size := min((size for size in self._captured if S <= size <= most), default=0):
            return self._captured[size](start)
        again = self._again and not self._long and tokens.numel() <= AGAIN and not start.any()
        x = self._again(tokens) if again else None
        return self._last(self._hidden(tokens, start, end) if x is None else x, start.to(self.device))

    def _last(self, x: Tensor, start: Tensor) -> Tensor:
        at = (self.state.pos - start).clamp(0, x.shape[1] - 1)
        return x.gather(1, at[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]

    def _known(self, size: int, start: Tensor) -> Tensor:
        """`_read` of so many tokens that the history holds from start on: what is captured."""
        x = self.model.tok_embeddings(self.state.history, start, size)
        return self._last(self.model.hidden(x, start, self.state.cache), start)

    def _hidden(self, tokens: Tensor, start: Tensor, end: int) -> Tensor:
        x = self.model.tok_embeddings(tokens)
        if self._long and tokens.numel() > self.few:
            return self._long(x, start, self.state.cache)
        # Kernels for few tokens read what is used anyway, and are compiled for the cache's length.
        return self.model.hidden(x, start, self.state.cache if self.few >= x.shape[1] else self.state.cache.first(end))

    def _whole(self, tokens: Tensor) -> Tensor:
        return self._hidden(tokens, torch.zeros(len(tokens), dtype=torch.int64), tokens.shape[1])  # known to the host

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], start: int = 0) -> None:
        """Read the prompts from position `start` on (what the cache holds before it stays), and sample one token each.

        prompts: one list of token ids a row, each with at least start + 1 ids; shorter rows are padded, and what
        padding leaves in the cache is overwritten before it can be seen.
        """
        lengths = [len(prompt) for prompt in prompts]
        start = 0 if self.fit(max(lengths)) else start
        common = shared_prefix(prompts) if start == 0 and len(prompts) > 1 else 0
        if common * (len(prompts) - 1) > SHARED:
            self.share(prompts[0][:common])
            start = common
        state, longest = self.state, max(lengths)
        if longest > state.cache.length:
            raise UserError(f"the prompt has {longest} tokens; the cache holds {state.cache.length} (--max_seq_length)")
        state.history[:, :longest] = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
        state.pos.copy_(torch.tensor(lengths) - 1)
        x, begin = None, torch.full((self.batch_size,), start)  # known to the host
        for a, last in feed(self._read, state.history[:, start:longest], begin, longest):
            x = last if x is None else torch.where((state.pos >= start + a)[:, None], last, x)
        if self.speculator:
            self.speculator.prefill(start, longest)
        self._finite = to_host(self._draw(x))  # read with the first token, for which the host waits anyway

    def _draw(self, x: Tensor) -> Tensor:
        """Sample a token a row from what the output layer reads, x (B, C). Returns whether all logits are finite."""
        logits, state = self.model.logits(x), self.state
        state.sampler(logits, state.history, state.pos, state.rng)
        return logits.isfinite().all()

    @functools.cached_property
    def reader(self) -> "Engine":
        """An engine of one row, which reads what `share` and `fill` put in rows of this one."""
        draft = self.speculator and (self.speculator.draft.model or PROMPT_LOOKUP)
        like = {"max_seq_length": self.state.cache.length, "kv_cache": self.state.cache.kind}
        reader = Engine(self.model, sampler=self.state.sampler, draft=draft, **like)
        reader.state.rng, reader._long = self.state.rng, self._long
        for ours, its in zip(self.caches, reader.caches):
            its.rope = ours.rope
        reader.caches = []  # nor does it choose
        if self._captured:
            with torch.inference_mode():
                before = self.state.rng.clone()  # which capturing draws from
                reader._capture_prefill()
                self.state.rng.copy_(before)
        return reader

    @torch.inference_mode()
    def share(self, prefix: list[int]) -> None:
        """Read the tokens that all prompts begin with once, for all rows."""
        self.reader.prefill([prefix])
        self._copy(slice(None), 0, len(prefix))

    @torch.inference_mode()
    def fill(self, row: int, prompt: list[int], start: int = 0) -> Callable[[], bool]:
        """Read a prompt into one row from position `start` on, what is before that being shared, and sample a token;
        the other rows stay as they are. Returns what `check_finite` wants."""
        self.reader.prefill([prompt], start)
        self._copy(slice(row, row + 1), start, len(prompt))
        self.state.history[row].copy_(self.reader.state.history[0])
        self.state.pos[row].copy_(self.reader.state.pos[0])
        if self.speculator:
            self.speculator.begin(row, self.state.cache.length)
        return self.reader._finite

    def park(self, rows: int | slice, start: int) -> None:
        """Let rows without a prompt wait behind position `start`, before which all share what they hold."""
        self.state.pos[rows] = place = max(start, 1)  # a draft looks back by one
        if self.speculator:
            self.speculator.limit[rows] = place

    def _copy(self, rows: slice, start: int, end: int) -> None:
        """Copy the reader's keys and values at positions start..end to rows, the draft's too."""
        ours, read = (
            [e.state.cache] + ([e.speculator.draft.cache] if e.speculator else []) for e in (self, self.reader)
        )
        to, of = ([t for cache in caches if cache for t in cache.tensors] for caches in (ours, read))
        parts = [t[rows, :, start:end] for t in to]
        torch._foreach_copy_(parts, [t[:, :, start:end].expand_as(part) for t, part in zip(of, parts)])

    @torch.inference_mode()
    def advance(self) -> Callable[[], list[list[int]]]:
        """Decode a block of steps, or a speculation step. The result waits, and returns each row's token to feed before
        it, which `fill` or an earlier call drew, and those that it drew. No row goes beyond the cache."""
        state = self.state
        if self.speculator:
            before, step = to_host(state.history.gather(1, state.pos[:, None])), self.speculator.advance()
            return lambda: [first + tokens for first, tokens in zip(before(), step())]
        index = state.pos[:, None] + torch.arange(self.block + 1, device=self.device)
        self._steps(self.block)
        state.pos.clamp_(max=state.cache.length)
        return to_host(state.history.gather(1, index))

    def _steps(self, count: int) -> None:
        for run in [self._block] if self._block and count == self.block else [self._step] * count:
            run()

    @torch.inference_mode()
    def decode(self, steps: int) -> Iterator[list[list[int]]]:
        """The token that prefill sampled, then `steps` more: yields what each row has got since, as often as asked.
        With speculation rows get different numbers of tokens, none among them, and there is no end.

        On a GPU the tokens of a block of steps are fetched while the next block runs, so the device never waits for
        the host, and stopping early throws away at most two blocks. Raises UserError as `check_finite` does.
        """
        rows = self.speculator.decode(steps) if self.speculator else self._decode(steps)
        first = next(rows)
        check_finite(self._finite)
        yield first
        yield from rows

    def _decode(self, steps: int) -> Iterator[list[list[int]]]:
        history, index = self.state.history, self.state.pos[:, None] + torch.arange(steps + 1, device=self.device)
        pending: deque[Callable[[], list]] = deque()

        def fetch(first: int, count: int) -> None:
            pending.append(to_host(history.gather(1, index[:, first : first + count])))

        fetch(0, 1)
        done = 0
        while done < steps:
            if len(pending) > (self.block > 1):
                yield pending.popleft()()
            count = (steps - done) % self.block or self.block  # single steps come first: they start sooner
            count = count if self.span + count <= self._limit() else 1  # to the very token
            self._grow(count)
            self._steps(count)
            fetch(done + 1, count)
            done += count
        while pending:
            yield pending.popleft()()


def check_finite(finite: Callable[[], bool]) -> None:
    """Raises UserError where a prefill's logits, from which nothing could be drawn then, are not finite."""
    if not finite():
        raise UserError("the model's logits are NaN or infinite: weights that are, or too large for --precision")


def shared_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, not counting the last of any."""
    least, most = min(prompts), max(prompts)  # in lexical order: what these share, all do
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(least, most)))
    return min(same, *(len(prompt) - 1 for prompt in prompts))
