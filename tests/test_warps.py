"""What warps leave for each other in shared memory: its PTX, run in the interpreter by a reader of it, which also asks
for a barrier between what is written and what is read."""

import re

import numpy as np
import pytest
import torch
from ptx import Warp

from ops import attention_triton, linear_products, warps

triton = pytest.importorskip("triton", reason="the kernels need Triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402


class Program(dict):
    """A program's shared memory, which knows which of its words were written or read since the last barrier."""

    meets, asked = True, 0

    def begin(self) -> None:
        self.clear()
        self.boxes, self.end, self.written, self.read = {}, 0, set(), set()

    def barrier(self, *_) -> None:
        if self.meets:
            self.written.clear()
            self.read.clear()

    def box(self, words: int) -> int:
        """The address of so many words, always the same one."""
        self.asked += 1
        if words not in self.boxes:
            self.boxes[words], self.end = self.end, self.end + -(-words // 4) * 16
        return self.boxes[words]

    def get(self, at: int, _) -> int:
        assert at not in self.written, "no barrier before reading"
        self.read.add(at)
        return self[at]  # an error where nobody has written

    def update(self, words) -> None:
        for at, word in words:
            assert at % 4 == 0 and 0 <= at < self.end
            assert at not in self.read, "no barrier before writing again"
            self.written.add(at)
            self[at] = word


@pytest.fixture
def program(monkeypatch) -> Program:
    if torch.cuda.is_available():
        pytest.skip("needs the interpreter: here other tests run these kernels on the GPU itself")
    program, begin = Program(), interpreter.InterpreterBuilder.set_grid_idx

    def set_grid_idx(builder, *index) -> None:
        program.begin()
        begin(builder, *index)

    class Call:
        def __init__(self, handle):
            self.get_result = lambda i: handle

    def create_inline_asm(builder, assembly, constraints, values, types, pure, pack) -> Call:
        inputs = np.broadcast_arrays(*(value.data for value in values)) if values else [np.zeros(1, np.int32)]
        inputs = [x.view(np.int32) if x.dtype == np.float32 else x for x in map(np.ascontiguousarray, inputs)]
        parts = [x.reshape(-1, pack)[:, i] for x in inputs for i in range(pack)]  # neighbours, of one lane
        warp = Warp(program, lanes=parts[0].size)
        if found := re.search(r" box\[(\d+)\]", assembly):
            warp.registers["box"] = np.full(warp.lanes, program.box(int(found[1])))
        registers = warp.run(assembly, **{f"o{pack + i}": part for i, part in enumerate(parts)})
        result = np.stack([registers[f"${i}"] for i in range(pack)], 1).astype(np.int32).reshape(inputs[0].shape)
        if constraints.startswith("=f"):
            return Call(interpreter.TensorHandle(result.view(np.float32), tl.float32))
        return Call(interpreter.TensorHandle(result, tl.int32))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_barrier", program.barrier)
    return program


@triton.jit
def _totals(out, x, W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TURNS: tl.constexpr, SAID: tl.constexpr):
    to = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    at = tl.arange(0, W)[:, None, None] * (ROWS * COLS) + to[None, :, :]
    for turn in tl.static_range(TURNS):
        y = warps.total(tl.load(x + turn * (W * ROWS * COLS) + at), TURNS > 1, "PTX", turn if SAID else None)
        tl.store(out + turn * (ROWS * COLS) + to, y)


@pytest.mark.parametrize("turns,said", [(1, False), (1, True), (3, False), (4, True)])
@pytest.mark.parametrize("W,rows", [(2, 8), (4, 1), (4, 64), (8, 32), (16, 16)])
@pytest.mark.parametrize("cols", [1, 8, 16])
def test_sums_over_warps(cols, W, rows, turns, said, program):
    x, out = torch.randn(turns, W, rows, cols), torch.zeros(turns, rows, cols)
    _totals[(1,)](out, x, W, rows, cols, turns, said)
    torch.testing.assert_close(out, x.sum(1))
    assert program.asked == turns


def test_a_program_that_sums_again_waits(program):
    """The reader sees what it is there for."""
    x, out = torch.randn(2, 4, 8), torch.zeros(2, 8)
    program.meets = False
    with pytest.raises(Exception, match="no barrier"):
        _totals[(1,)](out, x, 4, 8, 1, 2, False)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("S", [1, 6])
@pytest.mark.parametrize("H,Hkv,D,pos", [(4, 4, 64, 37), (8, 2, 80, 300), (6, 2, 128, 0), (2, 1, 64, 690)])
def test_attention_in_one_exchange(H, Hkv, D, pos, S, with_sinks, program, monkeypatch):
    """As without it: of one split and of several, of heads that share a key, and where no key is old."""
    T = 704
    qkv, cache = torch.randn(1, S, (H + 2 * Hkv) * D).half(), torch.randn(2, 1, Hkv, T, D).half()
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
    lanes = np.arange(32)
    found = Warp({}).run(linear_products.OF_PART.value, o1=lanes // 4 // 2)["$0"]
    assert found.tolist() == (lanes % 4).tolist()
