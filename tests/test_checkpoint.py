"""Every source format gives the same model; damaged ones are refused by name and leave nothing behind."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import REPO
from safetensors.torch import load_file, save_file
from test_model import build

import linear
import ops
from checkpoint import load_model, new_state_dict, read_config, torch_load
from errors import UserError
from formats.config import BUILTIN, llama3_scaling
from formats.convert import convert
from formats.gguf_file import read_gguf
from linear import Int8
from model import ModelConfig, rope_table
from quantize import quantize_checkpoint

GGUF = {
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


@pytest.fixture
def hf(tmp_path):
    """A directory with a tiny Llama in one safetensors file, and the state dict it converts to."""
    source = tmp_path / "hf"
    build(source, "llama3")
    state = dict(torch_load(convert(source, torch.float32)))
    (source / "model.pth").unlink()
    return source, state


def assert_same(directory, state):
    written = torch_load(convert(directory, torch.float32))
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(written[name], tensor), name


def meta_names(state):
    """The state dict in Meta's names, which keep queries, keys and values apart."""
    out = {}
    for name, tensor in state.items():
        if ".wqkv." in name:
            for key, part in zip("qkv", tensor.split((32, 16, 16))):
                out[name.replace("wqkv", f"w{key}")] = part.clone()
        else:
            out[name] = tensor.clone()
    return out


PARAMS = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6, "rope_theta": 500000.0}


