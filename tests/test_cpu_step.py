"""A CPU's call for all layers against the layers themselves, instruction sets, threads, and native sampling."""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO
from test_cpu import packed, relative
from torch.nn.functional import linear

import ops
from cli import use
from errors import UserError
from model import ModelConfig, Transformer
from ops import cpu, cpu_library, cpu_step, kv_cache, memory
from ops.sampling import sample_plain

SMALL = {"dim": 64, "n_layer": 2, "n_head": 4, "n_local_heads": 2, "head_dim": 16, "intermediate_size": 96}
SMALL |= {"vocab_size": 100, "block_size": 64}
FEATURES = {
    "plain": {},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "norms": {"qk_norm": True, "rotary_dim": 8},
    "windows": {"windows": (5, 0), "rope_layers": (True, False)},
    "wide": {"head_dim": 64, "n_head": 3, "n_local_heads": 1, "intermediate_size": 200},
}


def model_of(dtype: torch.dtype = torch.float32, kind: str | None = None, **fields) -> Transformer:
    """A random model, packed."""
    from linear import Linear, quantize_linear

    model = Transformer(ModelConfig(**SMALL | fields))
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = (
                torch.randn(parameter.shape) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1)
            ).to(dtype)
        if kind and isinstance(module, Linear):
            tensors = dict(module.named_parameters())
            module.assign(quantize_linear(kind, tensors, "w"))
    model.pack(dtype)
    return model


def both(model: Transformer, x: torch.Tensor, pos: torch.Tensor, T: int = 24) -> list[tuple]:
    """Hidden states and caches by the call, and layer by layer."""
    results = []
    for native in (True, False):
        torch.manual_seed(1)
        cache = model.cache(len(x), T)
        for tensor in cache.k + cache.v:
            tensor.copy_(torch.randn(tensor.shape))
        if not native:
            cpu_step._steps.pop(model)
        assert cpu_step.serves(model) is native
        results.append((model.hidden(x, pos, cache), *cache.k, *cache.v))
    return results


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kind", [None, "int8", "int4:32"])
def test_all_layers_in_one_call_are_the_layers(features, kind):
    for B, S, threads, T in ((1, 1, 1, 24), (2, 1, 2, 24), (1, 20, 3, 24), (3, 7, 4, 24), (2, 150, 2, 200)):
        torch.set_num_threads(threads)
        model = model_of(kind=kind, **FEATURES[features])
        pos = torch.tensor([3, T - 4, 9][:B]) if S == 1 else torch.tensor([2, T - 5, 0][:B])  # row 1 reaches past it
        native, plain = both(model, torch.randn(B, S, 64), pos, T)
        inside = (pos[:, None] + torch.arange(S) < T)[..., None]
        assert relative(native[0] * inside, (plain[0] * inside).double()) < 1e-6
        for ours, theirs in zip(native[1:], plain[1:]):
            assert relative(ours, theirs.double()) < 1e-6


@pytest.mark.parametrize("kind", kv_cache.DTYPES)
def test_all_layers_with_keys_and_values_in_8_bits(kind, monkeypatch):
    for B, S, T in ((2, 1, 24), (1, 20, 24), (2, 70, 100)):
        model = model_of()
        states = [model.cache(B, T, kind) for _ in range(2)]
        for layers in zip(*(state.layers for state in states)):
            for part in (0, 1):
                q, scales = kv_cache.quantize(torch.randn(B, *layers[0][0].shape[1:]), layers[0][0].dtype)
                for layer in layers:
                    layer[part].copy_(q), layer[2 + part][:, :, :T].copy_(scales)
        x, pos = torch.randn(B, S, 64), torch.tensor([3, 0][:B])
        assert cpu_step.serves(model)
        native = model.hidden(x, pos, states[0])
        cpu_step._steps.pop(model)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "supports_attention", lambda *args: False)
            plain = model.hidden(x, pos, states[1])
        assert relative(native, plain.double()) < 2e-3
        for ours, theirs in zip(states[0].layers, states[1].layers):
            for part in (0, 1):
                a, b = (kv_cache.dequantize(t[part], t[2 + part][:, :, :T], torch.float64) for t in (ours, theirs))
                assert relative(a, b) < 2e-3 and b.abs().max() > 1


