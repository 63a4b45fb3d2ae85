"""Mixtures of experts: logits equal transformers', every kind of weight, ranks, GPTQ, and the kernels."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from test_kernels import DEVICE, DTYPES, KINDS, error, make_weight, on_device, scalars_index
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import ops
from checkpoint import load_model, torch_load
from errors import UserError
from formats.config import config_fields
from formats.convert import convert
from linear import MXFP4, Linear, Plain
from measure import prefill_flops, weight_bytes
from model import ModelConfig
from ops import experts_choice, experts_gemm, experts_triton, tuning
from ops.attention_triton import prefetch_lines
from ops.common import counters
from ops.experts import mixture_plain
from ops.rms_norm import rms_norm
from ops.tuning import Tile
from quantize import gptq_checkpoint, quantize_checkpoint
from tp import TensorParallel

__all__ = ["scalars_index"]  # a fixture

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
GRANITE = {"embedding_multiplier": 6.0, "attention_multiplier": 0.1}
GRANITE |= {"residual_multiplier": 0.5, "logits_scaling": 4.0}
QWEN = {"num_experts": 5, "moe_intermediate_size": 32}
FAMILIES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 7}),
    "qwen2_moe": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 40}),
    "qwen2_moe-dense-layer": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2}),
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "head_dim": 32, "norm_topk_prob": True, "num_experts_per_tok": 3}),
    "qwen3_moe-not-normalised": ("Qwen3Moe", {**QWEN, "mlp_only_layers": [0]}),
    "olmoe": ("Olmoe", {"num_experts": 4, "intermediate_size": 48}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4, "intermediate_size": 48, **GRANITE}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "head_dim": 16, "sliding_window": 5}),
}


def build(directory, name):
    """A tiny random transformers model of the family, saved in `directory`, whose experts differ."""
    family, options = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            shift = "norm" in key or "bias" in key
            parameter.copy_(torch.randn_like(parameter) * (0.3 if shift else 0.1) + (1.0 if "norm" in key else 0.0))
    model.save_pretrained(directory)
    return model


def load(directory, **options):
    return load_model(directory / "model.pth", dtype=torch.float32, **options)


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path, name):
    reference = build(tmp_path, name)
    convert(tmp_path, torch.float32)
    model = load(tmp_path)
    lengths, more = torch.tensor([15, 4, 9]), 4
    tokens = torch.randint(2, 97, (3, 15 + more), generator=torch.Generator().manual_seed(1))
    expected = reference(tokens).logits
    assert expected.std() > 0.1

    cache, chunks = model.cache(3, 24), []  # odd chunks
    for a, b in ((0, 1), (1, 8), (8, 19)):
        chunks.append(model(tokens[:, a:b], torch.full((3,), a), cache.first(b), all_logits=True))
    torch.testing.assert_close(torch.cat(chunks, 1), expected, atol=1e-4, rtol=0)

    cache = model.cache(3, 24)  # rows of unequal lengths, then a token at a time
    logits = model(tokens[:, :15], torch.zeros(3, dtype=torch.int64), cache, last=lengths - 1)
    for step in range(more):
        pos = lengths + step
        torch.testing.assert_close(logits[:, 0], expected[torch.arange(3), pos - 1], atol=1e-4, rtol=0)
        logits = model(tokens.gather(1, pos[:, None]), pos, cache)


def test_attention_knows_which_weights_follow(tmp_path):
    """Those of a dense layer, or of the layer behind a mixture's experts, as they are packed."""
    build(tmp_path, "qwen3_moe-not-normalised")
    convert(tmp_path, torch.float32)
    dense, mixed = load(tmp_path).layers
    assert dense.attention.prefetch is dense.feed_forward.w13.weight and mixed.attention.prefetch is None
    build(tmp_path / "mixed", "qwen3_moe")
    convert(tmp_path / "mixed", torch.float32)
    first, last = load(tmp_path / "mixed").layers
    assert first.attention.prefetch is last.attention.wqkv.weight and last.attention.prefetch is None
    assert [layer.attention.first_layer for layer in (first, last)] == [True, False]


@pytest.mark.parametrize(
    "mib,soon,later", [(7, 0, 0), (8, 0, 2**15), (14, 0, 2**15), (17, 2**13, 2**15), (90, 2**14, 2**15)]
)
def test_how_much_is_prefetched(mib, soon, later):
    weight = torch.empty(mib * 2**20, dtype=torch.uint8, device="meta")
    assert prefetch_lines(weight, None) == prefetch_lines(weight, weight) == soon
    assert prefetch_lines(None, weight) == later and prefetch_lines(None, None) == 0