def test_sharded_safetensors(tmp_path, hf):
    build(tmp_path / "sharded", "llama3", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_same(tmp_path / "sharded", hf[1])


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_shards(tmp_path, hf, zipped):
    source, state = hf
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/config.json").write_text((source / "config.json").read_text())
    index = {}
    for i, names in enumerate((list(tensors)[:9], list(tensors)[9:])):
        shard = f"pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({n: tensors[n] for n in names}, tmp_path / "bin" / shard, _use_new_zipfile_serialization=zipped)
        index |= dict.fromkeys(names, shard)
    (tmp_path / "bin/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(tmp_path / "bin", state)


@pytest.mark.parametrize("folder", [".", "original"])
@pytest.mark.parametrize("style", ["one", "llama2", "llama3"])
def test_meta(tmp_path, hf, style, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    state = {name: t[:96] if len(t) == 97 else t for name, t in hf[1].items()}  # a vocabulary that halves
    for rank in range(1 if style == "one" else 2):
        shard = {"rope.freqs": torch.ones(4)}
        for name, tensor in meta_names(state).items():
            by_rows = any(k in name for k in ("wq", "wk", "wv", "w1", "w3", "output"))
            by_rows = style == "llama3" if "tok_embeddings" in name else by_rows
            whole = style == "one" or tensor.ndim < 2
            shard[name] = tensor if whole else tensor.chunk(2, 0 if by_rows else 1)[rank].clone()
        torch.save(shard, tmp_path / folder / f"consolidated.{rank:02}.pth")
    (tmp_path / folder / "params.json").write_text(json.dumps(PARAMS))
    assert_same(tmp_path, state)
    config = read_config(tmp_path)
    assert (config.intermediate_size, config.rope_base, config.norm_eps) == (48, 500000.0, 1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c(tmp_path, hf, tied):
    names = {f"_orig_mod.{name}": tensor for name, tensor in meta_names(hf[1]).items()}
    if tied:
        names["_orig_mod.output.weight"] = names["_orig_mod.tok_embeddings.weight"]
    args = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "max_seq_len": 64}
    torch.save({"model": names, "model_args": args, "iter_num": 1}, tmp_path / "stories1M.pt")
    expected = {name: t for name, t in hf[1].items() if not (tied and name == "output.weight")}
    assert_same(tmp_path, expected)
    assert read_config(tmp_path).tied is tied


def write_gguf(path, state, kind, arch="llama", split=(32, 16, 16), extra=None, layers=3):
    """A GGUF file of the state dict, with quantised matrices; returns the state dict it stands for."""
    writer, expected = gguf.GGUFWriter(path, arch), {}
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(ord("!") + i) if i < 93 else f"<{i}>" for i in range(96)] + ["ab"])
    writer.add_token_types([1] * 93 + [3] * 3 + [1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(94)
    writer.add_eos_token_id(95)

    def add(name, tensor):
        quantised = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.numpy(), quantised)
        writer.add_tensor(name, data, raw_dtype=quantised)
        return torch.from_numpy(gguf.quants.dequantize(data, quantised).reshape(tensor.shape).copy())

    top = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
    for name, tensor in state.items():
        ours = name.removesuffix(".weight")
        if ours in top:
            expected[name] = add(f"{top[ours]}.weight", tensor)
            continue
        _, layer, part = ours.split(".", 2)
        if part == "attention.wqkv":
            parts = zip("qkv", tensor.split(split))
            expected[name] = torch.cat([add(f"blk.{layer}.attn_{k}.weight", t.contiguous()) for k, t in parts])
        else:
            expected[name] = add(f"blk.{layer}.{GGUF[part]}.weight", tensor)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def even(state):
    """Feed-forward width 64, so that GGUF's blocks of 32 divide every row."""
    out = dict(state)
    for name, tensor in state.items():
        if ".w2." in name:
            out[name] = torch.nn.functional.pad(tensor, (0, 16), value=0.5)
        elif ".w1." in name or ".w3." in name:
            out[name] = torch.nn.functional.pad(tensor, (0, 0, 0, 16), value=0.25)
    return out


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf(tmp_path, hf, kind):
    expected = write_gguf(tmp_path / "tiny.gguf", even(hf[1]), gguf.GGMLQuantizationType[kind])
    assert_same(tmp_path, expected)
    assert read_config(tmp_path).rope_base == 500000.0
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        json.loads((tmp_path / name).read_text())


def split_gguf(folder, state):
    """The state dict's GGUF in two parts, named as llama.cpp does: their paths, and the state dict they stand for."""
    expected = write_gguf(folder / "whole.gguf", state, gguf.GGMLQuantizationType.Q8_0)
    whole = read_gguf(folder / "whole.gguf")
    (folder / "whole.gguf").unlink()
    names, paths = list(whole.tensors), [folder / f"m-{i:05}-of-00002.gguf" for i in (1, 2)]
    for no, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", no)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(names))
        for key, value in {} if no else whole.metadata.items():
            if key != "general.architecture":
                writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        for name in names[:7] if no else names[7:]:
            tensor = whole.tensors[name]
            rows = np.frombuffer(tensor.data, np.uint8).reshape(*tensor.shape[:-1], -1)
            writer.add_tensor(name, rows, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths, expected


def test_gguf_in_parts_is_one_model(tmp_path, hf):
    (first, second), expected = split_gguf(tmp_path, even(hf[1]))
    assert_same(tmp_path, expected)
    for lost in (first, second):
        lost.rename(tmp_path / "away")
        with pytest.raises(UserError, match=rf"lacks {lost.name}: all parts of a model are needed"):
            convert(tmp_path)
        (tmp_path / "away").rename(lost)
    (tmp_path / "other.gguf").touch()
    with pytest.raises(UserError, match=r"holds several models: m-00001-of-00002\.gguf, .*, other\.gguf; keep one"):
        convert(tmp_path)
    (tmp_path / "other.gguf").unlink()
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"lacks m-00002-of-00002\.gguf"):
        convert(tmp_path)


def header(*values, tensors=0, count=None):
    """A GGUF's header with so many keys (of one byte each): their values' bytes, types before them."""
    keys = b"".join(struct.pack("<Q", 1) + bytes([65 + i]) + value for i, value in enumerate(values))
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values) if count is None else count) + keys


