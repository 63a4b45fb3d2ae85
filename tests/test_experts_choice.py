"""The PTX by which one row's experts are found, value by value, on a warp that is Python's."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ops import experts_choice


class Warp:
    """32 lanes that run PTX line by line, all of them together: as much of it as experts_choice.py writes. Registers
    are int64, with 32 bits as int32 has them, or predicates. memory: what addresses, in bytes, hold, alike."""

    def __init__(self, memory: dict[int, int]):
        self.memory, self.registers = memory, {"%laneid": np.arange(32)}

    def run(self, text: str, **operands) -> dict[str, np.ndarray]:
        """Operands are $0, $1, ..., named o0, o1, ...; the registers afterwards."""
        self.registers |= {f"${name[1:]}": np.broadcast_to(np.int64(value), 32) for name, value in operands.items()}
        lines = [line.strip() for line in re.sub(r"[{}]", " ", text).split(";")]
        for line in lines:
            if not line or line.startswith(".reg"):
                continue
            predicate, code, rest = re.fullmatch(r"(?:@(!?\w+) )?(\S+)\s*(.*)", line).groups()
            on = np.ones(32, bool)
            if predicate:
                on = self.registers[predicate.lstrip("!")] != predicate.startswith("!")
            if code != "fence.acq_rel.gpu":
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
            value = np.array([self.memory.get(at, 0) for at in self._address(arguments[1]).tolist()])
        elif name == "shfl":
            value = self._value(arguments[1])[np.arange(32) ^ int(arguments[2])]
        elif name == "redux":
            value = self._value(arguments[1])
            value = np.full(32, value.max() if "max" in code else np.bitwise_or.reduce(value))
        else:
            inputs = [self._value(argument) for argument in arguments[1 : 3 if code[0] == "setp" else None]]
            if code[-1] == "f32":  # but a conversion's
                inputs = [value.astype(np.int32).view(np.float32) for value in inputs]
            with np.errstate(invalid="ignore"):
                value = OPERATIONS[name](*inputs)
            if value.dtype == np.float32:
                value = value.view(np.int32).astype(np.int64)
            elif value.dtype != bool and name != "mad" and "64" not in code[-1]:
                value = value.astype(np.int32).astype(np.int64)
            elif code[0] == "setp" and "and" in code:
                value = value & self.registers[arguments[3]]
        self.registers[arguments[0]] = np.where(on, value, self.registers.get(arguments[0], np.zeros(32, value.dtype)))


OPERATIONS = {
    "mov": lambda a: a,
    "mad": lambda a, b, c: a * b + c,
    "cvt": lambda a: a.astype(np.float32),
    "fma": lambda a, b, c: a * b + c,
    "rsqrt": lambda a: 1 / np.sqrt(a),
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
SUMS, SHIFTS, USED, WEIGHTS = (i << 20 for i in range(1, 5))
C, EPS = 96, 1e-5


def bits(x: torch.Tensor) -> list[int]:
    return x.view(torch.int32).tolist()


def found(scores: torch.Tensor, x: torch.Tensor, biased: bool, top: int, renormalize: bool, program: int = 0):
    """What a warp makes of scores fp32 (E,), those of x (C,) before its norm, each in as many parts as there are."""
    E, experts = len(scores), 1 << (len(scores) - 1).bit_length()
    units = (torch.tensor(unit, dtype=torch.float64) for unit in (experts_choice.SMALL, experts_choice.LARGE))
    sums = [scores.double() / experts_choice.UNIT, *((x.double() ** 2).sum()[None] / unit for unit in units)]
    sums = torch.cat(sums).clamp(max=2.0**62).long()
    parts = torch.stack((sums // 3, sums - sums // 3))
    memory = {SUMS + 8 * i: value for i, value in enumerate(parts.flatten().tolist())}
    shifts = torch.randn(E) if biased else torch.zeros(E)
    memory |= {SHIFTS + 4 * e: value for e, value in enumerate(bits(shifts))}
    text = experts_choice.choice(top, experts, E, C, biased)
    chosen = Warp(memory).run(text, o3=SUMS, o4=SHIFTS, o5=bits(torch.tensor([EPS]))[0])
    keys, ours, greatest = (chosen[f"${i}"] for i in range(3))
    rest = {"o1": keys, "o2": ours, "o3": greatest, "o4": USED, "o5": WEIGHTS, "o6": program}
    weights = Warp(memory).run(experts_choice.shares(top, experts, renormalize), **rest)["$0"]
    logits = scores * torch.rsqrt((x.double() ** 2).mean() + EPS).float() + shifts
    logits = (logits.view(torch.int32) & -experts).view(torch.float32)
    weights = torch.from_numpy(weights).int().view(torch.float32)
    return SimpleNamespace(experts=experts - 1 - (keys & (experts - 1)), weights=weights, memory=memory, logits=logits)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("E,top,size", [(3, 3, 1), (8, 2, 1e-3), (32, 4, 1), (40, 32, 1e3), (128, 8, 1), (257, 8, 100)])
def test_a_warp_finds_the_greatest_scores(E, top, size, renormalize):
    """Of equal ones the first, negative ones too, of small and of large x."""
    biased = renormalize and E % 2 == 0
    scores, x = (torch.randn(E) - 1) * size, torch.randn(C) * size
    scores[: E // 3] = scores.max()
    warp = found(scores, x, biased, top, renormalize)
    index = warp.logits.sort(descending=True, stable=True).indices[:top]
    assert (warp.logits[index] - warp.logits[warp.experts[:top]]).abs().max() < 1e-3  # rounded otherwise
    assert len(set(warp.experts[:top].tolist())) == top and (biased or warp.experts[:top].tolist() == index.tolist())
    index = torch.from_numpy(warp.experts[:top])
    expected = warp.logits.softmax(-1)[index]
    expected = expected / expected.sum() if renormalize else expected
    torch.testing.assert_close(warp.weights[:top], expected, atol=1e-4, rtol=1e-3)
    assert not warp.weights[top:].any()
    memory = warp.memory
    assert [memory[USED + 4 * i] for i in range(top + 1)] == [top, *index.tolist()]
    assert [memory[WEIGHTS + 4 * i] for i in range(top)] == bits(warp.weights[:top])


def test_one_program_writes_what_down_reads():
    assert not {USED, WEIGHTS} & set(found(torch.randn(8), torch.randn(C), False, 2, True, program=1).memory)
