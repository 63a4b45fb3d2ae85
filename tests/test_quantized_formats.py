"""Other programs' quantised checkpoints: what is read has the values that its format stands for, in its own bits where
a layout holds them. Packers here are independent, in float64; what the formats' own libraries wrote is in data/."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import write_checkpoint

import ops
import quantize
from checkpoint import load_model, torch_load
from engine import Engine
from errors import UserError
from eval import LanguageModel, perplexity
from formats.bnb import MARKERS
from formats.convert import convert
from formats.gguf import _lazy
from formats.gguf_blocks import BLOCKS
from formats.gguf_file import GGUFTensor
from formats.gptq_writer import export
from formats.quantised import dense_of
from formats.quantization_config import dequantisable
from formats.source import Lazy
from generate import generate
from linear import FP8, Grouped, Int4, Int8, Linear, Plain
from sampling import Sampler
from tokenizer import load_tokenizer
from tp import TensorParallel

DATA = Path(__file__).parent / "data" / "quantised"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny checkpoint in full precision, K being 64 and, of w2, 96."""
    folder = tmp_path_factory.mktemp("plain")
    write_checkpoint(folder)
    return folder


def words(q: np.ndarray, bits: int, order=range(8)) -> torch.Tensor:
    """Unsigned integers (..., n) as int32 words (..., n / P): place i of a word has the order[i]-th one."""
    P = 32 // bits
    q = q.reshape(*q.shape[:-1], -1, P).astype(np.uint64)
    out = sum(q[..., order[i] if bits == 4 else i] << np.uint64(bits * i) for i in range(P))
    return torch.from_numpy(out.astype(np.uint32).view(np.int32).copy())


def rounded(weight: torch.Tensor, bits: int, group: int, symmetric: bool, dtype=torch.float16):
    """q, points and scales of a weight, all (N, K) and float64, by the book."""
    w = weight.double().unflatten(1, (-1, group))
    if symmetric:
        scales = w.abs().amax(2, True) / (2 ** (bits - 1) - 1)
        points = torch.full_like(scales, 2 ** (bits - 1))
    else:
        scales = (w.amax(2, True) - w.amin(2, True)) / (2**bits - 1)
        points = (-w.amin(2, True) / scales).round().clamp(0, 2**bits - 1)
    scales = scales.to(dtype).double()
    q = (w / scales + points).round().clamp(0, 2**bits - 1)
    return q.flatten(1), points, scales, ((q - points) * scales).flatten(1)