def info(shape, kind=0, offset=0):
    """The header of a tensor called t."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Qc", 1, b"t") + sizes + struct.pack("<IQ", kind, offset) + bytes(99)


MANY = 2**63
BAD_GGUF = {
    "no magic": (b"GGML" + bytes(99), "begins with b'GGML'"),
    "a version": (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version is 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version is"),
    "keys without end": (header(count=MANY), "ends within its header"),
    "tensors without end": (header(tensors=MANY), "ends within its header"),
    "a long text": (header(struct.pack("<IQ", 8, MANY)), "ends within its header"),
    "a long array": (header(struct.pack("<IIQ", 9, 10, MANY)), "ends within its header"),
    "a long array of texts": (header(struct.pack("<IIQ", 9, 8, MANY) + bytes(999)), "ends within its header"),
    "arrays in arrays": (header(struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000), "type 9 in 4 arrays"),
    "arrays without end": (header(struct.pack("<IIQ", 9, 9, MANY) + struct.pack("<IQ", 4, 0) * 99), "ends within"),
    "an unknown type": (header(struct.pack("<I", 99)), "type 99"),
    "a key twice": (header(count=2) + (struct.pack("<QcI", 1, b"k", 0) + b"0") * 2, "'k' twice"),
    "bytes that are no text": (header(struct.pack("<IQ", 8, 1) + b"\xff"), "utf-8"),
    "an offset beyond": (header(tensors=1) + info([32], offset=2**64 - 32), "does not fit"),
    "an offset askew": (header(tensors=1) + info([1], offset=1), "does not fit"),
    "a large tensor": (header(tensors=1) + info([2**40, 2**40]), "does not fit"),
    "half a block": (header(tensors=1) + info([16], kind=2), "does not fit"),
    "an unknown quantisation": (header(tensors=1) + info([1], kind=77), "77"),
    "many dimensions": (header(tensors=1) + struct.pack("<QcI", 1, b"t", 2**32 - 1), "4294967295 dimensions"),
    "no dimensions": (header(tensors=1) + info([]), "0 dimensions"),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_gguf_is_checked_before_it_is_believed(tmp_path, case):
    data, words = BAD_GGUF[case]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UserError, match=rf"m.gguf is truncated or not a GGUF file .*{words}") as error:
        convert(tmp_path)
    assert len(str(error.value)) <= 300


def test_gguf_of_smollm3_knows_which_layers_do_not_rotate(tmp_path, hf):
    state = {name: tensor for name, tensor in even(hf[1]).items() if not name.startswith("layers.")}
    state |= {
        name.replace("layers.0.", f"layers.{i}."): tensor
        for name, tensor in even(hf[1]).items()
        if name.startswith("layers.0.")
        for i in range(5)
    }
    write_gguf(tmp_path / "tiny.gguf", state, gguf.GGMLQuantizationType.F32, arch="smollm3", layers=5)
    convert(tmp_path)
    assert read_config(tmp_path).rope_layers == (True, True, True, False, True)


def test_a_conversion_that_cannot_write_the_config_leaves_nothing(tmp_path, hf, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", even(hf[1]), gguf.GGMLQuantizationType.F32)

    def full(path, *_, **__):
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"cannot write .*config\.json: No space left"):
        convert(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["tiny.gguf"]


def test_gguf_of_a_type_that_the_package_does_not_know(tmp_path, hf, monkeypatch):
    kind = gguf.GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "tiny.gguf", even(hf[1]), kind)
    monkeypatch.delitem(gguf.quants._type_traits, kind)
    with pytest.raises(UserError, match=r"has GGUF type Q8_0, which the gguf package cannot dequantise"):
        convert(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".pth"] == []


def test_gguf_recovers_llama3_rope_scaling(tmp_path, hf):
    config = {**BUILTIN["7B"], "head_dim": 8, "rope_theta": 500000.0}
    scalings = (None, llama3_scaling(32.0))
    tables = [rope_table(ModelConfig.from_hf({**config, "rope_scaling": s}), 2) for s in scalings]
    angles = [torch.atan2(table[1, :, 1], table[1, :, 0]) for table in tables]
    factors = (angles[0] / angles[1]).numpy().astype(np.float32)
    write_gguf(tmp_path / "a.gguf", even(hf[1]), gguf.GGMLQuantizationType.F32, extra={"rope_freqs.weight": factors})
    convert(tmp_path)
    assert dict(read_config(tmp_path).rope_scaling)["factor"] == pytest.approx(32.0)
    other = tmp_path / "other"
    other.mkdir()
    wrong = np.linspace(1, 32, 4, dtype=np.float32)
    write_gguf(other / "b.gguf", even(hf[1]), gguf.GGMLQuantizationType.F32, extra={"rope_freqs.weight": wrong})
    with pytest.raises(UserError, match=r"rope_freqs.weight is not Llama 3.1's scaling"):
        convert(other)


def test_model_name_stands_for_a_missing_config(tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**BUILTIN["stories15M"])).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        convert(tmp_path)
    convert(tmp_path, model_name="stories15M")
    assert read_config(tmp_path) == ModelConfig.from_name("stories15M")
    with pytest.raises(UserError, match=r"config.json says what the model is; --model_name is for weights without it"):
        convert(tmp_path, model_name="7B")


@pytest.mark.parametrize("name", ["consolidated.00.pth", "stories1M.pt", "m.gguf"])
def test_model_name_is_of_no_use_to_formats_that_say_it(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{name} says what the model is; --model_name is for Hugging Face's weights"):
        convert(tmp_path, model_name="7B")


def test_an_untied_output_makes_a_config_that_says_so(tmp_path, monkeypatch):
    config = transformers.LlamaConfig(**BUILTIN["stories15M"], tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    monkeypatch.setitem(BUILTIN, "stories15M", {**BUILTIN["stories15M"], "tie_word_embeddings": True})
    convert(tmp_path, model_name="stories15M")
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert "output.weight" in torch_load(tmp_path / "model.pth")


def damage(source, change):
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"missing tensors: model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (
            lambda t: t.update({"model.layers.0.extra.weight": torch.ones(2)}),
            r"unexpected tensors: model\.layers\.0\.extra",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model\.norm\.weight \[31\]; norm\.weight needs \[32\]",
        ),
        (
            lambda t: t.update({"model.layers.2.self_attn.k_proj.weight": torch.ones(15, 32)}),
            r"k_proj\.weight \[15, 32\].*wqkv\.weight needs \[64, 32\]",
        ),
        (lambda t: t["lm_head.weight"][3].fill_(float("nan")), r"lm_head\.weight holds NaN"),
    ],
)
def test_damaged_tensors_are_named(hf, change, words):
    source, _ = hf
    damage(source, change)
    with pytest.raises(UserError, match=words):
        convert(source)
    assert not list(source.glob("model.pth*"))


def test_truncated_files(tmp_path, hf):
    source, state = hf
    write_gguf(tmp_path / "t.gguf", even(state), gguf.GGMLQuantizationType.F16)
    torch.save(meta_names(state), tmp_path / "consolidated.00.pth")
    files = {
        "model.safetensors": (source / "model.safetensors").read_bytes(),
        "t.gguf": (tmp_path / "t.gguf").read_bytes(),
        "consolidated.00.pth": (tmp_path / "consolidated.00.pth").read_bytes(),
        "pytorch_model.bin": (tmp_path / "consolidated.00.pth").read_bytes(),
    }
    for name, data in files.items():
        for part in (0.0, 0.3, 0.9):
            directory = tmp_path / f"{name}-{part}"
            directory.mkdir()
            (directory / "config.json").write_text((source / "config.json").read_text())
            (directory / "params.json").write_text(json.dumps(PARAMS))
            (directory / name).write_bytes(data[: int(len(data) * part)])
            with pytest.raises(UserError, match=rf"{name}.* is truncated"):
                convert(directory)
            assert not list(directory.glob("model.pth*"))


def kinds_of(weight):
    """Tensors of its shape whose values a cast does not give, by what they are called."""
    return {
        "int8": weight.to(torch.int8),
        "bool": weight > 0,
        "float8_e4m3fn": weight.to(torch.float8_e4m3fn),
        "complex64": weight.to(torch.complex64),
        "meta": weight.to("meta"),
        "sparse_coo": weight.to_sparse(),
    }


@pytest.mark.parametrize("kind", kinds_of(torch.ones(2, 2)))
def test_weights_must_be_dense_and_real(tmp_path, hf, kind):
    source, state = hf
    name, theirs = "model.layers.1.self_attn.o_proj.weight", "layers.1.attention.wo.weight"
    tensors, config = load_file(source / "model.safetensors"), (source / "config.json").read_text()
    odd = kinds_of(tensors[name])[kind]
    folders = ["bin", "meta", "story"]
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(config)
    (tmp_path / "meta" / "params.json").write_text(json.dumps(PARAMS))
    torch.save({**tensors, name: odd}, tmp_path / "bin" / "pytorch_model.bin")
    torch.save({**meta_names(state), theirs: odd}, tmp_path / "meta" / "consolidated.00.pth")
    story = {"model": {**meta_names(state), theirs: odd}, "model_args": PARAMS}
    torch.save(story, tmp_path / "story" / "stories1M.pt")
    if kind in ("int8", "bool", "float8_e4m3fn"):
        save_file({**tensors, name: odd}, source / "model.safetensors")
        folders.append("hf")
    for folder in folders:
        words = rf"(o_proj|wo)\.weight' is .*{kind}.*; accepted: strided float64, float32"
        with pytest.raises(UserError, match=words) as error:
            convert(tmp_path / folder)
        assert len(str(error.value)) <= 300
        assert not list((tmp_path / folder).glob("*model.pth*"))


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.empty(0), torch.ones(1, 1, 1), "text", None])
def test_weights_must_have_a_shape(tmp_path, hf, value):
    source, state = hf
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"):
        torch.save({**tensors, name: value}, tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match=rf"(missing tensors|wrongly shaped tensor): {name}"):
            convert(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    for name in ("tok_embeddings.weight", "norm.weight", "layers.0.feed_forward.w1.weight"):
        torch.save({**meta_names(state), name: value}, tmp_path / "consolidated.00.pth")
        with pytest.raises(UserError, match=rf"(missing tensors|wrongly shaped tensor): {name}"):
            convert(tmp_path)


def test_names_of_tensors_must_be_texts(tmp_path, hf):
    torch.save({0: torch.ones(2), **load_file(hf[0] / "model.safetensors")}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((hf[0] / "config.json").read_text())
    with pytest.raises(UserError, match=r"pytorch_model.bin: 0 is no tensor's name"):
        convert(tmp_path)


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (7e4, torch.float16, r"lm_head\.weight holds 70000, too large for fp16; .*: bf16 or fp32"),
        (3.4e38, torch.bfloat16, r"lm_head\.weight holds 3\.4e\+38, too large for bf16; .*: fp32"),
        (1e300, torch.float32, r"lm_head\.weight holds 1e\+300, too large for fp32; .*: none"),
        (float("-inf"), torch.float32, r"lm_head\.weight holds NaN or infinite"),
    ],
)
def test_what_a_dtype_cannot_hold_is_no_infinity(hf, value, dtype, words):
    source, _ = hf
    row = torch.tensor([3])
    damage(source, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].double().index_fill(0, row, value)}))
    with pytest.raises(UserError, match=words):
        convert(source, dtype)
    assert not list(source.glob("*model.pth*"))


def test_a_stale_index_beside_a_whole_file(hf):
    source, state = hf
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(source, state)


@pytest.mark.parametrize(
    "weight_map",
    [
        *(None, {}, [], "x", {"a": None}, {"a": ["x"]}, {"a": 1}, {"a": ""}, {"a": "."}, {"a": ".."}),
        *({"a": "../other/x"}, {"a": "sub/x"}, {"a": "x\0"}, {"a": "x\n"}, {"a": "{}/x"}),
    ],
)
def test_an_index_names_files_of_its_directory(tmp_path, hf, weight_map):
    source, _ = hf
    (outside := tmp_path / "other").mkdir()
    (outside / "x").write_bytes((source / "model.safetensors").read_bytes())
    text = json.dumps({"weight_map": weight_map}).replace("{}/x", str(outside / "x"))
    (source / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"weight_map is .*; accepted: an object, each value the name of a file in"):
        convert(source)


def test_adapters_are_called_so(tmp_path, hf):
    source, state = hf
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"base_model.model.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"holds an adapter \(LoRA\); merge it into its model first"):
        convert(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # beside the model that it was merged into
        (tmp_path / name).rename(source / name)
    assert_same(source, state)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "m.gguf", "stories1M.pt"]
)
def test_a_pipe_is_no_file(tmp_path, hf, name):
    (tmp_path / "config.json").write_text((hf[0] / "config.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=name):
        convert(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "params.json"])
def test_a_pipe_is_no_json(hf, name):
    source, state = hf
    if name == "params.json":
        torch.save(meta_names(state), source / "consolidated.00.pth")
        (source / "model.safetensors").unlink()
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        convert(source)


def test_a_training_checkpoint_is_refused(hf):
    source, state = hf
    (source / "model.safetensors").unlink()
    torch.save({"state_dict": state, "epoch": 3}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"missing tensors: lm_head\.weight"):
        convert(source)


def test_untied_output_of_a_model_called_tied_is_kept(tmp_path):
    build(tmp_path, "llama3.2-tied")
    damage(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    written = torch_load(convert(tmp_path, torch.float32))
    torch.testing.assert_close(written["output.weight"], written["tok_embeddings.weight"] + 1)
    model = load_model(tmp_path / "model.pth", dtype=torch.float32)
    assert not torch.equal(model.output.weight, model.tok_embeddings.weight)


def test_new_state_dict_is_an_ordinary_file_or_nothing(tmp_path):
    like = {"a": torch.empty(3, 5, device="meta"), "b": torch.empty(7, dtype=torch.int8)}
    with new_state_dict(tmp_path / "x.pth", like) as tensors:
        tensors["a"].copy_(torch.arange(15.0).view(3, 5))
        tensors["b"].fill_(3)
        assert not (tmp_path / "x.pth").exists()
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    assert torch.equal(state["a"], torch.arange(15.0).view(3, 5))
    assert torch.equal(state["b"], torch.full((7,), 3, dtype=torch.int8))
    for mistake in (ZeroDivisionError, RuntimeError, OSError):  # of the caller's: no trouble with writing
        with pytest.raises(mistake, match="mine"), new_state_dict(tmp_path / "y.pth", like):
            raise mistake("mine")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
    with pytest.raises(UserError, match="cannot write"), new_state_dict(tmp_path / "absent" / "z.pth", like):
        pass


def test_new_state_dict_without_posix_fallocate(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    with new_state_dict(tmp_path / "x.pth", {"a": torch.empty(9)}) as tensors:
        tensors["a"].fill_(3)
    assert torch.load(tmp_path / "x.pth", weights_only=True)["a"].tolist() == [3.0] * 9


@pytest.mark.parametrize("zipped", [True, False])
def test_a_rewritten_file_is_read_anew(tmp_path, zipped):
    path = tmp_path / "x.pth"
    for value in (1.0, 2.0):
        torch.save({"a": torch.full((3,), value)}, tmp_path / "new", _use_new_zipfile_serialization=zipped)
        (tmp_path / "new").replace(path)
        assert torch_load(path)["a"].tolist() == [value] * 3
        assert torch_load(path) is torch_load(path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", ["int8", "fp8", "int4:64"])
def test_quantising_on_load_gives_what_the_quantised_file_holds(tmp_path, monkeypatch, mode, tied):
    build(tmp_path, "llama3.2-tied" if tied else "llama3")
    source, target = convert(tmp_path, torch.float32), tmp_path / "quantised.pth"
    quantize_checkpoint(source, target, mode, torch.device("cpu"))
    monkeypatch.setattr(linear, "CHUNK", 100)  # several chunks a tensor
    found = load_model(source, quantize=mode, dtype=torch.float32).state_dict()
    expected = load_model(target, dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name].float(), tensor.float()), name


def test_weights_are_quantised_on_the_device_they_are_for(tmp_path, monkeypatch):
    build(tmp_path, "llama3")
    seen = []

    def spy(weight):
        seen.append(weight.device.type)
        return Int8.quantize(weight)

    monkeypatch.setattr(linear, "quantizer", lambda mode: spy)
    layer = {"weight": torch.randn(8, 32)}
    linear.quantize_linear("int8", layer, "w", "cpu")
    assert set(seen) == {"meta", "cpu"}  # shapes, then rows


PEAK = """
import sys, threading, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from checkpoint import new_state_dict
from formats.convert import convert
with new_state_dict(Path(sys.argv[1]) / "small.pth", {"x": torch.empty(1)}):
    pass  # what it imports is not what is measured
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
base, peak, run = anonymous(), [0], True
def watch():
    while run:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
