"""Every source format gives the same model; damaged ones are refused by name and leave nothing behind."""

import json
import os
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
from checkpoint import load_model, new_state_dict, read_config, torch_load
from errors import UserError
from formats.config import BUILTIN, llama3_scaling
from formats.convert import convert
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
from formats.convert import convert
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
    """640 MB of fp32 weights in 24 layers convert within the memory of a few layers."""
    config = {**BUILTIN["7B"], "hidden_size": 768, "num_hidden_layers": 24, "num_attention_heads": 12}
    config |= {"num_key_value_heads": 12, "intermediate_size": 2048, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layer = {
        **{f"self_attn.{k}_proj.weight": torch.ones(768, 768) for k in "qkvo"},
        "mlp.gate_proj.weight": torch.ones(2048, 768),
        "mlp.up_proj.weight": torch.ones(2048, 768),
        "mlp.down_proj.weight": torch.ones(768, 2048),
        "input_layernorm.weight": torch.ones(768),
        "post_attention_layernorm.weight": torch.ones(768),
    }
    tensors = {f"model.layers.{i}.{name}": t.clone() for i in range(24) for name, t in layer.items()}
    tensors |= {"model.embed_tokens.weight": torch.ones(1000, 768), "lm_head.weight": torch.ones(1000, 768)}
    tensors["model.norm.weight"] = torch.ones(768)
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path, REPO], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(run.stdout) < 120  # MB; the model is 680 MB, its largest layer 27 MB


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
