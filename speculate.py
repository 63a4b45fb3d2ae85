"""Speculative decoding: a cheap draft proposes the next k tokens, and one pass of the target verifies them all.

Rejection sampling after Leviathan et al. (arXiv 2211.17192): whatever the draft proposes, the tokens follow the
distribution of the target, and at temperature 0 they are plain greedy decoding's. The draft is a smaller model of the
same tokenizer (a quantised copy of the target will do) or no model at all: prompt lookup copies what followed the last
tokens before.

A speculation step (draft, verify, accept, resample, advance) runs on the device alone, from each row's position and
tokens to its new position and tokens; one CUDA graph holds it whole. The host reads what came of it while the next one
runs.
"""

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import ops
from errors import UserError
from model import Transformer
from state import MAX_K, RunState, feed, to_host

PROMPT_LOOKUP = "prompt_lookup"
LOOKUP_K, MODEL_K = 7, 5  # draft tokens of a step by default: of prompt lookup, which costs nothing, and of a model
AUTO = (0, 1, 3, 5, 7, 11, 15)  # what `auto` chooses from: plain decoding, and rows that kernels multiply by 2, 4 or 8
RECENT = 32  # steps that `auto` goes by; when plain ones have pushed the others out, it tries again


class PromptLookup:
    """A draft without a model: what followed the latest occurrence of a row's last tokens, as many as recur."""

    model = cache = None

    def __init__(self, state: RunState):
        self.state = state

    def read(self, start: Tensor, n: int) -> None:
        """It has no cache to keep up."""

    def prepare(self, unread: int) -> bool:
        """Whether to propose now: verifying costs more on a CPU, and a look nothing; one token that recurs is too
        little to go by."""
        state = self.state
        return not state.pos.is_cpu or bool((ops.find(state.history, state.pos)[1] > 1).any())

    def propose(self, k: int) -> None:
        """Write k draft tokens behind each row's position."""
        ops.copy_match(self.state.history, self.state.pos, k)


class DraftModel:
    """A draft by a model of the target's tokenizer, with a cache of its own. Vocabularies may be padded differently: a
    token that the draft lacks is never proposed, and fed to it as its last one.
    """

    def __init__(self, model: Transformer, target: Transformer, state: RunState):
        # Of all ranks together: a draft may be whole on each of them.
        size, most = (sum(t.nbytes for t in m.parameters()) * m.tp.world / 1e6 for m in (model, target))
        if size > most:
            raise UserError(f"the draft's weights are {size:.1f} MB; it must not exceed the target's {most:.1f} MB")
        self.model, self.state = model, state
        self.cache = model.cache(len(state.pos), state.cache.length, state.cache.kind)
        self.step = lambda pos, rows: state.step(model, self.cache, pos, rows)  # replaced by its compiled self

    def read(self, start: Tensor, n: int) -> None:
        """Feed n tokens of each row from position `start` (B,) on."""
        model = self.model
        tokens = self.state.history.gather(1, start[:, None] + torch.arange(n, device=start.device))
        tokens = tokens.clamp(max=model.config.vocab_size - 1)
        for _ in feed(lambda part, pos, _: model.hidden(model.tok_embeddings(part), pos, self.cache), tokens, start):
            pass

    def prepare(self, unread: int) -> bool:
        """Catch up with the tokens of so many plain steps. Returns whether to propose now."""
        if unread:
            self.read((self.state.pos - unread - 1).clamp(min=0), unread)
        return True

    def propose(self, k: int) -> Tensor | None:
        """Write k draft tokens behind each row's position. Returns the logits fp32 (B, k, V) that they were drawn from,
        if drawn. The first step feeds two tokens: where all draft tokens were accepted, the last was never fed.
        """
        pos = self.state.pos.clone()
        logits = [self.step(pos, 1 if i else 2) for i in range(k)]
        return torch.stack(logits, 1) if self.state.sampler.temperature > 0 else None