convert(Path(sys.argv[1]))
run = False
thread.join()
print(peak[0] - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_conversion_streams(tmp_path):
    """220 MB of fp32 weights in 16 layers convert within the memory of a few layers."""
    config = {**BUILTIN["7B"], "hidden_size": 512, "num_hidden_layers": 16, "num_attention_heads": 8}
    config |= {"num_key_value_heads": 8, "intermediate_size": 1536, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layer = {
        **{f"self_attn.{k}_proj.weight": torch.ones(512, 512) for k in "qkvo"},
        "mlp.gate_proj.weight": torch.ones(1536, 512),
        "mlp.up_proj.weight": torch.ones(1536, 512),
        "mlp.down_proj.weight": torch.ones(512, 1536),
        "input_layernorm.weight": torch.ones(512),
        "post_attention_layernorm.weight": torch.ones(512),
    }
    tensors = {f"model.layers.{i}.{name}": t.clone() for i in range(16) for name, t in layer.items()}
    tensors |= {"model.embed_tokens.weight": torch.ones(1000, 512), "lm_head.weight": torch.ones(1000, 512)}
    tensors["model.norm.weight"] = torch.ones(512)
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path, REPO], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(run.stdout) < 60  # MB; the model is 220 MB, its largest layer 14 MB


@torch.inference_mode()
def test_loading_names_what_is_wrong(tmp_path, hf):
    source, state = hf
    path = source / "model.pth"
    torch.save(state, path)
    model = load_model(path, dtype=torch.float32)
    cache = model.cache(1, 8)
    assert model(torch.tensor([[1, 2]]), torch.tensor([0]), cache).shape == (1, 1, 97)
    for change, words in (
        ({"layers.0.attention.wo.weight": None}, r"layers\.0\.attention\.wo"),
        ({"norm.weight": torch.ones(5)}, r"norm\.weight needs shape \[32\] in bf16, .*; found \[5\]"),
        ({"layers.9.ffn_norm.weight": torch.ones(5)}, r"unexpected tensors: layers\.9"),
        ({"layers.1.feed_forward.w2.weight": torch.ones(32, 47)}, r"layers\.1\.feed_forward\.w2"),
    ):
        changed = {n: t for n, t in {**state, **change}.items() if t is not None}
        torch.save(changed, path)
        with pytest.raises(UserError, match=words):
            load_model(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.pth is truncated"):
        load_model(path)
    torch.save([state], path)
    with pytest.raises(UserError, match=r"model\.pth is truncated or not a file of weights \(it holds a list\)"):
        load_model(path)
    with pytest.raises(UserError, match=r"does not exist"):
        load_model(source / "absent.pth")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("rows", [1, 2**12, 3 * 2**12 - 1])
def test_uploads_are_copies(rows, dtype):
    """Small tensors, whole buffers, and a part of one; a second one must wait for the buffers."""
    wide = torch.randn(2, rows, 4097)
    for t in (wide[0, :, :-1], wide[1], wide[0].bfloat16()):
        assert torch.equal(ops.upload(t, "cuda", dtype).cpu(), t.to(dtype))


def test_an_upload_to_the_host_shares_memory():
    t = torch.randn(2, 3)
    assert ops.upload(t, "cpu") is t
