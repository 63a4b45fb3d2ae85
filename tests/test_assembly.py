"""The kernels' PTX that unpacks weights, run by a small reader of it: no GPU, nor the interpreter, sees it in CI."""

import re

import numpy as np
import pytest
import torch
from ptx import Warp

from ops import linear_gemm, linear_products, unpacking
from ops.packing import E2M1

pytest.importorskip("triton", reason="the kernels need Triton")
MASK = 0xFFFFFFFF


def halves(words: torch.Tensor) -> torch.Tensor:
    """Words (n,) as pairs of bf16, in fp64 (n, 2)."""
    return torch.stack((words & 0xFFFF, words >> 16), 1).to(torch.uint16).view(torch.bfloat16).double()


def joined(values: torch.Tensor) -> torch.Tensor:
    low, high = values.bfloat16().view(torch.uint16).long().unbind(1)
    return low | high << 16


def prmt(a: torch.Tensor, b: torch.Tensor, select: torch.Tensor) -> torch.Tensor:
    table, out = a | b << 32, torch.zeros_like(select)
    for i in range(4):
        nibble = select >> 4 * i & 15
        byte = table >> 8 * (nibble & 7) & 255
        out |= torch.where(nibble > 7, (byte >> 7) * 255, byte) << 8 * i
    return out


