"""The PTX by which one row's experts are found, value by value, on a warp that is Python's."""

from types import SimpleNamespace

import pytest
import torch
from ptx import Warp

from ops import experts_choice

BOARD, USED, WEIGHTS = 1 << 20, 2 << 20, 3 << 20


def found(scores: torch.Tensor, top: int, renormalize: bool, program: int = 0) -> SimpleNamespace:
    """What a warp makes of scores fp32 (E,), of which one arrives with each of its loads."""
    E, experts = len(scores), 1 << (len(scores) - 1).bit_length()
    words = (scores.view(torch.int32) & -experts & -2).tolist()
    memory = {BOARD + 4 * e: 1 for e in range(E)}
    arriving = iter(range(E))

    def arrive() -> None:
        if (e := next(arriving, None)) is not None:
            memory[BOARD + 4 * e] = words[e]

    warp = Warp(memory, arrive)
    chosen = warp.run(experts_choice.choice(top, experts, E), o3=BOARD)
    keys, ours, greatest = (chosen[f"${i}"] for i in range(3))
    rest = {"o1": keys, "o2": ours, "o3": greatest, "o4": USED, "o5": WEIGHTS, "o6": program}
    weights = Warp(memory).run(experts_choice.shares(top, experts, renormalize), **rest)["$0"]
    weights = torch.from_numpy(weights).int().view(torch.float32)
    left = torch.tensor(words, dtype=torch.int32).view(torch.float32)
    return SimpleNamespace(experts=experts - 1 - (keys & (experts - 1)), weights=weights, memory=memory, scores=left)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("E,top", [(3, 3), (8, 2), (32, 4), (40, 32), (128, 8), (257, 8)])
def test_a_warp_finds_the_greatest_scores(E, top, renormalize):
    """Of equal ones the first, negative ones too, and a NaN last."""
    scores = torch.randn(E) - 1
    scores[: E // 3] = scores.max()
    if top < E:
        scores[-1] = float("nan")
    warp = found(scores, top, renormalize)
    known = warp.scores.nan_to_num(nan=-torch.inf)
    index = known.sort(descending=True, stable=True).indices[:top]
    expected = known.softmax(-1)[index]
    expected = expected / expected.sum() if renormalize else expected
    assert warp.experts[:top].tolist() == index.tolist()
    torch.testing.assert_close(warp.weights[:top], expected, atol=1e-6, rtol=1e-5)
    assert not warp.weights[top:].any()
    memory = warp.memory
    assert [memory[USED + 4 * i] for i in range(top + 1)] == [top, *index.tolist()]
    stored = torch.tensor([memory[WEIGHTS + 4 * i] for i in range(top)], dtype=torch.int32).view(torch.float32)
    assert torch.equal(stored, warp.weights[:top])


def test_one_program_writes_what_down_reads():
    assert not {USED, WEIGHTS} & set(found(torch.randn(8), 2, True, program=1).memory)


def test_a_warp_s_lanes_are_enough():
    assert experts_choice.supports(1, 32) and not experts_choice.supports(1, 33) and not experts_choice.supports(2, 8)