def test_experts_in_one_tensor_are_those_apart(tmp_path):
    """What a later transformers may write: all experts in one tensor, w1's rows above w3's."""
    build(tmp_path / "apart", "qwen3_moe")
    tensors, fused = load_file(tmp_path / "apart/model.safetensors"), {}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        w1, w3, w2 = (
            torch.stack([tensors.pop(f"{prefix}.{e}.{name}_proj.weight") for e in range(5)])
            for name in ("gate", "up", "down")
        )
        fused |= {f"{prefix}.gate_up_proj": torch.cat((w1, w3), 1), f"{prefix}.down_proj": w2}
    (tmp_path / "fused").mkdir()
    save_file(tensors | fused, tmp_path / "fused/model.safetensors")
    (tmp_path / "fused/config.json").write_text((tmp_path / "apart/config.json").read_text())
    apart, one = (torch_load(convert(tmp_path / name, torch.float32)) for name in ("apart", "fused"))
    assert apart.keys() == one.keys() and all(torch.equal(apart[name], one[name]) for name in apart)


def build_mxfp4(directory):
    """A tiny gpt-oss as published in `packed`, and what transformers makes of it in `plain`."""
    build(directory / "plain", "gpt_oss")
    (directory / "packed").mkdir()
    plain = load_file(directory / "plain/model.safetensors")
    packed = dict(plain)
    for name in [name for name in plain if name.endswith(("gate_up_proj", "down_proj"))]:
        E, K, N = plain[name].shape
        blocks = torch.randint(0, 256, (E, N, K // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 125, (E, N, K // 32), dtype=torch.uint8)
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(plain, directory / "plain/model.safetensors")
    save_file(packed, directory / "packed/model.safetensors")
    (directory / "packed/config.json").write_text((directory / "plain/config.json").read_text())
    return directory / "plain", directory / "packed"


@torch.inference_mode()
def test_mxfp4(tmp_path, monkeypatch):
    """gpt-oss's published experts stay as they are, and are what transformers makes of them; on ranks as well."""
    plain, packed = build_mxfp4(tmp_path)
    wide = [torch_load(convert(folder, torch.float32)) for folder in (plain, packed)]
    assert wide[0].keys() == wide[1].keys() and all(torch.equal(wide[0][key], wide[1][key]) for key in wide[0])
    reference = load(plain)
    (packed / "model.pth").unlink()
    state = torch_load(convert(packed, None))
    w1 = {key: state[f"layers.1.block_sparse_moe.cond_ffn.w1.{key}"] for key in ("weight", "scales")}
    assert {key: (t.dtype, list(t.shape)) for key, t in w1.items()} == {
        "weight": (torch.uint8, [4, 96, 32]),
        "scales": (torch.uint8, [4, 96, 2]),
    }
    for name, value in state.items():  # but for these, in fp32 for once
        state[name] = wide[1].get(name, value) if value.is_floating_point() else value
    (packed / "model.pth").unlink()  # it is mapped
    torch.save(state, packed / "model.pth")
    tokens = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(load(packed), tokens), logits(reference, tokens), atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="quantised already"):
        load(packed, quantize="int8")

    monkeypatch.setattr("ops.symmetric.all_reduce", lambda y, gather, rank, world, x: y + x / world)
    x, block = torch.randn(2, 3, 64), load(packed).layers[1]
    expected, parts = block.block_sparse_moe(x, block.ffn_norm), []
    for rank in range(2):  # of 96 inner features, 64 and 32
        block = load(packed, tp=TensorParallel(rank, 2)).layers[1]
        assert block.block_sparse_moe.cond_ffn.w2.weight.dtype is torch.uint8
        parts.append(block.block_sparse_moe(x, block.ffn_norm))
    torch.testing.assert_close(sum(parts), expected, atol=1e-5, rtol=0)

    bad = load_file(packed / "model.safetensors")
    bad["model.layers.0.mlp.experts.down_proj_scales"][0, 0, 0] = 255
    save_file(bad, packed / "model.safetensors")
    with pytest.raises(UserError, match="down_proj_scales has 255"):
        convert(packed, None)


@torch.inference_mode()
def test_random_experts_in_mxfp4(monkeypatch):
    """As bench.py measures gpt-oss: its experts' bytes count as they are, and nothing else is in 4 bits."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    import bench

    config = ModelConfig.from_hf({"model_type": "gpt_oss", **TINY, "num_local_experts": 4, "head_dim": 16})
    model = bench.random_model(config, "mxfp4", torch.device("cpu"), torch.float32)
    kinds = {module.kind for module in model.modules() if isinstance(module, Linear) and module.experts}
    assert kinds == {MXFP4} and model.output.kind is model.layers[0].attention.wo.kind is Plain
    plain = bench.random_model(config, "bf16", torch.device("cpu"), torch.float32)
    less = 2 * 2 * 3 * 64 * 96 * (4 - 17 / 32)  # of two layers, two experts each
    assert weight_bytes(plain) - weight_bytes(model) == less
    found = logits(model, torch.arange(9)[None])
    assert found.isfinite().all() and 0.1 < found.std() < 10


def test_files_have_the_names_of_gpt_fast(tmp_path):
    build(tmp_path, "mixtral")
    convert(tmp_path, torch.float32)
    quantize_checkpoint(tmp_path / "model.pth", tmp_path / "model_int8.pth", "int8", torch.device("cpu"))
    experts = "layers.0.block_sparse_moe.cond_ffn."
    plain, int8 = (torch.load(tmp_path / name, weights_only=True) for name in ("model.pth", "model_int8.pth"))
    found = {key.removeprefix(experts): list(t.shape) for key, t in int8.items() if key.startswith(experts)}
    shapes = {"w1": [4, 96, 64], "w3": [4, 96, 64], "w2": [4, 64, 96]}
    assert found == shapes | {"scales1": [4, 96], "scales3": [4, 96], "scales2": [4, 64]}
    assert {key: list(plain[experts + key].shape) for key in shapes} == shapes
    assert plain["layers.0.block_sparse_moe.gate.weight"].shape == (4, 64)
    assert "layers.0.block_sparse_moe.gate.scales" not in int8  # the router stays plain


def logits(model, tokens, **options):
    cache = model.cache(len(tokens), 32)
    return model(tokens, torch.zeros(len(tokens), dtype=torch.int64), cache, all_logits=True)


def dequantised(model):
    """The model with all its linear layers made plain, in place."""
    for module in model.modules():
        if isinstance(module, Linear):
            bias = {} if module.bias is None else {"bias": module.bias}
            module.assign({"weight": module.dequantized(torch.float32).contiguous()} | bias)
    return model


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("mode", ["int8", "fp8", "int4:64"])
@torch.inference_mode()
def test_quantised_experts(tmp_path, name, mode):
    """A file, and quantising on the way: both are the matrices that they stand for."""
    build(tmp_path, name)
    convert(tmp_path, torch.float32)
    quantize_checkpoint(tmp_path / "model.pth", tmp_path / "quantised.pth", mode, torch.device("cpu"))
    tokens = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    found = logits(load_model(tmp_path / "quantised.pth", dtype=torch.float32), tokens)
    assert torch.equal(found, logits(load(tmp_path, quantize=mode), tokens))
    torch.testing.assert_close(found, logits(dequantised(load(tmp_path, quantize=mode)), tokens), atol=1e-4, rtol=0)
    error = (found - logits(load(tmp_path), tokens)).norm() / found.norm()
    assert 0 < error < {"int8": 0.03, "fp8": 0.15}.get(mode, 0.5), error


@torch.inference_mode()
def test_gptq_of_experts(tmp_path):
    """Experts are calibrated on the tokens that they meet, and rounded to nearest where these are few."""
    build(tmp_path, "qwen2_moe")
    convert(tmp_path, torch.float32)
    state = torch_load(tmp_path / "model.pth")
    gate = state["layers.0.block_sparse_moe.gate.weight"].clone()
    tokens = [torch.randint(2, 97, (4, 32), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    errors, plain = {}, load(tmp_path)
    for mode in ("rtn", "gptq"):
        target = tmp_path / f"{mode}.pth"
        if mode == "rtn":
            quantize_checkpoint(tmp_path / "model.pth", target, "int4:32", torch.device("cpu"))
        else:
            few = gptq_checkpoint(tmp_path / "model.pth", target, "int4:32", tokens, torch.device("cpu"))
        found = load_model(target, dtype=torch.float32)
        errors[mode] = sum((logits(found, t) - logits(plain, t)).square().mean() for t in tokens)
    assert few < 15 and errors["gptq"] < 0.8 * errors["rtn"], errors
    assert torch.equal(torch_load(tmp_path / "gptq.pth")["layers.0.block_sparse_moe.gate.weight"], gate)
    short = [tokens[0][:1, :20]]
    assert gptq_checkpoint(tmp_path / "model.pth", tmp_path / "few.pth", "int4:32", short, torch.device("cpu")) == 30
    found, rounded = (torch_load(tmp_path / f"{name}.pth") for name in ("few", "rtn"))
    assert torch.equal(*(t["layers.0.block_sparse_moe.cond_ffn.w1.weight"] for t in (found, rounded)))


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("world", [2, 3])
@torch.inference_mode()
def test_ranks_make_up_the_whole(tmp_path, kind, world, monkeypatch):
    """Each rank's mixture by itself, summed as the all-reduce would."""
    build(tmp_path, "qwen2_moe")
    convert(tmp_path, torch.float32)
    monkeypatch.setattr("ops.symmetric.all_reduce", lambda y, gather, rank, world, x: y + x / world)
    monkeypatch.setattr(TensorParallel, "heads", lambda self, H, Hkv: (range(H), range(Hkv)))  # 4 heads by 3 ranks
    x = torch.randn(2, 3, 64)
    block = load(tmp_path, quantize=kind).layers[1]
    expected, parts = block.block_sparse_moe(x, block.ffn_norm), []
    for rank in range(world):
        block = load(tmp_path, quantize=kind, tp=TensorParallel(rank, world)).layers[1]
        parts.append(block.block_sparse_moe(x, block.ffn_norm))
    torch.testing.assert_close(sum(parts), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_what_a_step_reads_is_counted(tmp_path):
    build(tmp_path, "qwen2_moe")
    convert(tmp_path, torch.float32)
    model, sizes = load(tmp_path), 3 * 64 * 32 * 4 * 2  # bytes of an expert in both layers
    everything = sum(p.nbytes for p in model.parameters()) - model.tok_embeddings.weight.nbytes
    assert weight_bytes(model) == everything - 3 * sizes  # of 5 experts, 2
    assert weight_bytes(model, 2) == pytest.approx(everything - 5 * sizes * 0.36, abs=1)
    linear = sum(p.numel() for p in model.layers.parameters() if p.ndim > 1) - 3 * sizes / 4
    router = 2 * 6 * 64
    attention = 4 * 4 * 16 * (10 * 5) * 2
    assert prefill_flops(model, 10, 1) == pytest.approx(2 * (linear - router) * 10 + attention)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts_per_tok": 6}, r"num_experts_per_tok 6 is more than the 5 experts"),
        ({"moe_intermediate_size": "big"}, r"moe_intermediate_size is 'big'"),
    ],
)
def test_bad_configs(change, words):
    with pytest.raises(UserError, match=words):
        config_fields({"model_type": "qwen3_moe", **TINY, **QWEN, **change})