def lop3(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, rule: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(a)
    for i in range(8):
        if int(rule[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def from_e4m3(pair: torch.Tensor) -> torch.Tensor:
    half = torch.stack((pair & 255, pair >> 8), 1).to(torch.uint8).view(torch.float8_e4m3fn).half()
    low, high = half.view(torch.uint16).long().unbind(1)
    return low | high << 16


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "cvt.rn.f16x2.e4m3x2": from_e4m3,
    "mul.rn.bf16x2": lambda a, b: joined(halves(a) * halves(b)),
    "fma.rn.bf16x2": lambda a, b, c: joined(halves(a) * halves(b) + halves(c)),
}


def execute(assembly: str, outputs: int, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What it makes of unsigned words (n,), int64: inputs follow the outputs in number."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(operand: str) -> torch.Tensor:
        return registers[operand] if operand in registers else torch.full_like(inputs[0], int(operand, 0))

    for line in assembly.strip("{} ").split(";"):
        if (line := line.strip()) and not line.startswith(".reg"):
            name, operands = line.split(None, 1)
            if operands.startswith("{"):  # a word's halves
                low, high, word = re.findall(r"[$\w]+", operands)
                registers |= {low: value(word) & 0xFFFF, high: value(word) >> 16}
                continue
            to, *rest = re.split(r",\s*", operands)
            registers[to] = OPERATIONS[name](*map(value, rest)) & MASK
    return [registers[f"${i}"] for i in range(outputs)]


def words(count: int) -> tuple[torch.Tensor, ...]:
    return torch.randint(0, 2**32, (count, 999), generator=torch.Generator().manual_seed(count)).unbind()


def nibbles(word: torch.Tensor) -> torch.Tensor:
    """Nibbles a and a + 4 beside each other (n, a, 2)."""
    return (word[:, None] >> torch.arange(0, 32, 4) & 15).view(-1, 2, 4).transpose(1, 2)


def of_bytes(word: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (word[:, None] >> torch.arange(0, 32, 8) & 255).to(torch.uint8).view(dtype).double().view(-1, 2, 2)


@pytest.mark.parametrize(
    "kind,small", [("int8", False), ("fp8", False), ("fp8", True), ("int4", True), ("mxfp4", True)]
)
def test_words_become_pairs_of_bf16(kind, small):
    """See unpacking.unpack for the units."""
    inputs, pairs = words(2), 4 if kind in ("int4", "mxfp4") else 2
    found = execute(unpacking.assembly(kind, small), 2 * pairs, *inputs)
    for word, own in zip(inputs, (found[:pairs], found[pairs:])):
        if kind == "int4":
            expected = nibbles(word) * torch.tensor([2.0**-133, 2.0**-129] * 2, dtype=torch.float64)[:, None]
        elif kind == "mxfp4":
            expected = E2M1.double()[nibbles(word)] * 2.0**-126
        else:
            expected = of_bytes(word, {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind])
            expected /= 64 if kind == "int8" else 2.0**120 if small else 1
        same = torch.stack([halves(pair) for pair in own], 1)
        assert torch.equal(same[expected.isfinite()], expected[expected.isfinite()])  # fp8 has NaN


def test_fp8_for_one_row():
    inputs = words(2)
    found = execute(unpacking.FP8_HALVES.value, 4, *inputs)
    for word, own in zip(inputs, (found[:2], found[2:])):
        expected = of_bytes(word, torch.float8_e4m3fn)
        same = torch.stack([torch.stack((x & 0xFFFF, x >> 16), 1).to(torch.uint16).view(torch.half) for x in own], 1)
        torch.testing.assert_close(same.double(), expected, rtol=0, atol=0, equal_nan=True)


def test_parts_of_one_row_reach_their_columns():
    """Lanes are 4 i + j, of which lane i has part i of x, and lane j columns 2 j and 2 j + 1 of products."""
    lane = np.arange(32)
    own = Warp({}).run(linear_products.OF_PART.value, o1=lane // 4)
    assert (own["$0"] == lane % 4 * 2).all()
    both = Warp({}).run(linear_products.OF_COLUMNS.value, o2=lane // 4)
    assert (both["$0"] == lane % 4 * 2).all() and (both["$1"] == lane % 4 * 2 + 1).all()


def test_int4_for_one_row():
    (word,) = words(1)
    for e, found in enumerate(execute(linear_products.INT4_BYTES.value, 2, word)):
        values = (found[:, None] >> torch.arange(0, 32, 8) & 255).to(torch.uint8).view(torch.int8)
        assert torch.equal(values.long(), 16 * ((word[:, None] >> torch.arange(4 * e, 32, 8) & 15) - 8))


def test_mxfp4_for_one_row_and_for_many():
    (word,) = words(1)
    low, high = execute(linear_products.E2M1_BYTES.value, 2, word)
    expected = 16 + 2 * E2M1[nibbles(word)]  # (n, a, e)
    for e, found in enumerate((low, high)):
        assert torch.equal((found[:, None] >> torch.arange(0, 32, 8) & 255).float(), expected[..., e])

    inputs, exponents = words(2), torch.randint(1, 248, (2, 999), generator=torch.Generator().manual_seed(3))
    scales = (exponents + 6) * 0x00800080  # as linear_gemm.weights makes them
    found = execute(linear_gemm.assembly("mxfp4", torch.uint8, torch.bfloat16, True), 8, *inputs, *scales)
    for word, exponent, own in zip(inputs, exponents, (found[:4], found[4:])):
        expected = E2M1.double()[nibbles(word)] * 2.0 ** (exponent.double() - 127)[:, None, None]
        assert torch.equal(torch.stack([halves(pair) for pair in own], 1), expected)


def test_int4_for_many_rows():
    inputs, generator = words(2), torch.Generator().manual_seed(4)
    scale, zero = torch.randn(2, 2, 999, generator=generator).bfloat16().double()
    pairs = [joined(torch.stack(own, 1)) for own in zip(scale, zero)]
    found = execute(linear_gemm.assembly("int4", torch.bfloat16, torch.bfloat16, True), 8, *inputs, *pairs)
    for word, s, z, own in zip(inputs, scale, zero, (found[:4], found[4:])):
        expected = (nibbles(word) - 8) * s[:, None, None] + z[:, None, None]
        error = torch.stack([halves(pair) for pair in own], 1) - expected
        assert (error.abs() <= expected.abs() * 2**-8).all()
