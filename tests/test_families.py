"""Every family's logits equal transformers' on a tiny random model, through the whole path: save_pretrained, convert,
load, prefill in odd chunks, decode a token at a time, a ragged batch, contexts beyond windows. And its keys, defaults
and rules are those of transformers' config classes."""

import json
import re

import pytest
import torch
import transformers
from conftest import REPO

from checkpoint import load_model
from engine import Engine
from errors import UserError
from formats import families
from formats.config import FAMILIES, KEYS, NULLABLE, SIZES, config_fields
from formats.convert import convert
from formats.families import ACTIVATIONS
from generate import generate, load
from linear import Linear
from ops.rms_norm import normed_triton, rms_norm
from quantize import quantize_checkpoint
from sampling import Sampler

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
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
GRANITE = {"embedding_multiplier": 6.0, "attention_multiplier": 0.1, "residual_multiplier": 0.3, "logits_scaling": 4.0}
CAPS = {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
MODELS = {  # model_type -> what its config says beside TINY; test_model.py has the older ones
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
    "gemma2": ALTERNATING | CAPS,
    "gemma3_text": ALTERNATING | CAPS | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}},
}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "patch_size": 14, "image_size": 28}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
WRAPPED = {  # a wrapper's model_type -> what its config says of its vision model, and its text model's
    "mistral3": (VISION | {"model_type": "pixtral", "num_hidden_layers": 1, "head_dim": 16}, "mistral", {}),
    "qwen2_5_vl": (QWEN_VISION | {"fullatt_block_indexes": [0]}, "qwen2_5_vl_text", {"rope_parameters": MROPE}),
    "qwen3_vl": (QWEN_VISION | {"deepstack_visual_indexes": [0]}, "qwen3_vl_text", {}),
    "gemma3": (VISION | {"model_type": "siglip_vision_model", "num_hidden_layers": 1}, "gemma3_text", ALTERNATING),
}


def save(directory, config, auto=transformers.AutoModelForCausalLM):
    """A tiny random transformers model of a config, saved in `directory`; its norms and biases are random, too."""
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(4)  # logits that differ, so that an error shows
    model.save_pretrained(directory)
    return model


def check_logits(directory, reference):
    """Convert what `directory` holds and compare."""
    convert(directory, torch.float32)
    model = load_model(directory / "model.pth", dtype=torch.float32)
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
    return tokens, expected


@pytest.mark.parametrize("family", MODELS)
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path, family):
    reference = save(tmp_path, transformers.AutoConfig.for_model(family, **{**TINY, **MODELS[family]}))
    tokens, expected = check_logits(tmp_path, reference)
    start = torch.zeros(3, dtype=torch.int64)
    for mode, most in (("int8", 0.1), ("int4:32", 0.6)):  # a file, and the same quantised on the way
        quantize_checkpoint(tmp_path / "model.pth", tmp_path / "model_q.pth", mode, torch.device("cpu"))
        stored = load_model(tmp_path / "model_q.pth", dtype=torch.float32)
        on_the_way = load_model(tmp_path / "model.pth", dtype=torch.float32, quantize=mode)
        logits = [m(tokens, start, m.cache(3, 32), all_logits=True) for m in (stored, on_the_way)]
        assert torch.equal(*logits)
        assert (logits[0] - expected).norm() < most * expected.norm()
        assert any(type(m) is Linear and m.kind.__name__ != "Plain" for m in stored.modules())


@pytest.mark.parametrize("window", [5, None])
@torch.inference_mode()
def test_exaone4_without_sliding_layers(tmp_path, window):
    """Where a window is given, no layer rotates; elsewhere all do."""
    options = {"sliding_window": window, "layer_types": ["full_attention"] * 2}
    check_logits(tmp_path, save(tmp_path, transformers.AutoConfig.for_model("exaone4", **TINY, **options)))


@pytest.mark.parametrize("wrapper", WRAPPED)
@torch.inference_mode()
def test_the_text_model_of_a_wrapper_is_converted(tmp_path, wrapper, capsys):
    vision, kind, options = WRAPPED[wrapper]
    text = {**TINY, **options, "model_type": kind}
    config = transformers.AutoConfig.for_model(wrapper, text_config=text, vision_config=vision, mm_tokens_per_image=4)
    reference = save(tmp_path, config, transformers.AutoModelForImageTextToText)
    check_logits(tmp_path, reference)
    assert "the text model alone is converted" in capsys.readouterr().out