def test_bf16_is_rounded_less_often():
    wide, narrow = model_of(), model_of(torch.bfloat16)
    for a, b in zip(wide.parameters(), narrow.parameters()):
        a.data.copy_(b)
    x, pos = torch.randn(1, 9, 64).bfloat16(), torch.tensor([0])
    expected = wide.hidden(x.float(), pos, wide.cache(1, 24)).double()
    native, plain = both(narrow, x, pos)
    assert relative(native[0], expected) < min(relative(plain[0], expected), 1e-2)


def test_what_is_not_known_is_declined():
    model = model_of()
    fields = [("new", float, dataclasses.field(default=1.0)), ("newer", dict, dataclasses.field(default_factory=dict))]
    later = dataclasses.make_dataclass("Later", fields, bases=(ModelConfig,), frozen=True)
    for more, served in (({}, True), ({"new": 0.0}, False), ({"newer": {"a": 1}}, False), ({"soft_cap": 30.0}, False)):
        config = later(**SMALL, **more)
        model.config = config
        cpu_step.prepare(model, torch.float32)
        assert cpu_step.serves(model) is served
    model = model_of()
    model.layers[1].attention.add_module("gate", torch.nn.Identity())
    cpu_step.prepare(model, torch.float32)
    assert not cpu_step.serves(model)


def test_long_inputs_go_layer_by_layer_where_pytorch_is_faster(monkeypatch):
    monkeypatch.setattr(cpu, "most_rows", lambda dtype: cpu.MAX_ROWS)
    model, calls = model_of(block_size=256), []
    library = cpu_library.library()
    monkeypatch.setattr(library, "gptfast_step", lambda step, threads: calls.append(step.attention.S))
    for S in (1, cpu.MAX_ROWS, cpu.MAX_ROWS + 1):
        model.hidden(torch.randn(1, S, 64), torch.tensor([0]), model.cache(1, 100))
    assert calls == [1, cpu.MAX_ROWS]


@pytest.fixture
def sets():
    """Every instruction set that runs here; the best one again afterwards."""
    library = cpu_library.library()
    yield library.sets
    cpu_library.use(library, library.sets[-1])