def gptq(weight, bits=4, group=32, symmetric=True, version=1, order=None):
    """AutoGPTQ's tensors, and the float64 weight that they stand for; order: columns as they are grouped."""
    K = weight.shape[1]
    group = K if group == -1 else group
    order = torch.arange(K) if order is None else order
    q, points, scales, dense = rounded(weight[:, order], bits, group, symmetric)
    back = order.argsort()
    stored = (points[..., 0] - int(version == 1)).numpy() % 2**bits
    return {
        "qweight": words(q[:, back].numpy(), bits).t().contiguous(),
        "qzeros": words(stored.T.copy(), bits),
        "scales": scales[..., 0].t().half().contiguous(),
        "g_idx": (back // group).int(),
    }, dense[:, back]


def awq(weight, group=32, version="gemm"):
    q, points, scales, dense = rounded(weight, 4, group, False)
    q, points, scales = q.numpy(), points[..., 0].numpy(), scales[..., 0].half()
    if version == "gemm":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        own = {"qweight": words(q.T.copy(), 4, order), "qzeros": words(points.T.copy(), 4, order), "scales": scales.t()}
    else:
        wide = -(-points.shape[1] // 8) * 8
        points, scales = (np.pad(np.asarray(t), ((0, 0), (0, wide - t.shape[1]))) for t in (points, scales))
        own = {"qweight": words(q, 4), "qzeros": words(points, 4), "scales": torch.from_numpy(scales)}
    return {key: t.contiguous() for key, t in own.items()}, dense


def packed(weight, bits=4, group=32, symmetric=True):
    """compressed-tensors' pack-quantized."""
    q, points, scales, dense = rounded(weight, bits, group, symmetric, torch.bfloat16)
    own = {"weight_packed": words(q.numpy(), bits), "weight_shape": torch.tensor(weight.shape)}
    own["weight_scale"] = scales[..., 0].bfloat16()
    if not symmetric:
        own["weight_zero_point"] = words(points[..., 0].t().contiguous().numpy(), bits).t().contiguous()
    return own, dense


def fp8(weight, block):
    """Blocks (rows, columns) with a scale each, in fp32."""
    N, K = weight.shape
    rows, columns = block
    padded = torch.zeros(-(-N // rows) * rows, -(-K // columns) * columns, dtype=torch.float64)
    padded[:N, :K] = weight
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scales = (tiles.abs().amax((1, 3)) / 448).float()
    q = (tiles / scales[:, None, :, None].double()).float().to(torch.float8_e4m3fn)
    dense = (q.double() * scales[:, None, :, None].double()).flatten(0, 1).flatten(1)[:N, :K]
    return {"weight": q.flatten(0, 1).flatten(1)[:N, :K].contiguous(), "weight_scale_inv": scales}, dense


def int8(weight):
    """bitsandbytes' LLM.int8()."""
    most = weight.abs().amax(1)
    q = (weight / most[:, None] * 127).round().to(torch.int8)
    own = {"weight": q, "SCB": most.float(), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return own, q.double() * most.float().double()[:, None] / 127


def shuffled(K):
    return torch.randperm(K, generator=torch.Generator().manual_seed(K))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}


def ct(bits=4, group=32, symmetric=True):
    arguments = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    return CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}}}


CASES = {  # quantization_config, a packer, the kind that the layers are of
    "gptq": (GPTQ, gptq, Int4),
    "gptq, asymmetric": (GPTQ | {"sym": False}, lambda w: gptq(w, symmetric=False), Int4),
    "gptq v2": (
        GPTQ | {"checkpoint_format": "gptq_v2", "sym": False},
        lambda w: gptq(w, symmetric=False, version=2),
        Int4,
    ),
    "gptq in 8 bits": (GPTQ | {"bits": 8}, lambda w: gptq(w, 8), Grouped),
    "gptq in 8 bits, asymmetric": (GPTQ | {"bits": 8, "sym": False}, lambda w: gptq(w, 8, 32, False), Grouped),
    "gptq, whole rows": (GPTQ | {"group_size": -1}, lambda w: gptq(w, group=-1), Int4),
    "gptq in groups of 16": (GPTQ | {"group_size": 16}, lambda w: gptq(w, group=16), Grouped),
    "gptq in groups of 8": (GPTQ | {"group_size": 8}, lambda w: gptq(w, group=8), Plain),
    "gptq, desc_act": (GPTQ | {"desc_act": True}, lambda w: gptq(w, order=shuffled(w.shape[1])), Plain),
    "awq gemm": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq, Int4),
    "awq gemv": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
        lambda w: awq(w, version="gemv"),
        Int4,
    ),
    "compressed-tensors": (ct(), packed, Int4),
    "compressed-tensors, asymmetric": (ct(symmetric=False), lambda w: packed(w, symmetric=False), Int4),
    "compressed-tensors in 8 bits": (ct(8), lambda w: packed(w, 8), Grouped),
    "fp8 blocks": (
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
        lambda w: fp8(w, (32, 32)),
        Grouped,
    ),
    "fp8 tensors": ({"quant_method": "fp8"}, lambda w: fp8(w, w.shape), FP8),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8, Int8),
}


