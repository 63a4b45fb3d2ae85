"""Logits of every supported architecture equal transformers' on tiny random models, through the whole path:
save_pretrained -> convert -> load -> prefill and step-by-step decode."""

import pytest
import torch
import transformers

from checkpoint import load_model
from errors import UserError
from formats.config import BUILTIN
from formats.convert import convert
from linear import Linear, quantize_linear
from model import FeedForward, ModelConfig, RMSNorm, rope_table
from tp import TensorParallel

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
ARCHITECTURES = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_theta": 500000.0}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama3.2-tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-head_dim-biases": ("Llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "codellama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied-yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-window-partial": ("Phi3", {"sliding_window": 6, "head_dim": 8, "partial_rotary_factor": 0.5}),
    "phi3-longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
}


def build(directory, architecture, **save):
    """A tiny random transformers model, saved in `directory`; its norms and biases are random, too."""
    family, options = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{family}Config")(**{**TINY, "tie_word_embeddings": False, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(4)  # logits that differ, so that an error shows
    model.save_pretrained(directory, **save)
    return model


def converted(directory):
    convert(directory, torch.float32)
    return load_model(directory / "model.pth", dtype=torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path, architecture):
    reference = build(tmp_path, architecture)
    model = converted(tmp_path)
    tokens = torch.randint(1, 97, (1, 24), generator=torch.Generator().manual_seed(1))
    expected = reference(tokens).logits
    assert expected.std() > 0.1

    full = model(tokens, torch.tensor([0]), model.cache(1, 32), all_logits=True)
    torch.testing.assert_close(full, expected, atol=1e-4, rtol=0)

    cache = model.cache(1, 32)  # prefill, then a token at a time
    steps = [model(tokens[:, :9], torch.tensor([0]), cache)]
    steps += [model(tokens[:, i : i + 1], torch.tensor([i]), cache) for i in range(9, 24)]
    torch.testing.assert_close(torch.cat(steps, 1), expected[:, 8:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "architecture", ["llama3.2-tied", "mistral-window", "qwen2", "qwen3", "phi3-window-partial", "smollm3"]
)
@torch.inference_mode()
def test_ragged_batch_equals_transformers(tmp_path, architecture):
    reference = build(tmp_path, architecture)
    model = converted(tmp_path)
    lengths, more = torch.tensor([11, 4, 7]), 6
    tokens = torch.randint(1, 97, (3, 11 + more), generator=torch.Generator().manual_seed(2))
    expected = [reference(tokens[row : row + 1, : n + more]).logits[0] for row, n in enumerate(lengths)]

    cache = model.cache(3, 24)
    logits = model(tokens[:, :11], torch.zeros(3, dtype=torch.int64), cache, last=lengths - 1)
    for step in range(more):
        for row, n in enumerate(lengths):
            torch.testing.assert_close(logits[row, 0], expected[row][n - 1 + step], atol=1e-4, rtol=0)
        pos = lengths + step
        logits = model(tokens.gather(1, pos[:, None]), pos, cache)


@torch.inference_mode()
def test_chunked_prefill_equals_one_shot(tmp_path):
    build(tmp_path, "mistral-window")
    model = converted(tmp_path)
    tokens = torch.randint(1, 97, (2, 30), generator=torch.Generator().manual_seed(3))
    whole = model(tokens, torch.tensor([0, 0]), model.cache(2, 40), all_logits=True)
    cache, chunks = model.cache(2, 40), []
    for a, b in ((0, 1), (1, 14), (14, 22), (22, 30)):
        chunks.append(model(tokens[:, a:b], torch.tensor([a, a]), cache.first(b), all_logits=True))
    torch.testing.assert_close(torch.cat(chunks, 1), whole, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("kind", [None, "int8", "int4:32"])
def test_merged_feed_forwards_compute_the_same(kind):
    config = ModelConfig(64, 1, 4, 4, 16, 96, 259)

    def feed_forward(up_kind: str | None) -> FeedForward:
        torch.manual_seed(0)
        layer = FeedForward(config, TensorParallel())
        for name, N, K in (("w1", 96, 64), ("w3", 96, 64), ("w2", 64, 96)):
            tensors, own = {"weight": torch.randn(N, K) / 8}, up_kind if name == "w3" else kind
            setattr(layer, name, Linear(K, N).assign(quantize_linear(own, tensors, name) if own else tensors))
        return layer

    norm = RMSNorm(64, 1e-5)
    merged, apart, unlike = feed_forward(kind), feed_forward(kind), feed_forward("int4:64")
    merged.merge()
    unlike.merge()
    assert merged.w13 and merged.w1 is None and merged.w3 is None
    assert unlike.w13 is None and unlike.w1 and unlike.w3
    for rows in (1, 20):
        x = torch.randn(2, rows, 64)
        torch.testing.assert_close(merged(x, norm), apart(x, norm))


@torch.inference_mode()
def test_longrope_chooses_factors_by_the_cache(tmp_path):
    reference = build(tmp_path, "phi3-longrope")
    model = converted(tmp_path)
    tokens = torch.randint(1, 97, (1, 40), generator=torch.Generator().manual_seed(4))  # past the original 32
    logits = model(tokens, torch.tensor([0]), model.cache(1, 48), all_logits=True)
    torch.testing.assert_close(logits, reference(tokens).logits, atol=1e-4, rtol=0)


def test_builtin_names():
    assert ModelConfig.from_name("7B").intermediate_size == 11008
    for name in BUILTIN:
        config = ModelConfig.from_name(name)
        assert config.n_expert or config.dim == config.n_head * config.head_dim
        assert rope_table(config, 8).shape == (8, config.head_dim // 2, 2)
    with pytest.raises(UserError, match=r"'8B' is not supported; supported: 13B"):
        ModelConfig.from_name("8B")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not supported; supported: cwm, ernie4_5"),
        ({"model_type": None}, r"model_type None"),
        ({"hidden_act": "relu"}, r"hidden_act 'relu'"),
        ({"rope_scaling": {"type": "su"}}, r"rope_type 'su' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_type 'llama3' needs low_freq_factor, high"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_type 'yarn' needs factor"),
        ({"hidden_size": "big"}, r"hidden_size is 'big'"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads 3 does not divide 4"),
    ],
)
def test_bad_configs(change, words):
    with pytest.raises(UserError, match=words):
        ModelConfig.from_hf({"model_type": "llama", **TINY, **change})