# --- GGUF -------------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
@torch.inference_mode()
def test_gguf_of_a_family(tmp_path, family):
    """As llama.cpp's converter writes it: Gemma's norms are 1 + w there, and what a family always has is not told."""
    gguf = pytest.importorskip("gguf")
    arch = family.removesuffix("_text")
    options = {"query_pre_attn_scalar": 16, "hidden_size": 64, "attn_logit_softcapping": 3.0, "sliding_window": 5}
    options |= {"final_logit_softcapping": 4.0} if arch == "gemma2" else {}
    options = {"rms_norm_eps": 1e-6} if arch == "olmo2" else options
    config = transformers.AutoConfig.for_model(family, **TINY | options)
    reference = save(tmp_path / "hf", config)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", arch)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    if arch != "olmo2":
        writer.add_sliding_window(5)
        writer.add_rope_freq_base(1e6 if arch == "gemma3" else 1e4)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(3.0)
        writer.add_final_logit_softcapping(4.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(ord("!") + i) for i in range(90)] + [f"<{i}>" for i in range(7)])
    writer.add_token_types([1] * 90 + [3] * 7)
    writer.add_token_merges(["! #"])  # which makes no token
    for name, tensor in reference.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for theirs, short in GGUF_NAMES.items():
            name = name.replace(theirs, short)
        writer.add_tensor(name, (tensor + (tensor.ndim == 1 and arch != "olmo2")).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_logits(tmp_path, reference)


# --- configs ----------------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 97, "hidden_size": 1280, "intermediate_size": 96, "num_hidden_layers": 4}
SMALL["num_attention_heads"] = 160  # which all defaults of num_key_value_heads divide
SAMPLES = {  # of each key, a value that is no family's default
    "num_key_value_heads": 1,
    "head_dim": 32,
    "hidden_act": "gelu",
    "hidden_activation": "gelu",
    "max_position_embeddings": 77,
    "original_max_position_embeddings": 33,
    "rms_norm_eps": 3e-4,
    "rope_theta": 777.0,
    "rope_local_base_freq": 55.0,
    "partial_rotary_factor": 0.25,
    **dict.fromkeys(("attention_bias", "attention_out_bias", "mlp_bias", "use_bias"), True),
    "tie_word_embeddings": True,
    "sliding_window": 9,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "sliding_window_pattern": 2,
    "no_rope_layers": [1, 0, 0, 1],
    "no_rope_layer_interval": 2,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "use_bidirectional_attention": True,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 3.0,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 3.0,
    "residual_multiplier": 3.0,
    "logits_scaling": 3.0,
    "hidden_size": 2560,
    "num_hidden_layers": 4,
    "num_attention_heads": 320,
    "intermediate_size": 32,
    "vocab_size": 9,
    "num_local_experts": 9,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
    "swiglu_limit": 3.0,
    "swiglu_alpha": 1.5,
}
NOT_FIELDS = {  # keys that transformers reads though no class declares them, and families that alone declare one
    *("original_max_position_embeddings", "rope_theta", "head_dim", "partial_rotary_factor", "rope_local_base_freq"),
    *("sliding_window_pattern", "tie_word_embeddings", "use_bidirectional_attention"),
}


def theirs(config):
    """What transformers makes of a config, as far as ours says it in other words."""
    rope, windows = config.rope_parameters, getattr(config, "sliding_window", None)
    rope, local = rope.get("full_attention", rope), rope.get("sliding_attention", rope)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    declared = "sliding_window" in type(config).__dataclass_fields__
    windows = tuple(windows if windows and declared and kind == "sliding_attention" else 0 for kind in types)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bases = {local["rope_theta"] if window else rope["rope_theta"] for window in windows}
    scale, bias = getattr(config, "query_pre_attn_scalar", 0), getattr(config, "attention_bias", None)
    found = {
        "block_size": None if rope["rope_type"] == "yarn" else config.max_position_embeddings,  # ours: what yarn makes
        "n_local_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "norm_eps": config.rms_norm_eps,
        "tied": getattr(config, "tie_word_embeddings", None),
        "windows": windows,
        "bases": bases,
        "rotary_dim": int(head_dim * rope.get("partial_rotary_factor", 1)),
        "kind": rope["rope_type"],
        "activation": ACTIVATIONS[getattr(config, "hidden_activation", None) or config.hidden_act],
        "attention_scale": scale**-0.5 if scale else getattr(config, "attention_multiplier", 0.0),
        "embedding_scale": getattr(config, "embedding_multiplier", None),
        "soft_cap": getattr(config, "attn_logit_softcapping", None) or 0.0,
        "output_soft_cap": getattr(config, "final_logit_softcapping", None) or 0.0,
        "qkv_bias": getattr(config, "use_bias", bias),
        "o_bias": getattr(config, "use_bias", getattr(config, "attention_out_bias", None)),
        "mlp_bias": getattr(config, "use_bias", getattr(config, "mlp_bias", None)),
        "rope_layers": tuple(map(bool, getattr(config, "no_rope_layers", None) or ())) or None,
    }
    if hasattr(config, "num_experts_per_tok"):
        dense, step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
        found |= {
            "n_expert": getattr(config, "num_experts", None) or config.num_local_experts,
            "n_expert_used": config.num_experts_per_tok,
            "expert_size": getattr(config, "moe_intermediate_size", config.intermediate_size),
            "shared_size": getattr(config, "shared_expert_intermediate_size", None),
            "norm_topk": getattr(config, "norm_topk_prob", None),
            "glu_limit": getattr(config, "swiglu_limit", None),
            "glu_alpha": getattr(config, "swiglu_alpha", None),
            "dense_layers": tuple(i for i in range(config.num_hidden_layers) if i in dense or (i + 1) % step),
        }
    return {key: value for key, value in found.items() if value is not None}


def ours(config, wanted):
    fields = config_fields(config)
    windows = fields["windows"] = fields["windows"] or (0,) * fields["n_layer"]
    local = fields.get("local_rope", {}).get("rope_base", fields["rope_base"])
    fields |= {"bases": {local if window else fields["rope_base"] for window in windows}}
    fields |= {"kind": fields["rope_scaling"]["rope_type"]}
    return {key: fields[key] for key in wanted}


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_defaults_and_rules_are_transformers(name):
    check_keys(name)


def check_keys(name):
    """Compare every key's default, and what it does, with transformers' config class."""
    family, kind = FAMILIES[name], type(transformers.AutoConfig.for_model(name))
    spelled = {key: other for other, key in family.spelled.items() if key not in kind.__dataclass_fields__}
    declared = {key for key in KEYS if spelled.get(key, key) in kind.__dataclass_fields__}
    assert declared - family.keys.keys() - set(SIZES.values()) == set()
    assert family.keys.keys() - declared <= NOT_FIELDS
    assert SAMPLES.keys() == KEYS.keys()
    plain, compared = {"model_type": name, **SMALL}, 0
    changes = [{}, *({key: value} for key, value in SAMPLES.items()), *({key: None} for key in NULLABLE)]
    for change in changes:
        key = next(iter(change), "vocab_size")
        if key not in SIZES.values() and key not in family.keys:  # of others
            assert config_fields({**plain, **change}) == config_fields(plain), change
            continue
        if key == "use_bidirectional_attention" or (name == "olmo3" and key == "rope_theta"):
            continue  # not supported; OLMo 3's class gives layers with a window its default, whatever the config says
        try:
            expected = theirs(kind(**SMALL | {spelled.get(key, key): value for key, value in change.items()}))
        except Exception:  # what the class refuses: nulls, and InternLM3 one bias without the other
            assert change == {key: None} or name == "internlm3"
            continue
        expected |= {"activation": "gelu_tanh"} if name == "gemma" and expected["activation"] == "gelu" else {}
        expected |= {k: v for k, v in family.fixed.items() if k in expected}
        assert ours({**plain, **change}, expected) == expected, change
        compared += 1
    assert compared >= 12


@torch.inference_mode()
def test_the_guide_adds_a_family(tmp_path, monkeypatch):
    """The README's example, done as it says."""
    (entry,) = re.findall(r"^```python family\n(.*?)^```", (REPO / "README.md").read_text(), flags=re.M | re.S)
    ((name, family),) = eval("{" + entry + "}", vars(families)).items()
    config = transformers.AutoConfig.for_model(name, **{**TINY, **ALTERNATING, **CAPS})
    reference = save(tmp_path, config)
    with pytest.raises(UserError, match=f"model_type '{name}' is not supported"):
        convert(tmp_path)
    monkeypatch.setitem(FAMILIES, name, family)
    check_logits(tmp_path, reference)
    check_keys(name)


def test_a_key_that_only_others_read_is_told(tmp_path, capsys):
    save(tmp_path, transformers.LlamaConfig(**TINY))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 4, "use_bias": False}))
    convert(tmp_path, torch.float32)
    assert "does not read these keys of config.json, nor does transformers: sliding_window\n" in capsys.readouterr().out