# --- kernels ----------------------------------------------------------------------------------------------------------


def make_case(kind, M, E, N, K, top_k, dtype, limit=0.0, seed=0):
    """A mixture of E experts of N features, as the kernels read it, its plain twin, and rows of x. With a limit, it has
    biases as well."""
    generator = torch.Generator().manual_seed(seed)

    def layer(rows, columns):
        made = [make_weight(kind, rows, columns, dtype, generator) for _ in range(E)]
        w, s, dense = (None if parts[0] is None else torch.cat(parts) for parts in zip(*made))
        w, s, dense = on_device(w, s, dense.view(E, rows, columns))
        bias = torch.randn(E, rows, generator=generator).to(DEVICE, dtype) if limit else None
        packed = SimpleNamespace(weight=w, scales=s, zeros=None, bias=bias)
        bias = None if bias is None else bias.float()
        return packed, SimpleNamespace(weight=dense.float(), scales=None, zeros=None, bias=bias, out_features=rows)

    (up, plain_up), (down, plain_down) = layer(2 * N, K), layer(K, N)
    gate, gain, x, shift = (torch.randn(*shape, generator=generator) for shape in ((E, K), (K,), (M, K), (E,)))
    gate, gain, x, residual, shift = on_device(*(t.to(dtype) for t in (gate / 4, gain.abs() + 0.5, x, x / 2, shift)))
    mixture, twin = (
        SimpleNamespace(
            gate=SimpleNamespace(weight=gate.to(of), bias=shift.to(of)),
            cond_ffn=SimpleNamespace(w13=w13, w2=w2, act=F.silu),
            top_k=top_k,
            renormalize=True,
            limit=limit,
            alpha=1.702 if limit else 1.0,
        )
        for w13, w2, of in ((up, down, dtype), (plain_up, plain_down, torch.float32))
    )
    norm = torch.nn.RMSNorm(K, 1e-5)
    norm.weight = torch.nn.Parameter(gain, requires_grad=False)

    def twin_norm(x):  # rounded alike, or two experts of nearly one score might change places
        return rms_norm(x, gain.float(), 1e-5).to(dtype).float()

    return mixture, twin, norm, twin_norm, x, residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "M,E,top_k,renormalize", [(2, 8, 2, True), (5, 12, 3, False), (9, 40, 4, True), (3, 3, 3, True)]
)
def test_route(M, E, top_k, renormalize, dtype):
    gate, gain, x, shift = torch.randn(E, 96), torch.rand(96) + 0.5, torch.randn(M, 96), torch.randn(E)
    gate, gain, x, shift = on_device(*(t.to(dtype) for t in (gate, gain, x, shift)))
    h, logits = torch.empty_like(x), torch.empty(M, E, device=DEVICE)
    used, weights = experts_triton.route(h, logits, x, gain, 1e-5, gate, shift, top_k, renormalize)
    assert error(h, rms_norm(x.float(), gain.float(), 1e-5)) < 5e-3
    layer = SimpleNamespace(gate=SimpleNamespace(weight=gate, bias=shift), top_k=top_k, renormalize=renormalize)
    index, expected = ops.route(layer, h)
    count = int(used[0])
    assert used[1 : 1 + count].tolist() == index.unique().tolist() and len(weights) == min(E, M * top_k)
    dense = torch.zeros(M, E, device=DEVICE).scatter_(1, index, expected)
    torch.testing.assert_close(weights[:count].T, dense[:, used[1 : 1 + count].long()], atol=1e-4, rtol=0)
    assert not weights[count:].any() and not used[1 + count :].any() and not counters(torch.device(DEVICE), 1).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "E,top_k,renormalize", [(8, 2, True), (40, 4, False), (3, 3, True), (40, 32, True), (128, 8, True), (256, 8, False)]
)
def test_one_row_finds_its_experts_going_up(E, top_k, renormalize, dtype):
    """The greatest scores first, of equal ones those with the lowest index, negative ones too."""
    gate, gain, x, shift = torch.randn(E, 96), torch.rand(96) + 0.5, torch.randn(1, 96), torch.randn(E) - 5.0
    gate, gain, x, shift = on_device(*(t.to(dtype) for t in (gate, gain, x, shift)))
    best = (gate.float() @ rms_norm(x.float(), gain.float(), 1e-5)[0] + shift.float()).argmax()
    gate[:2], shift[:2] = gate[best], shift[best]  # two or three of one score
    h, board = torch.empty_like(x), experts_choice.scoreboard(torch.device(DEVICE), E)
    used, weights = experts_triton.route(h, board, x, gain, 1e-5, gate, shift, top_k, renormalize)
    assert error(h, rms_norm(x.float(), gain.float(), 1e-5)) < 5e-3
    logits, limits = board.clone(), (0.0, 1.0, board, renormalize)
    assert torch.equal(logits, logits[:1].expand_as(logits))
    w13, w2 = (torch.randn(E * 16, K).to(dtype).to(DEVICE) for K in (96, 32))
    y = experts_triton.experts(h, w13, None, None, E, used, weights, None, False, *limits)
    experts_triton.experts(y.new_zeros(top_k, 1, 32), w2, None, None, E, used, weights, None, True, *limits)
    assert (board.view(torch.int32) == 1).all()  # missing again, each of them
    index = logits[0].sort(descending=True, stable=True).indices
    share = logits[0].softmax(-1)[index[:top_k]]
    assert used.tolist() == [top_k, *index[:top_k].tolist()]
    torch.testing.assert_close(weights[:, 0], share / share.sum() if renormalize else share, atol=1e-6, rtol=1e-5)
    gate, up = (w13.view(E, 2, 8, 96)[index[:top_k]].float() @ h[0].float()).unbind(1)
    expected = weights * F.silu(gate) * up
    assert error(y[:, 0], expected) < 5e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M,E,top_k,renormalize", [(37, 5, 2, True), (33, 20, 3, False)])
