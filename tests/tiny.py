"""Tiny random checkpoints with a tokenizer and a chat template, for tests of the runtime and the command line."""

import json
from pathlib import Path

import tokenizers
import torch
import transformers

from formats.convert import convert

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def never(row: int, token: int) -> bool:
    """Stops no row at no token."""
    return False


def write_tokenizer(directory: Path) -> None:
    """Byte-level BPE with no merges: 256 bytes and 3 special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))


def write_checkpoint(directory: Path, seed: int = 0, **options) -> transformers.PreTrainedModel:
    """A random Llama in `directory`, converted to an fp32 model.pth. Returns transformers' model."""
    config = {
        "vocab_size": len(SPECIAL) + 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        **options,
    }
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    convert(directory, torch.float32)
    return model
