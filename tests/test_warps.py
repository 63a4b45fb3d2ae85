"""What warps leave for each other in shared memory: its PTX, run in the interpreter by a small reader, which also asks
for a barrier between what is written and what is read."""

import re

import numpy as np
import pytest
import torch

from ops import attention_triton, linear_products, warps

triton = pytest.importorskip("triton", reason="the kernels need Triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("other tests run these kernels on the GPU itself", allow_module_level=True)


class Program:
    """Shared memory, and which of its words the last barrier is behind."""

    meets, asked = True, 0

    def begin(self) -> None:
        self.words, self.boxes, self.written, self.read = np.zeros(0, np.float32), {}, set(), set()

    def barrier(self, *_) -> None:
        if self.meets:
            self.written.clear()
            self.read.clear()

    def at(self, address: np.ndarray, size: int = 1) -> list:
        assert (address % (4 * size) == 0).all() and (address >= 0).all()
        assert (address // 4 + size <= len(self.words)).all()
        return [address // 4 + i for i in range(size)]

    def run(self, assembly: str, *inputs: np.ndarray) -> np.ndarray:
        """Inputs of one shape: the output, $0."""
        if found := re.search(r"\.b32 box\[(\d+)\]", assembly):
            self.asked += 1
            if (size := int(found[1])) not in self.boxes:
                self.boxes[size] = -(-len(self.words) // 4) * 16
                self.words = np.append(self.words, np.full(-len(self.words) % 4 + size, np.nan, np.float32))
            return np.int32(self.boxes[size])
        registers = {f"${i + 1}": value for i, value in enumerate(np.broadcast_arrays(*inputs))}
        for line in re.sub(r"^\{|\}$", "", assembly.strip()).split(";"):
            if not (line := line.strip()) or line.startswith(".reg"):
                continue
            predicate, code, rest = re.fullmatch(r"(?:@(\w+) )?(\S+) (.*)", line).groups()
            group = re.match(r"\{(.*?)\}, (.*)", rest)
            to, *others = [group[1].split(", "), group[2]] if group else rest.split(", ")
            if code.startswith("ld.shared"):
                to = to if group else [to]
                base, _, offset = others[0].strip("[]").partition("+")
                for name, at in zip(to, self.at(registers[base] + int(offset or 0), len(to)), strict=True):
                    assert not self.written & set(at.flat), "no barrier before reading"
                    self.read |= set(at.flat)
                    registers[name] = self.words[at]
            elif code == "st.shared.b32":
                on = registers[predicate]
                at = self.at(registers[to.strip("[]")][on])[0]
                assert not self.read & set(at.flat), "no barrier before writing again"
                self.written |= set(at.flat)
                self.words[at] = registers[others[0]][on].view(np.float32)
            elif code == "setp.ne.s32":
                registers[to] = registers[others[0]] != int(others[1])
            elif code == "add.f32":
                registers[to] = registers[others[0]] + registers[others[1]]
            else:
                assert code.startswith("mov")
                registers[to] = registers[others[0]] if others[0] in registers else np.int32(others[0])
        return registers["$0"]


@pytest.fixture
def program(monkeypatch) -> Program:
    program, begin = Program(), interpreter.InterpreterBuilder.set_grid_idx

    def set_grid_idx(builder, *index) -> None:
        program.begin()
        begin(builder, *index)

    class Call:
        def __init__(self, handle):
            self.get_result = lambda i: handle

    def create_inline_asm(builder, assembly, constraints, values, types, pure, pack) -> Call:
        kind = tl.float32 if constraints.startswith("=f") else tl.int32
        inputs = [value.data.astype(np.int32) if value.data.dtype == bool else value.data for value in values]
        shape = np.broadcast_shapes(*(x.shape for x in inputs)) if inputs else (1,)
        return Call(interpreter.TensorHandle(np.broadcast_to(program.run(assembly, *inputs), shape).copy(), kind))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_barrier", program.barrier)
    return program


if triton is not None:

    @triton.jit
    def _totals(out, x, W: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr):
        at = tl.arange(0, W)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]
        for turn in tl.static_range(TURNS):
            y = warps.total(tl.load(x + turn * (W * ROWS) + at), TURNS > 1, "PTX")
            tl.store(out + turn * ROWS + tl.arange(0, ROWS)[:, None], y)


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("W,rows", [(2, 8), (4, 1), (4, 64), (8, 32), (16, 16)])
def test_sums_over_warps(W, rows, turns, program):
    x, out = torch.randn(turns, W, rows), torch.zeros(turns, rows)
    _totals[(1,)](out, x, W, rows, turns)
    torch.testing.assert_close(out, x.sum(1))
    assert program.asked == turns


def test_a_program_that_sums_again_waits(program):
    """The reader sees what it is there for."""
    x, out = torch.randn(2, 4, 8), torch.zeros(2, 8)
    program.meets = False
    with pytest.raises(Exception, match="no barrier"):
        _totals[(1,)](out, x, 4, 8, 2)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("H,Hkv,D,pos", [(4, 4, 64, 37), (8, 2, 80, 300), (6, 2, 128, 0), (2, 1, 64, 700)])
def test_attention_in_one_exchange(H, Hkv, D, pos, with_sinks, program, monkeypatch):
    """As without it: of one split and of several, of heads that share a key, and where no key is old."""
    T = 704
    qkv, cache = torch.randn(1, 1, (H + 2 * Hkv) * D).half(), torch.randn(2, 1, Hkv, T, D).half()
    rest = (torch.tensor([pos]), None, None, None, 0.0, H, 0, None, 0.0, torch.randn(H) if with_sinks else None)
    results = []
    for once in (False, True):
        monkeypatch.setattr(attention_triton, "exchanges", lambda *_, once=once: once)
        results.append(attention_triton.attention_triton(qkv, *cache.clone(), *rest))
    assert program.asked
    torch.testing.assert_close(*results, atol=2e-3, rtol=2e-3)


def test_what_shared_memory_holds():
    """8 warps of 128 features: 6 rows beside 8 rows of queries, 7 no more."""
    assert attention_triton.exchanges(True, 8, 8, 6, 128) and not attention_triton.exchanges(True, 8, 8, 7, 128)
    assert not attention_triton.exchanges(False, 8, 8, 1, 128)


def test_lanes_get_the_scale_of_their_part_of_x():
    """Lane j + 4 i has part i // 2 of x, and multiplies products of part j."""
    line = re.search(r"and\.b32 l, l, (\d+); shl\.b32 l, l, (\d+); shfl\.sync\.idx", linear_products.OF_PART.value)
    mask, shift = map(int, line.groups())
    for lane in range(32):
        source = (lane & mask) << shift
        assert source // 4 // 2 == lane % 4