def test_group(M, E, top_k, renormalize, dtype):
    gate, gain, x = torch.randn(E, 160), torch.rand(160) + 0.5, torch.randn(M, 160)
    gate[3] = -4 * x.mean(0)  # which nobody chooses
    gate, gain, x = on_device(*(t.to(dtype) for t in (gate, gain, x)))
    h, scores, order, tiles = experts_gemm.group(x, gain, 1e-5, gate, None, top_k, renormalize, 16)
    assert error(h, rms_norm(x.float(), gain.float(), 1e-5)) < 5e-3
    layer = SimpleNamespace(gate=SimpleNamespace(weight=gate, bias=None), top_k=top_k, renormalize=renormalize)
    index, expected = ops.route(layer, h)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    found, places = index.flatten().sort(stable=True)
    assert torch.equal(order.long(), places)
    covered = [(e, place) for e, first, end in tiles.tolist() for place in range(first, min(first + 16, end))]
    assert covered == list(zip(found.tolist(), range(M * top_k)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind,M,E,N,K,top_k,limit",
    [
        *((kind, 1, 4, 32, 96, 2, 0.0) for kind in KINDS if kind not in ("int4:64", "int4:256")),
        *((kind, M, 3, 32, 32, 2, 0.5) for kind in ("16-bit", "int8", "int4:32", "mxfp4") for M in (1, 5)),
        *(("int4:32 fp16", M, 3, 32, 32, 2, 0.0) for M in (1, 5)),
        ("16-bit", 1, 40, 32, 96, 33, 0.0),  # more than a warp's lanes
        *((kind, 1, 40, 32, 96, 8, 0.0) for kind in ("16-bit", "int8", "int4:32")),
    ],
)
def test_experts(kind, M, E, N, K, top_k, limit, dtype, monkeypatch):
    monkeypatch.setattr(experts_triton, "few_rows_on_triton", lambda x: True)
    mixture, twin, norm, twin_norm, x, residual = make_case(kind, M, E, N, K, top_k, dtype, limit)
    y = experts_triton.run(mixture, x, norm, residual)
    assert error(y, mixture_plain(twin, x.float(), twin_norm, residual.float())) < 4e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["16-bit", "int8", "int4:32", "int4:32 fp16", "mxfp4"])