def write(plain: Path, folder: Path, settings: dict, pack) -> dict[str, torch.Tensor]:
    """The checkpoint with its projections packed, in `folder`; returns the state dict it stands for."""
    folder.mkdir(exist_ok=True)
    state, expected = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        module, _, key = name.rpartition(".")
        if module.endswith(PROJECTIONS) and key == "weight":
            own, dense = pack(tensor)
            state |= {f"{module}.{part}": t for part, t in own.items()}
            expected[name] = dense.float()
        else:
            state[name] = expected[name] = tensor
    save_file(state, folder / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return expected


def linears(path: Path, **options) -> dict[str, Linear]:
    model = load_model(path, dtype=torch.float32, **options)
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def stored(path: Path) -> dict[str, Linear]:
    """A file's linear layers as they are on disk."""
    state = torch_load(path)
    made = {}
    for name in (name.removesuffix(".weight") for name in state if name.endswith(".weight") and state[name].ndim == 2):
        own = {key: state[f"{name}.{key}"] for key in ("weight", "scales", "zeros") if f"{name}.{key}" in state}
        if "tok_embeddings" not in name:
            K = 96 if name.endswith("w2") else 64
            made[name] = Linear(K, len(own["weight"])).assign(own)
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_has_its_own_values(case, plain, tmp_path, capsys):
    settings, pack, kind = CASES[case]
    expected = write(plain, tmp_path / "q", settings, pack)
    shutil.copytree(plain, tmp_path / "dense")
    save_file(expected, tmp_path / "dense" / "model.safetensors")
    convert(tmp_path / "dense", torch.float32)
    ours, theirs = stored(convert(tmp_path / "q", None)), stored(tmp_path / "dense" / "model.pth")
    said = capsys.readouterr().err
    for name, linear in ours.items():
        want = theirs[name].weight
        if name == "output" or kind is Plain:
            assert linear.kind is Plain and torch.equal(linear.weight, want.bfloat16()), name
        else:
            assert linear.kind is kind, name
            torch.testing.assert_close(linear.dequantized(torch.float32), want, rtol=3e-7, atol=1e-9)  # fp32's rounding
    assert ("linear layers become bf16" in said) == (kind is Plain), said
    convert(tmp_path / "q", torch.float32)  # and in full precision where that is asked for
    for name, linear in stored(tmp_path / "q" / "model.pth").items():
        torch.testing.assert_close(linear.weight, theirs[name].weight, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize(
    "case,kind", [("gptq, asymmetric", Int4), ("awq gemm", Int4), ("fp8 tensors", FP8), ("gptq in 8 bits", Plain)]
)
def test_experts_one_by_one_stay_in_bits(case, kind, tmp_path, capsys):
    """Of a mixture, each of whose experts a file has by itself: but for groups of 8 bits, which become bf16."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96, "num_experts": 3, "head_dim": 16}
    sizes |= {"vocab_size": 259, "num_hidden_layers": 2, "mlp_only_layers": [0], "num_experts_per_tok": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    config = transformers.Qwen3MoeConfig(**sizes)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "plain")
    settings, pack, _ = CASES[case]
    expected = write(tmp_path / "plain", tmp_path / "q", settings, pack)
    ours, name = load_model(convert(tmp_path / "q", None), device="meta"), "layers.1.block_sparse_moe.cond_ffn"
    state = torch_load(tmp_path / "q" / "model.pth")
    for part, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        assert ours.get_submodule(f"{name}.{part}").kind is kind
        want = torch.stack([expected[f"model.layers.1.mlp.experts.{e}.{theirs}.weight"] for e in range(3)])
        own = (state.get(f"{name}.{part}.{key}") for key in ("weight", "scales", "zeros"))
        got = ops.dequantize(*own, torch.float32)[..., : want.shape[2]]
        torch.testing.assert_close(got, want.bfloat16().float() if kind is Plain else want, rtol=3e-7, atol=1e-9)
    said = "3 of 11 linear layers become bf16 (experts in groups of 8 bits fit no layout)"
    assert (said in capsys.readouterr().err) == (kind is Plain)


def gguf_rows(kind: str, K: int, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows uint8 (count, bytes) of a type, and the package's fp32 values (count, K): of random bytes those blocks whose
    scales are finite and about 1."""
    of, generator = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[of]
    found, need = [], count * -(-K // block)
    while sum(map(len, found)) < need:
        raw = generator.integers(0, 256, (4096, size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            most = np.abs(gguf.quants.dequantize(raw, of)).max(1)
        found.append(raw[(most < 1000) & (most > 0.001)])
    rows = np.concatenate(found)[:need].reshape(count, -1)
    return torch.from_numpy(rows), torch.from_numpy(gguf.quants.dequantize(rows, of)).view(count, -1)


@pytest.mark.parametrize("kind", sorted(kind.name for kind in gguf.quants._type_traits))
def test_every_gguf_type_has_the_packages_values(kind):
    """All that the package dequantises: in bits where BLOCKS has them, else as floating point, and says so."""
    rows, expected = gguf_rows(kind, 512)
    lazy = _lazy("w", GGUFTensor((8, 512), gguf.GGMLQuantizationType[kind], memoryview(bytearray(rows.numpy()))))
    assert torch.equal(lazy.read(), expected)
    if kind not in BLOCKS:
        assert lazy.quantised is None and lazy.why == ("" if kind == "BF16" else f"GGUF type {kind} fits no layout")
        return
    tensors, like = lazy.quantised.read(), lazy.quantised.layout.like(8, 512)
    assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {k: (t.shape, t.dtype) for k, t in like.items()}
    got = dense_of(tensors, 512)
    if kind in ("Q4_0", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"):
        assert torch.equal(got, expected)
    else:  # scales and zeros are rounded to fp16
        span = expected.abs().unflatten(1, (-1, 32)).amax(2, True).expand(-1, -1, 32).flatten(1)
        assert ((got - expected).abs() <= 2**-10 * span + 2**-20).all()


def test_gguf_types_of_no_weights_are_named():
    """The package has no code for them: ggml multiplies with Q8_1 and Q8_K, and writes neither."""
    rows = torch.arange(8, dtype=torch.float64)
    lazy = _lazy("w", GGUFTensor((2, 4), gguf.GGMLQuantizationType.F64, memoryview(bytearray(rows.numpy()))))
    assert torch.equal(lazy.read(), rows.view(2, 4))
    with pytest.raises(UserError, match="'w' has GGUF type Q8_1, which the gguf package cannot dequantise"):
        _lazy("w", GGUFTensor((1, 32), gguf.GGMLQuantizationType.Q8_1, memoryview(bytearray(40)))).read()


LIBRARY = {  # a file of DATA: its scheme, settings, and the kind that it is read as
    "bitsandbytes_nf4": ("bitsandbytes", {}, Plain),
    "bitsandbytes_nf4_nested": ("bitsandbytes", {}, Plain),
    "bitsandbytes_int8": ("bitsandbytes", {}, Int8),
    "compressed_tensors_int4": ("compressed-tensors", {"group_size": 32, "num_bits": 4}, Int4),
    "compressed_tensors_int4_asymmetric": ("compressed-tensors", {"group_size": 32, "num_bits": 4}, Int4),
    "compressed_tensors_int8_channel": ("compressed-tensors", {"num_bits": 8}, Int8),
    "compressed_tensors_fp8_channel": ("compressed-tensors", {"num_bits": 8}, FP8),
    "compressed_tensors_fp8_block": ("compressed-tensors", {"num_bits": 8, "block_structure": [8, 32]}, Grouped),
    "compressed_tensors_nvfp4": ("compressed-tensors", {"num_bits": 4, "group_size": 16}, Grouped),
    "awq_gemm": ("awq", {"group_size": 32}, Int4),
}


def read_module(method: str, settings: dict, tensors: dict[str, torch.Tensor]) -> Lazy:
    """The weight of a module "m" that has these tensors."""
    named = {f"m.{key}": Lazy(tuple(t.shape), lambda t=t: t) for key, t in tensors.items()}
    return dequantisable("config.json", {"quant_method": method, **settings}, named)["m.weight"]


@pytest.mark.parametrize("name", LIBRARY)
def test_what_the_library_wrote_has_the_librarys_values(name):
    """Made by bitsandbytes 0.50, compressed-tensors 0.20 and AutoAWQ 0.2.9, with what they dequantise it to."""
    method, settings, kind = LIBRARY[name]
    tensors = load_file(DATA / f"{name}.safetensors")
    expected = tensors.pop("expected")
    if method == "compressed-tensors":
        settings = {"format": "mixed-precision", "config_groups": {"group_0": {"weights": settings}}}
    lazy = read_module(method, settings, tensors)
    got = lazy.read()
    # Libraries round products to the dtype of their scales; here they are exact.
    rounding = {"awq": torch.half, "compressed-tensors": torch.bfloat16}.get(method)
    torch.testing.assert_close(got.to(rounding).float() if rounding else got, expected, rtol=3e-7, atol=0)
    if kind is Plain:
        assert lazy.quantised is None and lazy.why
    else:
        assert Linear(lazy.shape[1], lazy.shape[0]).assign(lazy.quantised.read()).kind is kind


def test_modelopts_nvfp4_multiplies_with_its_second_scale():
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (8, 32), generator=generator, dtype=torch.uint8)
    scales, second = torch.rand(8, 4, generator=generator).to(torch.float8_e4m3fn), torch.tensor(0.37)
    lazy = read_module("modelopt", {}, {"weight": packed, "weight_scale": scales, "weight_scale_2": second})
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    q = torch.tensor([[values[v] for byte in row for v in (byte % 16, byte // 16)] for row in packed.tolist()])
    expected = q * (scales.float() * second).repeat_interleave(16, 1)
    torch.testing.assert_close(lazy.read(), expected, rtol=1e-7, atol=0)


GOOD = {  # a 4-bit GPTQ module (N, K) = (16, 64) in groups of 32
    "qweight": torch.zeros(8, 16, dtype=torch.int32),
    "qzeros": torch.zeros(2, 2, dtype=torch.int32),
    "scales": torch.ones(2, 16, dtype=torch.float16),
    "g_idx": torch.arange(64, dtype=torch.int32) // 32,
}
PACKED = {
    "weight_packed": torch.zeros(16, 8, dtype=torch.int32),
    "weight_shape": torch.tensor([16, 64]),
    "weight_scale": torch.ones(16, 2),
}
FP8_TENSORS = {"weight": torch.zeros(16, 64).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 2)}
AWQ = {"qweight": torch.zeros(64, 2, dtype=torch.int32), "qzeros": GOOD["qzeros"], "scales": GOOD["scales"]}
INT8 = torch.zeros(16, 64, dtype=torch.int8)
GPTQ_SETTINGS = {"bits": 4, "group_size": 32}
CT_SETTINGS = {
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
}
BAD = {
    "an unknown method": ("hqq", {}, GOOD, r"quant_method 'hqq' is not supported; supported: gptq, awq, .*modelopt"),
    "no method": (None, {}, GOOD, "quant_method None is not supported; supported: "),
    "bits": ("gptq", {"bits": 3, "group_size": 32}, GOOD, "bits is 3; accepted: .*4.*8"),
    "a group": ("gptq", {"bits": 4, "group_size": 0}, GOOD, "group_size is 0; accepted"),
    "another group": (
        "gptq",
        {"bits": 4, "group_size": 16},
        GOOD,
        r"has shape \[2, 16\]; gptq needs \[4, 16\]",
    ),
    "a format": (
        "gptq",
        GPTQ_SETTINGS | {"checkpoint_format": "marlin"},
        GOOD,
        "accepted: gptq or gptq_v2",
    ),
    "no scales": ("gptq", GPTQ_SETTINGS, {k: t for k, t in GOOD.items() if k != "scales"}, "m lacks scales, which a "),
    "points": ("gptq", GPTQ_SETTINGS, GOOD | {"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, "m.qzeros has shape"),
    "g_idx": ("gptq", GPTQ_SETTINGS, GOOD | {"g_idx": GOOD["g_idx"] + 1}, "m.g_idx names groups 1 to 2; there are 2"),
    "a dtype": (
        "gptq",
        GPTQ_SETTINGS,
        GOOD | {"scales": torch.ones(2, 16, dtype=torch.int32)},
        "scales is int32; gptq",
    ),
    "awq's bits": ("awq", {"bits": 8}, GOOD, "bits is 8; accepted: an integer from 4 to 4"),
    "awq's version": ("awq", {"version": "marlin"}, GOOD, "version is 'marlin'; accepted: "),
    "ct's format": (
        "compressed-tensors",
        {"format": "marlin-24"},
        PACKED,
        "format is .*; accepted: .*pack-qu",
    ),
    "ct's bits": (
        "compressed-tensors",
        CT_SETTINGS,
        PACKED | {"weight_packed": torch.zeros(16, 6, dtype=torch.int32)},
        r"6 words for 64 inputs, of \[4\] bits; 4 and 8 are supported",
    ),
    "ct's scales": (
        "compressed-tensors",
        CT_SETTINGS,
        {k: t for k, t in PACKED.items() if k != "weight_scale"},
        "m lacks weight_scale",
    ),
    "ct's groups": (
        "compressed-tensors",
        CT_SETTINGS,
        PACKED | {"weight_scale": torch.ones(16, 3)},
        r"m.weight_scale has 3 groups for 64 inputs; the config says \[32\]",
    ),
    "ct's scales of fewer rows": (
        "compressed-tensors",
        CT_SETTINGS,
        PACKED | {"weight_scale": torch.ones(15, 1)},
        r"m.weight_scale has shape \[15, 1\]; .* needs \[16, any\]",
    ),
    "ct's points": (
        "compressed-tensors",
        CT_SETTINGS,
        PACKED | {"weight_zero_point": torch.zeros(15, 2, dtype=torch.int8)},
        "m.weight_zero_point has 30 values for 16 x 2 groups",
    ),
    "blocks": ("fp8", {"weight_block_size": [16, 16]}, FP8_TENSORS, r"\[1, 2\]; fp8 needs \[1, 4\]"),
    "no blocks": ("fp8", {}, FP8_TENSORS, "m.weight_scale_inv has shape .* no weight_block_size of two"),
    "fp8 of a damaged scale": (
        "fp8",
        {},
        FP8_TENSORS | {"weight_scale_inv": torch.ones(16, 3)},
        "has shape .16, 3., and",
    ),
    "fp8's dtype": (
        "fp8",
        {},
        {"weight": torch.zeros(16, 64), "weight_scale": torch.ones(1)},
        "weight is float32; fp8 ha",
    ),
    "a negative g_idx": (
        "gptq",
        GPTQ_SETTINGS,
        GOOD | {"g_idx": GOOD["g_idx"] - 1},
        "names groups -1 to 0; there are 2",
    ),
    "g_idx of another length": ("gptq", GPTQ_SETTINGS, GOOD | {"g_idx": GOOD["g_idx"][:32]}, r"g_idx has shape \[32\]"),
    "ct's g_idx": (
        "compressed-tensors",
        CT_SETTINGS,
        PACKED | {"weight_g_idx": torch.full((64,), 2)},
        "m.weight_g_idx names group 2; there are 2",
    ),
    "awq without points": (
        "awq",
        {"group_size": 32},
        {k: t for k, t in AWQ.items() if k != "qzeros"},
        "m lacks qzeros, which a",
    ),
    "int8's factors": (
        "bitsandbytes",
        {},
        {"weight": INT8, "SCB": torch.ones(3)},
        r"SCB has shape \[3\]; .* needs \[16\]",
    ),
    "int8's dtype": (
        "bitsandbytes",
        {},
        {"weight": INT8.float(), "SCB": torch.ones(16)},
        "weight is float32; bitsandb",
    ),
    "nvfp4's group": (
        "modelopt",
        {},
        {"weight": INT8.byte(), "weight_scale": torch.ones(16, 4), "weight_scale_2": torch.ones(())},
        r"weight_scale has shape \[16, 4\]; modelopt needs \[16, 8\]",
    ),
    "nvfp4's second scale": (
        "modelopt",
        {},
        {"weight": INT8.byte(), "weight_scale": torch.ones(16, 8), "weight_scale_2": torch.ones(0)},
        r"weight_scale_2 has shape \[0\]; modelopt needs \[1\]",
    ),
    "nf4's state": (
        "bitsandbytes",
        {},
        {"weight": torch.zeros(8, 1), MARKERS[0]: torch.tensor(list(b"[]"), dtype=torch.uint8)},
        "is no JSON object",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line(case):
    method, settings, tensors, words = BAD[case]
    with pytest.raises(UserError, match=words) as error:
        read_module(method, settings, tensors).quantised.read()
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_fp8_that_is_no_number_is_one_line(plain, tmp_path):
    settings, pack, _ = CASES["fp8 tensors"]
    write(plain, tmp_path, settings, pack)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[3, 5] = 0x7F
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj\.weight holds NaN or infinite weights"):
        convert(tmp_path, None)
    assert not (tmp_path / "model.pth").exists()


def write_gguf(path: Path, plain: Path, kinds: dict[str, str]) -> None:
    """The checkpoint's state dict as a GGUF whose matrices are of a type, by what their names end in."""
    writer, config = gguf.GGUFWriter(path, "llama"), json.loads((plain / "config.json").read_text())
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    vocab = json.loads((plain / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_token_list(sorted(vocab, key=vocab.get))
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 256)
    writer.add_token_merges(["a b"])
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = "self_attn.q_proj attn_q self_attn.k_proj attn_k self_attn.v_proj attn_v self_attn.o_proj attn_output "
    parts += "mlp.gate_proj ffn_gate mlp.up_proj ffn_up mlp.down_proj ffn_down input_layernorm attn_norm "
    parts += "post_attention_layernorm ffn_norm"
    of = dict(zip(*[iter(parts.split())] * 2))
    for name, tensor in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight")
        short = names.get(module) or f"blk.{module.split('.')[2]}.{of['.'.join(module.split('.')[3:])]}"
        kind = next((kind for end, kind in kinds.items() if short.endswith(end)), "F32") if tensor.ndim == 2 else "F32"
        of_type = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(tensor.numpy(), of_type)
        writer.add_tensor(f"{short}.weight", data, raw_dtype=of_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_of_mixed_types_stays_in_bits(plain, tmp_path, capsys):
    """As in llama.cpp's mixtures, v has more bits than q and k, with which it is one layer here."""
    kinds = {"attn_v": "Q8_0", "ffn_down": "Q8_0", "attn_output": "F16", "blk.1.ffn_up": "Q5_0", "ffn_gate": "Q4_1"}
    write_gguf(tmp_path / "m.gguf", plain, kinds | {"attn_q": "Q4_0", "attn_k": "Q4_0", "output": "Q4_0"})
    layers = stored(convert(tmp_path, None))
    found = {name: linear.kind for name, linear in layers.items()}
    assert found["layers.0.attention.wqkv"] is Grouped and found["output"] is Int4
    assert found["layers.0.attention.wo"] is Plain and found["layers.0.feed_forward.w1"] is Int4
    assert found["layers.1.feed_forward.w3"] is Grouped and found["layers.1.feed_forward.w2"] is Grouped
    assert "become bf16" not in capsys.readouterr().err  # F16 has no bits to keep
    bits = {name: linear.dequantized(torch.float32) for name, linear in layers.items()}
    for name, linear in stored(convert(tmp_path, torch.float32)).items():
        bound = 2**-8 if found[name] is Plain else 2**-10 if "w1" in name else 0  # bf16, and Q4_1's zeros in fp16
        torch.testing.assert_close(bits[name], linear.weight, rtol=bound, atol=bound * linear.weight.abs().max().item())


@pytest.mark.parametrize("case", ["gptq, asymmetric", "fp8 blocks"])
def test_ranks_and_rows_give_what_one_process_does(case, plain, tmp_path):
    """Every rank's part has the values of the whole, and any number of rows the result of the plain matrix."""
    settings, pack, _ = CASES[case]
    write(plain, tmp_path, settings, pack)
    path = convert(tmp_path, None)
    whole = linears(path)
    for rank in (0, 1):
        for name, linear in linears(path, tp=TensorParallel(rank, 2)).items():
            if linear.columns is not None:
                part = whole[name].dequantized(torch.float32)[:, linear.columns.start : linear.columns.stop]
                assert torch.equal(linear.dequantized(torch.float32)[:, : part.shape[1]], part), name
    ours, dense = (load_model(path, dtype=torch.float32) for _ in range(2))
    for linear in (module for module in dense.modules() if isinstance(module, Linear)):
        linear.assign({"weight": linear.dequantized(torch.float32)})
        linear.backends = (ops.plain,)
    tokens = torch.randint(0, 259, (1, 12), generator=torch.Generator().manual_seed(0))
    start = torch.zeros(1, dtype=torch.int32)
    got, want = (m(tokens, start, m.cache(1, 16).first(12), all_logits=True) for m in (ours, dense))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_a_converted_model_speculates_and_is_evaluated(plain, tmp_path):
    """Text with drafts is that without, and scores are those of the same weights in full precision."""
    settings, pack, _ = CASES["gptq, asymmetric"]
    write(plain, tmp_path, settings, pack)
    shutil.copy(plain / "tokenizer.json", tmp_path)
    model, dense = (load_model(convert(tmp_path, None), dtype=torch.float32) for _ in range(2))
    texts = []
    for draft in (None, "prompt_lookup", load_model(tmp_path / "model.pth", dtype=torch.float32)):
        llm = Engine(model, batch_size=2, max_seq_length=64, sampler=Sampler(temperature=0), draft=draft, speculate_k=3)
        texts.append(list(generate(llm, [[5, 6, 7, 5, 6], [9]], 40, is_stop=lambda row, token: False)))
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 0
    for linear in (module for module in dense.modules() if isinstance(module, Linear)):
        linear.assign({"weight": linear.dequantized(torch.float32)})
        linear.backends = (ops.plain,)
    tokenizer = load_tokenizer(tmp_path)
    ours, theirs = (
        perplexity(LanguageModel(m, tokenizer), "quantised " * 20, window=32)["nll"] for m in (model, dense)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_export_writes_what_gptqs_readers_read(plain, tmp_path, capsys):
    """Quantised, exported, and read again by our reader, and by one in float64 that knows the format alone."""
    source = tmp_path / "ours"
    shutil.copytree(plain, source)
    (source / "text.txt").write_text("".join(chr(97 + i * i % 23) for i in range(4000)))
    how = ["--mode", "int4-gptq", "--groupsize", "64", "--calibration_file", str(source / "text.txt")]
    quantize.main(["--checkpoint_path", str(source / "model.pth"), "--device", "cpu", *how])
    path = source / "model_int4-gptq.g64.pth"
    quantize.main(["--checkpoint_path", str(path), "--export", "gptq"])
    folder = Path(capsys.readouterr().out.split()[-1])
    ours, tensors = linears(path), load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "gptq" and settings["group_size"] == 64 and (folder / "tokenizer.json").exists()

    state = {}
    for name, words in tensors.items():
        module = name.rpartition(".")[0]
        if not name.endswith(("qweight", "qzeros", "scales", "g_idx")):
            state[name] = words.float()
        elif name.endswith("qweight"):
            q, points = (np.asarray(t).view(np.uint32) for t in (words, tensors[f"{module}.qzeros"]))
            K, N = 8 * q.shape[0], q.shape[1]
            q = np.array([[q[k // 8, n] >> 4 * (k % 8) & 15 for k in range(K)] for n in range(N)], np.float64)
            group = np.asarray(tensors[f"{module}.g_idx"])
            points = np.array([[(points[g, n // 8] >> 4 * (n % 8) & 15) + 1 for g in group] for n in range(N)])
            scales = np.asarray(tensors[f"{module}.scales"], np.float64).T[:, group]
            state[f"{module}.weight"] = torch.from_numpy((q - points) * scales).float()
    assert sum(name.endswith("proj.weight") for name in state) == 14
    (tmp_path / "dense").mkdir()
    save_file(state, tmp_path / "dense" / "model.safetensors")
    shutil.copy(plain / "config.json", tmp_path / "dense")
    independent = linears(convert(tmp_path / "dense", torch.float32))
    again = linears(convert(folder, None))
    for name, linear in ours.items():
        expected = linear.dequantized(torch.float32)
        expected = expected.bfloat16().float() if name == "output" else expected
        assert torch.equal(independent[name].weight, expected), name
        assert torch.equal(again[name].dequantized(torch.float32), expected), name
        assert again[name].kind is (Plain if name == "output" else Int4)


def test_what_cannot_be_exported_is_one_line(plain, tmp_path):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    quantize.main(["--checkpoint_path", str(tmp_path / "model.pth"), "--mode", "int4", "--device", "cpu"])
    for name, words in {
        "model.pth": "model.pth is no int4 checkpoint; make one with --mode int4-gptq",
        "model_int4.g32.pth": "proj has zeros or scales that GPTQ's files cannot hold; --mode int4-gptq makes others",
    }.items():
        with pytest.raises(UserError, match=words):
            export(tmp_path / name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "olmo2"}))
    with pytest.raises(UserError, match="cannot export model_type 'olmo2'; supported: llama, mistral"):
        export(tmp_path / "model_int4.g32.pth")
    assert not list(tmp_path.glob("*-gptq"))
