"""A reader of PTX, for tests without a GPU."""

import re
from collections.abc import MutableMapping

import numpy as np


class Warp:
    """Lanes, 32 of them but where none asks for another's, that run PTX line by line, all of them together: as much of
    it as experts_choice.py and warps.py write. Registers are int64, with 32 bits as int32 has them, or predicates.

    memory: what addresses, in bytes, hold, as int32; a load calls `on_load` first.
    """

    def __init__(self, memory: MutableMapping[int, int], on_load=lambda: None, lanes: int = 32):
        self.memory, self.on_load, self.lanes = memory, on_load, lanes
        self.registers = {"%laneid": np.arange(lanes)}

    def run(self, text: str, **operands) -> dict[str, np.ndarray]:
        """Operands are $0, $1, ..., named o0, o1, ...; the registers afterwards."""
        self.registers |= {f"${n[1:]}": np.broadcast_to(np.int64(value), self.lanes) for n, value in operands.items()}
        lines = [line.strip() for line in re.sub(r"[{}]", " ", text).replace("again:", "again: ;").split(";")]
        lines = [line for line in lines if line and not line.startswith((".reg", ".shared"))]
        at = 0
        while at < len(lines):
            predicate, code, rest = re.fullmatch(r"(?:@(!?\w+) )?(\S+)\s*(.*)", lines[at]).groups()
            on = np.ones(self.lanes, bool)
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
            self.registers[name] = np.full(self.lanes, number - (number >> 31 << 32) if number > 0 else number)
        return self.registers[name]

    def _address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[]").partition("+")
        return self._value(base) + int(offset or 0)

    def _step(self, code: list[str], arguments: list[str], on: np.ndarray) -> None:
        name = code[1] if code[0] == "setp" else code[0]
        if name == "st":
            at = self._address(arguments[0])
            assert not (at[on] % (4 * len(arguments[1:]))).any()  # a vector's alignment
            for i, value in enumerate(map(self._value, arguments[1:])):
                self.memory.update(zip((at[on] + 4 * i).tolist(), value[on].tolist()))
            return
        if name == "ld":
            self.on_load()
            at, names = self._address(arguments[-1]), arguments[:-1]
            assert not (at % (4 * len(names))).any()  # a vector's alignment
            for i, name in enumerate(names):
                self._set(name, np.array([self.memory.get(word + 4 * i, 0) for word in at.tolist()]), on)
            return
        if name == "shfl":
            value, lane = self._value(arguments[1]), self._value(arguments[2])
            value = value[np.arange(32) ^ lane if "bfly" in code else lane]
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
        self._set(arguments[0], value, on)

    def _set(self, name: str, value: np.ndarray, on: np.ndarray) -> None:
        self.registers[name] = np.where(on, value, self.registers.get(name, np.zeros(self.lanes, value.dtype)))


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
    "shl": np.left_shift,
    "shr": np.right_shift,
    "lop3": lambda a, b, c, _: a & b | c,  # 0xea
    "lt": np.less,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
