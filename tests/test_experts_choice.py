"""The PTX by which one row's experts are found, value by value, on a warp that is Python's."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ops import experts_choice


class Warp:
    """32 lanes that run PTX line by line, all of them together: as much of it as experts_choice.py writes. Registers
    are int64, with 32 bits as int32 has them, or predicates.

    memory: what addresses, in bytes, hold, as int32; a load calls `on_load` first.
    """

    def __init__(self, memory: dict[int, int], on_load=lambda: None):
        self.memory, self.on_load, self.registers = memory, on_load, {"%laneid": np.arange(32)}

    def run(self, text: str, **operands) -> dict[str, np.ndarray]:
        """Operands are $0, $1, ..., named o0, o1, ...; the registers afterwards."""
        self.registers |= {f"${name[1:]}": np.broadcast_to(np.int64(value), 32) for name, value in operands.items()}
        lines = [line.strip() for line in re.sub(r"[{}]", " ", text).replace("again:", "again: ;").split(";")]
        lines = [line for line in lines if line and not line.startswith(".reg")]
        at = 0
        while at < len(lines):
            predicate, code, rest = re.fullmatch(r"(?:@(!?\w+) )?(\S+)\s*(.*)", lines[at]).groups()
            on = np.ones(32, bool)
            if predicate:
                on = self.registers[predicate.lstrip("!")] != predicate.startswith("!")
            at += 1
            if code == "bra":
                assert on.all() or not on.any()  # lanes stay together
                at = lines.index(f"{rest}:") if on.all() else at
            elif code not in ("again:", "fence.acq_rel.gpu"):
                self._step(code.split("."), [part.strip() for part in rest.split(",")], on)
        return self.registers

    def _value(self, name: str) -> np.ndarray:
        if name not in self.registers:
            number = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
            self.registers[name] = np.full(32, number - (number >> 31 << 32) if number > 0 else number)
        return self.registers[name]

    def _address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[]").partition("+")
        return self._value(base) + int(offset or 0)

    def _step(self, code: list[str], arguments: list[str], on: np.ndarray) -> None:
        name = code[1] if code[0] == "setp" else code[0]
        if name == "st":
            at, values = self._address(arguments[0]), self._value(arguments[1])
            self.memory |= dict(zip(at[on].tolist(), values[on].tolist()))
            return
        if name == "ld":
            self.on_load()
            value = np.array([self.memory.get(at, 0) for at in self._address(arguments[1]).tolist()])
        elif name == "shfl":
            value = self._value(arguments[1])[np.arange(32) ^ int(arguments[2])]
        elif name == "redux":
            value = self._value(arguments[1])
            value = np.full(32, value.max() if "max" in code else np.bitwise_or.reduce(value))
        else:
            inputs = [self._value(argument) for argument in arguments[1 : 3 if code[0] == "setp" else None]]
            if code[-1] == "f32":
                inputs = [value.astype(np.int32).view(np.float32) for value in inputs]
            with np.errstate(invalid="ignore"):
                value = OPERATIONS[name](*inputs)
            if value.dtype == np.float32:
                value = value.view(np.int32).astype(np.int64)
            elif value.dtype != bool and name != "mad":
                value = value.astype(np.int32).astype(np.int64)
            elif code[0] == "setp" and "and" in code:
                value = value & self.registers[arguments[3]]
        self.registers[arguments[0]] = np.where(on, value, self.registers.get(arguments[0], np.zeros(32, value.dtype)))


OPERATIONS = {
    "mov": lambda a: a,
    "mad": lambda a, b, c: a * b + c,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "ex2": np.exp2,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shr": np.right_shift,
    "lop3": lambda a, b, c, _: a & b | c,  # 0xea
    "lt": np.less,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
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