def test_every_instruction_set_agrees(sets):
    for name in sets:
        cpu_library.use(cpu_library.library(), name)
        assert cpu_library.library().name == name
        for kind in ("plain", "int8", "int4:32", "int4:128"):
            for N, K in ((48, 576), (33, 65), (7, 31)):
                for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-4 if kind == "plain" else 1.5e-2)):
                    layer, weight = packed(kind, N, K, dtype)
                    layer.fp32 = True
                    for rows, threads in ((1, 1), (3, 2), (6, 3), (31, 4), (32, 1), (64, 3)):
                        torch.set_num_threads(threads)
                        x = torch.randn(rows, K).to(dtype)
                        assert relative(layer(x), linear(x.double(), weight, layer.bias.double())) < bound, name
        for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
            for S in (3, 40):
                native, plain = both(model_of(dtype), torch.randn(1, S, 64).to(dtype), torch.tensor([3]), 50)
                assert relative(native[0], plain[0].double()) < bound, name


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["int8", "int4:32"])
def test_golden_tokens_of_integer_weights(kind, smollm2_dir):
    """A step's most likely token is that of plain PyTorch on the weights that the integers stand for."""
    from checkpoint import load_model
    from linear import Linear
    from ops.linear import plain

    case = json.loads((REPO / "tests/data/smollm2_135m_instruct.json").read_text())["prompts"][5]
    ids = torch.tensor([case["prompt_ids"] + case["greedy_ids"][:16]])
    model = load_model(smollm2_dir / "model.pth", dtype=torch.float32, quantize=kind)
    cache, steps = model.cache(1, 64), range(ids.shape[1])
    assert cpu_step.serves(model)
    ours = torch.cat([model(ids[:, i : i + 1], torch.tensor([i]), cache) for i in steps], 1)
    cpu_step._steps.pop(model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight.data, module.scales, module.zeros = module.dequantized(torch.float32), None, None
            module.backends = (plain,)
    theirs = model(ids, torch.tensor([0]), model.cache(1, 64), all_logits=True)
    assert relative(ours, theirs.double()) < 1e-4
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_move_to_huge_pages_if_there_is_room(monkeypatch):
    odd = [torch.nn.Parameter(torch.randn(n)) for n in (3, 1 << 19, 17)]
    odd.append(torch.nn.Parameter(torch.randn(5, 7).bfloat16()))
    before, places = [p.clone() for p in odd], [p.data_ptr() for p in odd]
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * (64 + (1 << 21) + 128 + 128) - 1)
    memory.gather(odd)
    assert [p.data_ptr() for p in odd] == places
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * (64 + (1 << 21) + 128 + 128))
    memory.gather(odd)
    first = odd[0].data_ptr()
    assert first % memory.PAGE == 0
    assert [p.data_ptr() - first for p in odd] == [0, 64, 64 + (1 << 21), 64 + (1 << 21) + 128]
    assert all(torch.equal(a, b) for a, b in zip(odd, before))
    inside, flags = False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(mapping[1], 16) <= first < int(mapping[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()
    assert "hg" in flags  # asked for


def test_an_instruction_set_can_be_named(monkeypatch):
    monkeypatch.setenv("GPTFAST_CPU", "none")
    cpu_library.library.cache_clear()
    try:
        assert not cpu.ready()
        monkeypatch.setenv("GPTFAST_CPU", "sse9")
        cpu_library.library.cache_clear()
        with pytest.raises(UserError, match="'sse9'; this processor runs generic"):
            cpu.ready()
    finally:
        monkeypatch.undo()
        cpu_library.library.cache_clear()


def test_a_forked_process_has_threads_of_its_own():
    torch.set_num_threads(2)
    layer, _ = packed("plain", 64, 64, torch.float32)
    x = torch.randn(1, 64)
    expected = layer(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(layer(x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "temperature,top_k,min_p", [(0, 0, 0), (0.8, 0, 0), (1.5, 20, 0), (0.7, 1, 0), (1, 0, 0.1), (1, 50, 0.02)]
)
def test_native_sampling_draws_what_plain_pytorch_draws(temperature, top_k, min_p):
    for V in (5, 1000, 20000):
        top_k = min(top_k, V)
        logits = torch.randn(3, V).mul(3).round(decimals=1)  # with equal ones
        state = [
            (torch.tensor([7, 3]), torch.zeros(3, 10, dtype=torch.int64), torch.tensor([0, 2, 5])) for _ in range(2)
        ]
        for _ in range(4):
            drawn = [
                draw(logits, temperature, top_k, min_p, *own) for draw, own in zip((cpu.sample, sample_plain), state)
            ]
            assert torch.equal(*drawn)
        assert all(torch.equal(a, b) for a, b in zip(*state))


def test_sampling_survives_what_is_not_a_number():
    logits = torch.full((2, 1000), math.nan)
    logits[1] = -math.inf
    drawn = cpu.sample(logits, 1.0, 50, 0.1, torch.tensor([1, 0]))
    assert ((drawn >= 0) & (drawn < 1000)).all()


def test_threads():
    assert 1 <= ops.physical_cores() <= os.cpu_count()
    args = argparse.Namespace(device="cpu", threads=1)
    assert use(args)[1] == "cpu with 1 thread" and torch.get_num_threads() == 1
    with pytest.raises(UserError, match="--threads is 100000; this machine runs"):
        use(argparse.Namespace(device="cpu", threads=100000))
