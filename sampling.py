"""How the next token is drawn: a Sampler is a value, and what it says is computed by ops."""

from dataclasses import dataclass

import torch
from torch import Tensor

import ops
from errors import UserError, shown


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn. temperature 0 is argmax; the filters apply in the order of the fields."""

    repetition_penalty: float = 1.0  # CTRL's (arXiv 1909.05858), over the prompt and the answer
    temperature: float = 0.8
    top_k: int | None = 200  # 0 or None: all
    top_p: float | None = None  # nucleus sampling (arXiv 1904.09751)
    min_p: float | None = None  # tokens at least min_p times as likely as the likeliest (arXiv 2407.01082)

    def __post_init__(self):
        for name, value, low, high in (
            ("temperature", self.temperature, 0, 100),
            ("top_k", self.top_k or None, 1, 2**31 - 1),
            ("top_p", self.top_p, 1e-9, 1),
            ("min_p", self.min_p, 0, 1),
            ("repetition_penalty", self.repetition_penalty, 1e-3, 100),
        ):
            if value is not None and not low <= value <= high:
                off = ", or 0 for all" if name == "top_k" else ""
                raise UserError(f"{name} is {shown(value)}; accepted: {low} to {high}{off}")
        if self.temperature < 1e-6:  # by which no logits could be divided
            object.__setattr__(self, "temperature", 0.0)

    def __call__(self, logits: Tensor, history: Tensor, pos: Tensor, rng: Tensor) -> Tensor:
        """Draw a token for each row, write it behind the row's position and advance that. logits: fp32 (B, V); history:
        (B, T) int64, tokens known at positions 0..pos; pos: (B,) int64; rng: int64 (2,), seed and offset, which
        advances. Returns (B,) int64.
        """
        return self.draw(self.penalized(logits, history, pos), rng, history, pos)

    def penalized(self, logits: Tensor, history: Tensor, pos: Tensor) -> Tensor:
        """The logits after the repetition penalty; arguments and result as above."""
        if self.repetition_penalty == 1.0:
            return logits
        known = torch.arange(history.shape[1], device=history.device) <= pos[:, None]
        index = torch.where(known, history, history[:, :1])
        score = logits.gather(1, index)
        score = torch.where(score < 0, score * self.repetition_penalty, score / self.repetition_penalty)
        return logits.scatter(1, index, score)

    def draw(self, logits: Tensor, rng: Tensor, history: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """Draw a token (B,) for each row of penalised logits (B, V); see ops.sample."""
        top_k, min_p = self.top_k or 0, self.min_p or 0.0
        if (self.top_p or 1) < 1 and self.temperature > 0:  # the threshold is that of all filters
            logits, top_k, min_p = logits.masked_fill(logits < self._threshold(logits), -torch.inf), 0, 0.0
        return ops.sample(logits, self.temperature, top_k, min_p, rng, history, pos)

    def verify(self, logits: Tensor, draft_logits: Tensor, draft_tokens: Tensor, rng: Tensor) -> Tensor:
        """Verify draft tokens int64 (B, k), drawn by `draw` from draft_logits (B, k, V), by penalised logits
        (B (k + 1), V): int64 (B, k + 1), each one or what is drawn in its place, and a token that follows them.
        Temperature > 0.
        """
        both = torch.cat((logits, draft_logits.flatten(0, 1)))
        return ops.verify(both, self._threshold(both), draft_tokens, self.temperature, rng)

    def _threshold(self, logits: Tensor) -> Tensor:
        """The smallest logit (B, 1) that the filters keep: min_p's, top_k's, and top_p's among the top_k, sorted."""
        least = ops.logit_threshold(logits, self.temperature, self.top_k or 0, self.min_p or 0.0)
        if (self.top_p or 1) < 1:
            values = torch.topk(logits, min(self.top_k or logits.shape[1], logits.shape[1])).values
            probs = torch.softmax(values / self.temperature, -1)
            outside = probs.cumsum(-1) - probs >= self.top_p  # the token that crosses top_p is not; nor is NaN
            last = values.shape[1] - 1 - outside.sum(-1, keepdim=True)
            least = torch.maximum(least, values.gather(1, last))
        return least
