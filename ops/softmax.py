"""What both attention kernels make of a product of a query and a key: scores in units of log2 e, as exp2 takes them.

Scores are scale x, or with a soft cap cap tanh(scale x / cap) (Gemma 2, arXiv:2408.00118). A sink is a logit of each
head that takes part in the softmax's denominator alone (gpt-oss, arXiv:2508.10925).
"""

import math

from ops.common import tl, triton

LOG2_E = math.log2(math.e)


def constants(scale: float, soft_cap: float) -> tuple[float, float | None]:
    """`scale` and `cap` as `scores` wants them."""
    return (2 * LOG2_E * scale / soft_cap, LOG2_E * soft_cap) if soft_cap else (LOG2_E * scale, None)


if triton is None:
    scores = sinks_of = with_sink = None
else:

    @triton.jit
    def scores(products, scale, cap):
        """Scores of products q k. The tanh is exact to fp32's precision, which tanh.approx is not."""
        out = products * scale
        if cap is not None:
            out = cap - 2.0 * cap / (tl.exp2(out) + 1.0)
        return out

    @triton.jit
    def sinks_of(sinks, heads, mask):
        """The sinks of `heads` in units of log2 e, if there are any."""
        found = 0.0
        if sinks is not None:
            found = tl.load(sinks + heads, mask=mask, other=0.0).to(tl.float32) * 1.4426950408889634
        return found

    @triton.jit
    def with_sink(l, m, sink):
        """The denominator l, in units of exp2(m), with what sinks add to it."""
        return l + tl.exp2(sink - tl.where(m == float("-inf"), 0.0, m))
