"""Speculative decoding: a cheap draft guesses the next k tokens, and one pass of the target judges them all.

Rejection sampling after Leviathan et al. (arXiv 2211.17192): whatever the draft guesses, the tokens follow the target's
distribution, and at temperature 0 they are plain greedy decoding's. The draft is a smaller model of the same vocabulary
(a quantised copy of the target will do) or no model at all: prompt lookup copies what followed the last tokens before.

A round (draft, verify, accept, resample, advance) runs on the device alone, from each row's position and tokens to its
new position and tokens; one CUDA graph holds it whole. The host reads what came of it while the next one runs.
"""

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from errors import UserError
from lookup import copy_match, find
from model import Transformer

PROMPT_LOOKUP = "prompt_lookup"
MAX_K = 15  # a verify pass has k + 1 rows; the decode kernels take 16
AUTO = (0, 1, 3, 5, 7, 11, 15)  # what `auto` chooses from: plain decoding, and rows that kernels take by 2, 4 or 8
RECENT = 32  # rounds that `auto` goes by; when plain ones have pushed the others out, it tries again
CHUNK = 512  # tokens a row that a draft reads at once


class PromptLookup:
    """A draft without a model: what followed the latest occurrence of a row's last tokens, as many as recur."""

    def __init__(self, llm):
        self.llm, self.model = llm, None

    def propose(self, k: int) -> None:
        """Write k guesses behind each row's position."""
        copy_match(self.llm.history, self.llm.pos, k)


class DraftModel:
    """A draft by a model of the target's vocabulary, with a cache of its own."""

    def __init__(self, llm, model: Transformer):
        vocab, own = llm.model.config.vocab_size, model.config.vocab_size
        if own != vocab:
            raise UserError(f"the draft's vocabulary has {own} tokens, the target's {vocab}; they must be the same")
        # Of all ranks together: a draft may be whole on each of them.
        size, target = (sum(t.nbytes for t in m.parameters()) * m.tp.world / 1e6 for m in (model, llm.model))
        if size > target:
            raise UserError(f"the draft's weights are {size:.1f} MB; it must not exceed the target's {target:.1f} MB")
        self.llm, self.model = llm, model
        self.cache = model.cache(llm.batch_size, llm.cache.length)
        self.step = self._step  # replaced by its compiled self

    def _step(self, pos: Tensor, rows: int) -> Tensor:
        """Feed the `rows` tokens that end at `pos` (B,), write a guess behind them and advance `pos`. Returns the
        guess's logits (B, V)."""
        history, sampler = self.llm.history, self.llm.sampler
        start = pos - (rows - 1) if rows > 1 else pos
        logits = sampler.penalized(self.model(history, start, self.cache, new=rows)[:, -1], history, pos)
        sampler.draw(logits, self.llm.rng, history, pos)
        return logits

    def propose(self, k: int) -> Tensor | None:
        """Write k guesses behind each row's position. Returns the logits fp32 (B, k, V) that they were drawn from, if
        drawn. The first step feeds two tokens: of a round whose guesses all held, the last was never fed.
        """
        pos = self.llm.pos.clone()
        logits = [self.step(pos, 1 if i else 2) for i in range(k)]
        return torch.stack(logits, 1) if self.llm.sampler.temperature > 0 else None

    def read(self, start: Tensor, n: int) -> None:
        """Feed n tokens of each row from position `start` (B,) on."""
        for a in range(0, n, CHUNK):
            self.model(self.llm.history, start + a, self.cache, new=min(CHUNK, n - a))