def test_causal_attention_alone_is_supported():
    with pytest.raises(UserError, match="use_bidirectional_attention is true; causal attention alone"):
        config_fields({"model_type": "gemma3_text", **SMALL, "use_bidirectional_attention": True})


# --- longrope ---------------------------------------------------------------------------------------------------------

LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [1.0] + [4.0] * 7}


@pytest.mark.parametrize("draft", [None, "prompt_lookup"])
@torch.inference_mode()
def test_longrope_goes_by_the_sequence(tmp_path, draft):
    """As transformers: short factors up to the original context, then the long ones, with which all is read again."""
    context = {"original_max_position_embeddings": 24, "max_position_embeddings": 96}
    config = transformers.Phi3Config(**{**TINY, **context}, rope_parameters=LONGROPE, tie_word_embeddings=False)
    reference = save(tmp_path, config)
    convert(tmp_path, torch.float32)
    model = load_model(tmp_path / "model.pth", dtype=torch.float32)
    llm = Engine(model, batch_size=1, max_seq_length=64, sampler=Sampler(temperature=0), draft=draft)
    prompts = [torch.randint(1, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 20, 23, 40)]
    for prompt in [*prompts, prompts[0]]:  # and back
        tokens = torch.tensor([prompt])
        for _ in range(12):  # transformers without a cache: each step reads all, with the factors for its length
            tokens = torch.cat((tokens, reference(tokens).logits[:, -1:].argmax(-1)), 1)
        expected = tokens[0, len(prompt) :].tolist()
        found = list(generate(llm, prompt, 12, is_stop=lambda row, token: False))
        assert found == expected, len(prompt)


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [96, 640])
def test_norm_kernel(K):
    """With a residual and without, gains in fp32 and not."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype, gains in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        x, residual = (torch.randn(2, 3, K, device=device).to(dtype) for _ in range(2))
        weight = torch.randn(K, device=device).to(gains)
        plain = rms_norm(x, weight, 1e-6)
        torch.testing.assert_close(normed_triton(x, weight, 1e-6), plain, atol=2e-2, rtol=1e-2)
        torch.testing.assert_close(normed_triton(x, weight, 1e-6, residual), residual + plain, atol=4e-2, rtol=1e-2)


# --- a real one -------------------------------------------------------------------------------------------------------

GEMMA = REPO / "checkpoints" / "gemma-3-270m" / "model.pth"
GOLDEN = json.loads((REPO / "tests" / "data" / "gemma3_270m.json").read_text())


@pytest.mark.skipif(not GEMMA.is_file(), reason="needs ./scripts/prepare.sh gemma-3-270m, 240 MB")
def test_gemma_writes_what_transformers_does():
    llm = load(GEMMA, device="cpu", precision="fp32", sampler=Sampler(temperature=0), max_seq_length=64)
    for case in GOLDEN["prompts"]:
        prompt, expected = llm.tokenizer.encode(case["prompt"]), case["greedy_ids"]
        assert prompt == case["prompt_ids"]
        found = list(generate(llm, prompt, len(expected), is_stop=lambda row, token: False))
        same = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), len(expected))
        assert same == len(expected) or case["margins"][same] < 0.02, case["prompt"]  # a near tie may fall otherwise
