"""A small checkpoint in each format, with tokenizers of each kind, for fuzz.py to mutate."""

import base64
import io
import json
import shutil
from pathlib import Path

import gguf
import sentencepiece
import tiny
import torch
from safetensors.torch import load_file, save_file

from quantize import quantize_checkpoint

ROWS = (64, 32, 32)  # of queries, keys and values in tiny's wqkv
META = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6, "rope_theta": 10000.0}


def write_seeds(root: Path) -> list[Path]:
    """Files to mutate, each in a folder with what else it takes to use it."""
    hf = root / "hf"
    tiny.write_checkpoint(hf)
    files = [hf / f"{name}.json" for name in ("config", "generation_config", "tokenizer", "tokenizer_config")]
    files += [hf / "model.safetensors", hf / "model.pth"]
    for mode in ("int8", "int4:32"):
        files.append(hf / f"model_{mode[:4]}.pth")
        quantize_checkpoint(hf / "model.pth", files[-1], mode, torch.device("cpu"))

    def new(name: str) -> Path:
        files.append(path := root / name)
        path.parent.mkdir(exist_ok=True)
        return path

    tensors = load_file(hf / "model.safetensors")
    torch.save(tensors, new("bin/pytorch_model.bin"))
    (index := new("sharded/model.safetensors.index.json")).write_text(
        json.dumps({"weight_map": {name: f"{'ab'['1' in name]}.safetensors" for name in tensors}})
    )
    for shard in "ab":
        own = {name: tensor for name, tensor in tensors.items() if ("1" in name) == (shard == "b")}
        save_file(own, index.with_name(f"{shard}.safetensors"))
    for folder in ("bin", "sharded"):
        shutil.copy(hf / "config.json", root / folder)

    apart = {}
    for name, tensor in torch.load(hf / "model.pth", weights_only=True).items():
        parts = zip("qkv", tensor.split(ROWS)) if ".wqkv." in name else [("qkv", tensor)]
        apart |= {name.replace("wqkv", f"w{key}"): part.clone() for key, part in parts}
    torch.save(apart, new("meta/consolidated.00.pth"))
    new("meta/params.json").write_text(json.dumps(META))
    torch.save({"model": apart, "model_args": {**META, "max_seq_len": 64}}, new("llama2c/stories1M.pt"))
    write_gguf(new("gguf/m.gguf"), apart, json.loads((hf / "tokenizer.json").read_text())["model"]["vocab"])

    ranks = [bytes([i]) for i in range(256)] + [b"he", b"ll"]
    lines = (f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(ranks))
    new("tiktoken/tokenizer.model").write_text("\n".join(lines))
    model, sentences = io.BytesIO(), ["hello world", "the quick brown fox", "jumps over the lazy dog"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=50, model_type="bpe", minloglevel=2
    )
    new("sentencepiece/tokenizer.model").write_bytes(model.getvalue())
    return files


def write_gguf(path: Path, state: dict[str, torch.Tensor], vocab: dict[str, int]) -> None:
    """A GGUF of tensors with Meta's names."""
    names = {"tok_embeddings": "token_embd", "norm": "output_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v"}
    names |= {"wo": "attn_output", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up", "attention_norm": "attn_norm"}
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96}
    for key, value in {**sizes, "attention.head_count": 4, "attention.head_count_kv": 2}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocab, key=vocab.get))
    writer.add_token_types([3] * 3 + [1] * 256)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(2)
    for name, tensor in state.items():
        *layer, kind = name.removesuffix(".weight").replace("layers", "blk").split(".")
        layer = [part for part in layer if part not in ("attention", "feed_forward")]
        writer.add_tensor(".".join([*layer, names.get(kind, kind), "weight"]), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