class Speculator:
    """Rounds of speculation for an Engine: how they run, how k is chosen, what they were worth.

    draft: a model, or "prompt_lookup"; k: guesses a round, or "auto". Raises UserError for what cannot work.
    """

    def __init__(self, llm, draft: Transformer | str, k: int | str):
        if k != "auto" and k not in range(1, MAX_K + 1):
            raise UserError(f"speculate_k is {k!r}; accepted: 1 to {MAX_K}, or auto")
        if isinstance(draft, str) and draft != PROMPT_LOOKUP:
            raise UserError(f"cannot speculate by {draft!r}; accepted: {PROMPT_LOOKUP}, or a draft model")
        self.llm, self.k = llm, k
        self.draft = PromptLookup(llm) if draft == PROMPT_LOOKUP else DraftModel(llm, draft)
        self.model = self.draft.model
        self.limit = torch.zeros_like(llm.pos)  # the last position that each row may reach
        self.step, self.capture = llm._step, lambda step: step  # compile replaces these two and the next
        self.forward = lambda tokens, pos: llm.model(tokens, pos, llm.cache, all_logits=True)
        self.rounds = {i: partial(self._round, i) for i in (AUTO if k == "auto" else (0, k))}
        self.seconds: dict[int, float] = {}  # what a round of k guesses takes
        self.outcomes: list[tuple[int, int]] = []  # k and guesses accepted, of this generation's rounds
        self.stale = 0  # latest plain rounds, whose tokens the draft has not read

    def _round(self, k: int) -> Tensor:
        """Draft, verify, accept, resample, advance. Returns int64 (B, k + 3): how many tokens a row takes, which its
        limit bounds; how many guesses hold; the tokens.
        """
        llm = self.llm
        begin = llm.pos.clone()
        index = begin[:, None] + torch.arange(k + 1, device=begin.device)
        if k == 0:
            self.step()
            accepted = torch.zeros_like(begin)
        else:
            draft_logits = self.draft.propose(k)
            tokens = llm.history.gather(1, index)
            accepted, following = self.accept(self.forward(tokens, begin), tokens[:, 1:], draft_logits)
            llm.history.scatter_(1, index + 1, following)
        taken = torch.minimum(accepted + 1, self.limit - begin)
        llm.pos.copy_(begin + taken)
        return torch.cat((taken[:, None], accepted[:, None], llm.history.gather(1, index + 1)), 1)

    def accept(self, logits: Tensor, guesses: Tensor, draft_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Judge guesses int64 (B, k) by the target's logits fp32 (B, k + 1, V). draft_logits: fp32 (B, k, V) that they
        were drawn from; None if they were not drawn. Returns how many hold (B,), and the tokens (B, k + 1) that follow:
        the guesses that hold, the target's own one, and rubbish.
        """
        llm, sampler = self.llm, self.llm.sampler
        B, k = guesses.shape
        logits = logits.flatten(0, 1)  # (B (k + 1), V)
        if sampler.repetition_penalty != 1.0:
            positions = llm.pos[:, None] + torch.arange(k + 1, device=guesses.device)
            logits = sampler.penalized(logits, llm.history.repeat_interleave(k + 1, 0), positions.flatten())
        if draft_logits is None:  # a guess that was not drawn holds if the target draws it as well
            own = sampler.draw(logits, llm.rng)
        else:
            own = sampler.judge(logits, draft_logits, guesses, llm.rng)
        own = own.view(B, k + 1)
        return (own[:, :k] == guesses).cumprod(1).sum(1), own

    def compile(self, step: Callable[[], None], inductor: bool, capture: Callable | None) -> None:
        """Prepare all rounds, by torch.compile, as CUDA graphs, or both. step: the engine's, before it is captured."""
        self.step, self.capture = step, capture or self.capture
        if inductor:
            self.forward = torch.compile(self.forward, fullgraph=True, dynamic=self.k == "auto")
            if self.model:
                self.draft.step = torch.compile(self.draft.step, fullgraph=True, dynamic=False)
        self.llm.pos.fill_(1)  # a draft looks back by one,
        self.limit.fill_(1)  # and so no row may leave this place
        self.rounds = {k: self.capture(round) for k, round in self.rounds.items()}
        for round in self.rounds.values():
            round()  # now torch.compile does its work
        if self.k == "auto":
            self._time_rounds()

    def _time_rounds(self) -> None:
        self.seconds = {k: self.time(round) for k, round in self.rounds.items()}

    def time(self, step: Callable[[], object]) -> float:
        """Seconds that a step takes, the median of five looks; with several ranks, the first one's."""
        self.limit.copy_(self.llm.pos)  # no row may advance meanwhile; what lies beyond its position counts for nothing
        repeats, times = 10 if self.llm.device.type == "cuda" else 1, []
        for _ in range(5):
            self.llm.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            self.llm.synchronize()
            times.append((time.perf_counter() - start) / repeats)
        return self.llm.model.tp.share(statistics.median(times))

    def prefill(self, start: int, end: int) -> None:
        """Let a draft model read the prompts' positions start..end, and what it has missed before them."""
        if self.model:
            first = max(0, start - self.stale - 1)
            self.draft.read(torch.full_like(self.llm.pos, first), end - first)
        self.stale = 0

    @torch.inference_mode()
    def decode(self, steps: int, live: list[bool]) -> Iterator[list[int]]:
        """As Engine.decode. Rows accept different lengths: a step's tokens come when all live rows have theirs."""
        llm = self.llm
        if self.k == "auto" and not self.seconds:
            self._time_rounds()
        self.outcomes = []
        self.limit.copy_(llm.pos + steps)
        queues = [deque(row) for row in llm.history.gather(1, llm.pos[:, None]).tolist()]
        pending: deque[tuple[int, Tensor, Callable[[], None]]] = deque()
        ahead = 2 if llm.device.type == "cuda" else 1  # one round runs while the host reads the one before
        for _ in range(steps + 1):
            while not all(queue or not alive for queue, alive in zip(queues, live)):
                while len(pending) < ahead:
                    pending.append(self._launch())
                k, result, wait = pending.popleft()
                wait()
                for queue, (taken, accepted, *tokens) in zip(queues, result.tolist()):
                    queue.extend(tokens[:taken])
                    if taken:
                        self.outcomes.append((k, accepted))
            yield [queue.popleft() if queue else 0 for queue in queues]

    def _launch(self) -> tuple[int, Tensor, Callable[[], None]]:
        k = self._choose()
        if self.model is None:
            # Verifying costs more on a CPU, and a look nothing: one token that recurs is too little to go by.
            if self.llm.device.type == "cpu" and not (find(self.llm.history, self.llm.pos)[1] > 1).any():
                k = 0
        elif k and self.stale:
            self.draft.read((self.llm.pos - self.stale - 1).clamp(min=0), self.stale)
        self.stale = 0 if k else self.stale + 1
        return k, *self.llm.to_host(self.rounds[k]())

    def _choose(self) -> int:
        """The k that promises most tokens a second by the acceptance and the costs measured."""
        if self.k != "auto":
            return self.k
        recent = self.outcomes[-RECENT * self.llm.batch_size :]
        chance, reach, tokens = 0.9, 1.0, [1.0]  # tokens that a round of k brings, by k
        for i in range(MAX_K):
            held, failed = sum(n > i for _, n in recent), sum(k > i == n for k, n in recent)
            chance = (held + chance) / (held + failed + 1)  # a place not tried lately is as good as the one before
            reach *= chance
            tokens.append(tokens[-1] + reach)
        return max(self.rounds, key=lambda k: tokens[k] / self.seconds[k])

    def work_per_token(self) -> tuple[float, float]:
        """Passes of the target, and of the draft, for each token of the last generation."""
        tokens = max(1, sum(accepted + 1 for _, accepted in self.outcomes))
        return len(self.outcomes) / tokens, sum(k for k, _ in self.outcomes) / tokens

    @torch.inference_mode()
    def report(self, tokens_per_second: float) -> dict:
        """What speculation did in the last generation, which made so many tokens a second a row, and what it was worth.

        Times plain decoding and the parts of a round where the text ends now.
        """
        llm = self.llm
        used = Counter(k for k, _ in self.outcomes)
        tries = [sum(k > i for k, _ in self.outcomes) for i in range(max(used, default=0))]
        holds = [sum(accepted > i for _, accepted in self.outcomes) for i in range(len(tries))]
        usual = max((k for k in used if k), key=used.get, default=max(self.rounds))
        fed = llm.history.gather(1, llm.pos[:, None] + torch.arange(usual + 1, device=llm.device))
        parts = {
            "plain": lambda: (llm._step(), llm.pos.sub_(1)),
            "round": self.rounds[usual],
            "draft": self.capture(partial(self.draft.propose, usual)),
            "verify": self.capture(partial(self.forward, fed, llm.pos)),
        }
        ms = {f"{name}_ms": 1e3 * self.time(step) for name, step in parts.items()}
        return {
            "k": self.k,
            "rounds_by_k": dict(sorted(used.items())),
            "tokens_per_round": 1 / self.work_per_token()[0] if used else 0.0,
            "mean_accepted": sum(holds) / tries[0] if tries else 0.0,
            "acceptance_by_position": [held / tried for held, tried in zip(holds, tries)],
            "timed_k": usual,
            **ms,
            "overhead_ms": ms["round_ms"] - ms["draft_ms"] - ms["verify_ms"],
            "plain_tokens_per_second": 1e3 / ms["plain_ms"],
            "speedup": tokens_per_second * ms["plain_ms"] / 1e3,
        }


def summary(r: dict) -> str:
    """A report in words, with advice where speculation did not pay."""
    lines = [
        f"Speculation: {r['tokens_per_round']:.2f} tokens a round, {r['mean_accepted']:.2f} guesses accepted, "
        f"by position {' '.join(f'{a:.2f}' for a in r['acceptance_by_position']) or 'none'}",
        f"A round of {r['timed_k']}: {r['round_ms']:.2f} ms, draft {r['draft_ms']:.2f}, verify {r['verify_ms']:.2f}, "
        f"overhead {r['overhead_ms']:.2f}; a plain step: {r['plain_ms']:.2f} ms",
        f"Speed-up over plain decoding ({r['plain_tokens_per_second']:.2f} tokens/sec, same run): {r['speedup']:.2f} x",
    ]
    if r["speedup"] < 1:
        change = "a cheaper draft" if r["draft_ms"] > r["verify_ms"] else "a draft closer to the target"
        lines.append(f"Speculation made this slower. Try {change}, another --speculate_k (or auto), or none.")
    return "\n".join(lines)
