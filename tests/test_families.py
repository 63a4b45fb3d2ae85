"""Logits of every family equal transformers' on a tiny random model, through the whole path: save_pretrained, convert,
load, prefill in odd chunks, decode a token at a time, a ragged batch, contexts beyond windows; and configs agree."""

import pytest
import torch
import transformers

from checkpoint import load_model
from formats.convert import convert

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
MINISTRAL3 = YARN | {"llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}
MINISTRAL3 |= {"original_max_position_embeddings": 8}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
GRANITE = {"embedding_multiplier": 6.0, "attention_multiplier": 0.1, "residual_multiplier": 0.3, "logits_scaling": 4.0}
FAMILIES = {  # model_type -> what its config says beside TINY
    "ministral": ALTERNATING,
    "ministral3": {"rope_parameters": MINISTRAL3},
    "cwm": ALTERNATING | {"rope_parameters": LLAMA3},
    "internlm3": {"attention_bias": True, "mlp_bias": True},
    "iquestcoder": {},
    "seed_oss": {"attention_out_bias": True},
    "ernie4_5": {"use_bias": True},
    "helium": {"attention_bias": True, "mlp_bias": True},
    "exaone": {},
    "exaone4": ALTERNATING,
    "glm": {},
    "glm4": {},
    "granite": GRANITE | {"attention_bias": True},
    "olmo2": {},
    "olmo3": ALTERNATING | {"rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}},
    "gemma": {},
    "gemma2": ALTERNATING
    | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    "gemma3_text": ALTERNATING
    | {"query_pre_attn_scalar": 24, "rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}},
}


def build(directory, family, options):
    """A tiny random transformers model, saved in `directory`; its norms and biases are random, too."""
    config = transformers.AutoConfig.for_model(family, **{**TINY, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(4)  # logits that differ, so that an error shows
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path, family):
    reference = build(tmp_path, family, FAMILIES[family])
    convert(tmp_path, torch.float32)
    model = load_model(tmp_path / "model.pth", dtype=torch.float32)
    tokens = torch.randint(1, 97, (3, 24), generator=torch.Generator().manual_seed(1))
    expected = reference(tokens).logits
    assert expected.std() > 0.1

    start, cache, logits = torch.zeros(3, dtype=torch.int64), model.cache(3, 32), []
    for a, b in ((0, 1), (1, 8), (8, 13), *((i, i + 1) for i in range(13, 24))):  # odd chunks, then a token at a time
        logits.append(model(tokens[:, a:b], start + a, cache, all_logits=True))
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=0)

    lengths, cache = torch.tensor([11, 4, 7]), model.cache(3, 32)  # a ragged batch
    row = model(tokens[:, :11], start, cache, last=lengths - 1)
    for step in range(8):
        torch.testing.assert_close(row[:, 0], expected[range(3), lengths - 1 + step], atol=1e-4, rtol=0)
        pos = lengths + step
        row = model(tokens.gather(1, pos[:, None]), pos, cache)