class Speculator:
    """Speculation steps of a model and its run state: how they run, how k is chosen, what they were worth.

    plain: decodes one token a row without speculation; draft: a model, or "prompt_lookup"; k: draft tokens of a step,
    "auto", or None, the draft's default; before: called with how many tokens a step is about to feed. Raises UserError
    for what cannot work.
    """

    def __init__(
        self,
        model: Transformer,
        state: RunState,
        plain: Callable[[], None],
        draft: Transformer | str,
        k: int | str | None = None,
        before: Callable[[int], None] = lambda count: None,
    ):
        if k is None:
            k = LOOKUP_K if draft == PROMPT_LOOKUP else MODEL_K
        if k != "auto" and k not in range(1, MAX_K + 1):
            raise UserError(f"speculate_k is {k!r}; accepted: 1 to {MAX_K}, or auto")
        if isinstance(draft, str) and draft != PROMPT_LOOKUP:
            raise UserError(f"cannot speculate by {draft!r}; accepted: {PROMPT_LOOKUP}, or a draft model")
        self.state, self.k, self.share = state, k, model.tp.share
        self.draft = PromptLookup(state) if draft == PROMPT_LOOKUP else DraftModel(draft, model, state)
        self.limit = torch.zeros_like(state.pos)  # the last position that each row may reach
        self.before, self.plain, self.capture = before, plain, lambda step: step  # compile replaces the latter two,
        self.forward = lambda tokens, pos: model(tokens, pos, state.cache, all_logits=True)  # and this
        self.steps = {i: partial(self._step, i) for i in (AUTO if k == "auto" else (0, k))}
        self.seconds: dict[int, float] = {}  # what a step of k draft tokens takes
        self.outcomes: list[tuple[int, int]] = []  # k and tokens accepted, of this generation's steps
        self.unread = 0  # latest plain steps, whose tokens the draft has not read

    def _step(self, k: int) -> Tensor:
        """Draft, verify, accept, resample, advance. Returns int64 (B, k + 3): how many tokens a row takes, which its
        limit bounds; how many draft tokens are accepted; the tokens.
        """
        state = self.state
        begin = state.pos.clone()
        index = begin[:, None] + torch.arange(k + 1, device=begin.device)
        if k == 0:
            self.plain()
            accepted = torch.zeros_like(begin)
        else:
            draft_logits = self.draft.propose(k)
            tokens = state.history.gather(1, index)
            accepted, following = self.verify(self.forward(tokens, begin), tokens[:, 1:], draft_logits)
            state.history.scatter_(1, index + 1, following)
        taken = torch.minimum(accepted + 1, self.limit - begin)
        state.pos.copy_(begin + taken)
        return torch.cat((taken[:, None], accepted[:, None], state.history.gather(1, index + 1)), 1)

    def verify(self, logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Verify draft tokens int64 (B, k) by the target's logits fp32 (B, k + 1, V). draft_logits: fp32 (B, k, V) that
        they were drawn from; None if they were not drawn. Returns how many are accepted (B,), and the tokens (B, k + 1)
        that follow: those accepted, the target's own one, and rubbish.
        """
        state, sampler = self.state, self.state.sampler
        B, k = draft_tokens.shape
        logits = logits.flatten(0, 1)  # (B (k + 1), V)
        if sampler.repetition_penalty != 1.0:
            positions = state.pos[:, None] + torch.arange(k + 1, device=logits.device)
            logits = sampler.penalized(logits, state.history.repeat_interleave(k + 1, 0), positions.flatten())
        if draft_logits is None:  # a token that was not drawn is accepted if the target draws it as well
            own = sampler.draw(logits, state.rng)
        else:
            own = sampler.verify(logits, draft_logits, draft_tokens, state.rng)
        own = own.view(B, k + 1)
        return (own[:, :k] == draft_tokens).cumprod(1).sum(1), own

    def compile(self, plain: Callable[[], None], inductor: bool, capture: Callable | None) -> None:
        """Prepare all steps, by torch.compile, as CUDA graphs, or both. plain: before it is captured."""
        self.plain, self.capture = plain, capture or self.capture
        if inductor:
            self.forward = torch.compile(self.forward, fullgraph=True, dynamic=self.k == "auto")
            if self.draft.model:
                self.draft.step = torch.compile(self.draft.step, fullgraph=True, dynamic=False)
        self.state.pos.fill_(1)  # a draft looks back by one,
        self.limit.fill_(1)  # and so no row may leave this place
        self.steps = {k: self.capture(step) for k, step in self.steps.items()}
        for step in self.steps.values():
            step()  # now torch.compile does its work
        if self.k == "auto":
            self._time_steps()

    def _time_steps(self) -> None:
        self.seconds = {k: self.time(step) for k, step in self.steps.items()}

    def time(self, step: Callable[[], object]) -> float:
        """Seconds that a step takes, the median of five looks; with several ranks, the first one's."""
        self.limit.copy_(self.state.pos)  # no row may advance meanwhile; what lies beyond its position is not read
        repeats, times = 10 if self.state.pos.is_cuda else 1, []
        for _ in range(5):
            self.state.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            self.state.synchronize()
            times.append((time.perf_counter() - start) / repeats)
        return self.share(statistics.median(times))

    def prefill(self, start: int, end: int) -> None:
        """Let a draft model read the prompts' positions start..end, and what it has missed before them."""
        first = max(0, start - self.unread - 1)
        self.draft.read(torch.full_like(self.state.pos, first), end - first)
        self.unread = 0

    def decode(self, steps: int) -> Iterator[list[list[int]]]:
        """As Engine.decode."""
        state = self.state
        self.begin(slice(None), state.pos + steps)
        self.outcomes = []
        yield state.history.gather(1, state.pos[:, None]).tolist()
        pending: deque[Callable[[], list[list[int]]]] = deque()
        while True:
            while len(pending) < (2 if state.pos.is_cuda else 1):  # one runs while the host reads the one before
                pending.append(self.advance())
            yield pending.popleft()()

    def begin(self, rows: int | slice, limit: int | Tensor) -> None:
        """Prepare for the steps of rows that may reach position `limit`."""
        if self.k == "auto" and not self.seconds:
            self._time_steps()
        self.limit[rows] = limit

    def advance(self) -> Callable[[], list[list[int]]]:
        """Start a step. The result waits, and returns the tokens that each row takes."""
        k = self._choose()
        if k and not self.draft.prepare(self.unread):
            k = 0
        self.before(k + 1)
        self.unread = 0 if k else self.unread + 1
        result = to_host(self.steps[k]())

        def wait() -> list[list[int]]:
            rows = result()
            self.outcomes += [(k, accepted) for taken, accepted, *_ in rows if taken]
            return [tokens[:taken] for taken, _, *tokens in rows]

        return wait

    def _choose(self) -> int:
        """The k that promises most tokens a second by the acceptance and the costs measured."""
        if self.k != "auto":
            return self.k
        recent = self.outcomes[-RECENT * len(self.state.pos) :]
        chance, reach, tokens = 0.9, 1.0, [1.0]  # tokens that a step of k brings, by k
        for i in range(MAX_K):
            accepted, rejected = sum(n > i for _, n in recent), sum(k > i == n for k, n in recent)
            chance = (accepted + chance) / (accepted + rejected + 1)  # a place not tried lately: as the one before
            reach *= chance
            tokens.append(tokens[-1] + reach)
        return max(self.steps, key=lambda k: tokens[k] / self.seconds[k])

    def work_per_token(self) -> tuple[float, float]:
        """Passes of the target, and of the draft, for each token of the last generation."""
        tokens = max(1, sum(accepted + 1 for _, accepted in self.outcomes))
        return len(self.outcomes) / tokens, sum(k for k, _ in self.outcomes) / tokens

    @torch.inference_mode()
    def report(self, tokens_per_second: float) -> dict:
        """What speculation did in the last generation, which made so many tokens a second a row, and what it was worth.

        Times plain decoding and the parts of a step where the text ends now.
        """
        state, used = self.state, Counter(k for k, _ in self.outcomes)
        tries = [sum(k > i for k, _ in self.outcomes) for i in range(max(used, default=0))]
        accepted = [sum(n > i for _, n in self.outcomes) for i in range(len(tries))]
        usual = max((k for k in used if k), key=used.get, default=max(self.steps))
        fed = state.history.gather(1, state.pos[:, None] + torch.arange(usual + 1, device=state.pos.device))

        def plain() -> None:
            self.plain()
            state.pos.sub_(1)

        parts = {
            "plain": self.capture(plain),
            "step": self.steps[usual],
            "draft": self.capture(partial(self.draft.propose, usual)),
            "verify": self.capture(partial(self.forward, fed, state.pos)),
        }
        ms = {f"{name}_ms": 1e3 * self.time(step) for name, step in parts.items()}
        return {
            "k": self.k,
            "steps_by_k": dict(sorted(used.items())),
            "tokens_per_step": 1 / self.work_per_token()[0] if used else 0.0,
            "mean_accepted": sum(accepted) / tries[0] if tries else 0.0,
            "acceptance_by_position": [n / tried for n, tried in zip(accepted, tries)],
            "timed_k": usual,
            **ms,
            "overhead_ms": ms["step_ms"] - ms["draft_ms"] - ms["verify_ms"],
            "plain_tokens_per_second": 1e3 / ms["plain_ms"],
            "speedup": tokens_per_second * ms["plain_ms"] / 1e3,
        }


def summary(r: dict) -> str:
    """A report in words, with advice where speculation did not pay."""
    lines = [
        f"Speculation: {r['tokens_per_step']:.2f} tokens a step, {r['mean_accepted']:.2f} draft tokens accepted, "
        f"by position {' '.join(f'{a:.2f}' for a in r['acceptance_by_position']) or 'none'}",
        f"A step of {r['timed_k']}: {r['step_ms']:.2f} ms, draft {r['draft_ms']:.2f}, verify {r['verify_ms']:.2f}, "
        f"overhead {r['overhead_ms']:.2f}; a plain step: {r['plain_ms']:.2f} ms",
        f"Speed-up over plain decoding ({r['plain_tokens_per_second']:.2f} tokens/sec, same run): {r['speedup']:.2f} x",
    ]
    if r["speedup"] < 1:
        change = "a cheaper draft" if r["draft_ms"] > r["verify_ms"] else "a draft closer to the target"
        lines.append(f"Speculation made this slower. Try {change}, another --speculate_k (or auto), or none.")
    return "\n".join(lines)
