"""What sampling should give, by definition, and how far off a sample is."""

from collections import Counter

import torch
from torch import Tensor

from sampling import Sampler


def filtered(logits: Tensor, sampler: Sampler) -> Tensor:
    """Probabilities of logits (V,) by the definitions of the filters, one at a time, in float64."""
    probs = torch.softmax(logits.double() / sampler.temperature, -1)
    if sampler.top_k:
        probs[torch.argsort(-probs)[sampler.top_k :]] = 0
        probs /= probs.sum()
    if sampler.top_p:
        order = torch.argsort(-probs)
        probs[order[probs[order].cumsum(0) - probs[order] >= sampler.top_p]] = 0
        probs /= probs.sum()
    if sampler.min_p:
        probs[probs < sampler.min_p * probs.max()] = 0
    return probs / probs.sum()


def chi_square(counts: Counter, expected: dict[object, float]) -> float:
    """The statistic over its cells, in standard deviations above its mean; rare cells are thrown together."""
    total = counts.total()
    cells = [(counts[key], total * p) for key, p in expected.items() if p > 0]
    assert sum(count for count, _ in cells) == total  # nothing impossible was drawn
    rare = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5]
    if rare:
        cells.append(tuple(map(sum, zip(*rare))))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    degrees = len(cells) - 1
    return (statistic - degrees) / (2 * degrees) ** 0.5