def test_many_rows_of_experts(kind, dtype, monkeypatch):
    """Tiles that are full along no axis, experts of none and of several tiles."""
    monkeypatch.setattr(tuning, "grouped", lambda *_: Tile(16, 1, 1, 4, 2, 1))
    monkeypatch.setattr(experts_gemm, "on_triton", lambda x: True)
    mixture, twin, norm, twin_norm, x, residual = make_case(kind, 21, 3, 32, 96, 2, dtype, 0.5)
    y = experts_gemm.run(mixture, x, norm, residual)
    assert error(y, mixture_plain(twin, x.float(), twin_norm, residual.float())) < 4e-3


def test_every_expert_finds_a_configuration():
    """A warp's unit lies within an expert, gate and up are in one tile, and no warp is alone; tiles of tokens exist."""
    cpu, shapes = torch.device("cpu"), ((1536, 2048), (2048, 768), (28672, 4096), (4096, 14336), (64, 96), (2880, 2880))
    files = [tuning.read_file(path, "experts")[1] for path in tuning.FOLDER.glob("*.json")]
    own = [(of, shape, how) for table in files for (of, _), rows in table.items() for shape, how in rows.items()]
    found = [(kind, K, how) for kind, (_, K), how in own]
    for kind, (N, K), M, down in itertools.product(tuning.CHUNK, shapes, (1, 5, 16), (True, False)):
        found.append((kind, K, tuning.experts(kind, N, K, M, min(8, 2 * M), down, cpu)))
        assert tuning.grouped(kind, N, 2 * M, cpu).rows >= 16
    for kind, K, how in found:
        assert how.num_warps >= 2 and how.tile_rows % 16 == 0
        assert how.k_repeat == 1 or K % (how.k_repeat * tuning.CHUNK[kind]) == 0
