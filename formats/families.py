"""The families of models, as data: what each one's config.json may leave out, and how it differs from Llama.

The reference of each is transformers' models/NAME, with whose config class a test compares every key. A dense family
that needs no new idea is an entry here; config.py reads it, model.py runs it. Loads no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}  # theirs -> ours


@dataclass(frozen=True)
class Family:
    """What a family is, beyond what its config.json says."""

    keys: Mapping[str, object]  # those of config.py's KEYS that it reads, and what they are where they are absent
    fixed: Mapping[str, object] = field(default_factory=dict)  # fields of ModelConfig, whatever a config.json says
    tensors: Mapping[str, str] = field(default_factory=dict)  # our names in a layer -> Hugging Face's, if not Llama's
    layers: str = ""  # and their prefix there
    spelled: Mapping[str, str] = field(default_factory=dict)  # other spellings of keys
    activations: Mapping[str, str] = field(default_factory=lambda: ACTIVATIONS)
    rope: Mapping[str, object] = field(default_factory=dict)  # rope_parameters where a config.json has none
    rope_types: Mapping[str, str] = field(default_factory=dict)  # other names of them
    sliding: Callable[[int, Mapping], bool] = lambda layer, keys: True  # the layers with a window, without layer_types
    local_rope: bool = False  # layers with a window have a RoPE of their own, and rope_scaling is the others'
    window_rope: bool = False  # where a window is given, only layers that have it rotate, perhaps none
    sqrt_embedding: bool = False  # embeddings are times sqrt(hidden_size)
    interleaved: bool = False  # RoPE pairs are (2i, 2i+1) already


def _keys(*tables: Mapping[str, object], **more: object) -> dict[str, object]:
    return {key: value for table in (*tables, more) for key, value in table.items()}


_COMMON = _keys(
    dict.fromkeys(("num_key_value_heads", "head_dim", "original_max_position_embeddings")),
    hidden_act="silu",
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
)
_LLAMA = _keys(_COMMON, attention_bias=False, mlp_bias=False)
_MISTRAL = _keys(_COMMON, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
_WINDOW = {"sliding_window": 4096, "layer_types": None}
_QWEN = _keys(
    _COMMON,
    _WINDOW,
    num_key_value_heads=32,
    max_position_embeddings=32768,
    use_sliding_window=False,
    max_window_layers=28,
)
_GLM = _keys(
    _COMMON,
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1.5625e-07,
    attention_bias=True,
    partial_rotary_factor=0.5,
)
_GEMMA = _keys(
    _COMMON,
    num_key_value_heads=16,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    attention_bias=False,
    use_bidirectional_attention=False,
)
_GEMMA2 = _keys(
    {key: value for key, value in _GEMMA.items() if key != "hidden_act"},
    _WINDOW,
    num_key_value_heads=4,
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256.0,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
)
_GEMMA3 = _keys(
    _GEMMA2,
    hidden_size=2304,  # published files leave sizes out, too
    num_hidden_layers=26,
    num_attention_heads=8,
    intermediate_size=9216,
    vocab_size=262208,
    max_position_embeddings=131072,
    rope_theta=1e6,
    rope_local_base_freq=1e4,
    sliding_window_pattern=6,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
)
_OLMO2 = _keys(_COMMON, rms_norm_eps=1e-5, attention_bias=False)
_POST = {"pre_norms": False, "post_norms": True}
_POST_NAMES = {"post_attention_norm": "post_attention_layernorm", "post_ffn_norm": "post_feedforward_layernorm"}
_SANDWICH_NAMES = {"ffn_norm": "pre_feedforward_layernorm", **_POST_NAMES}
_GLM4_NAMES = {"post_attention_norm": "post_self_attn_layernorm", "post_ffn_norm": "post_mlp_layernorm"}
_GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
_UNIT = {"unit_offset": True}
_MOE = {"num_local_experts": 8, "num_experts_per_tok": 2}  # renormalised, unless norm_topk_prob says otherwise
_QWEN_MOE = {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None}
_EXPERTS = {"num_experts": "num_local_experts"}  # the other spelling
_CWM_ROPE = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_CWM_ROPE |= {"rope_theta": 1e6, "original_max_position_embeddings": 8192}
_MINISTRAL3_ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
_MINISTRAL3_ROPE |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}


def _every(n: int) -> Callable[[int, Mapping], bool]:
    return lambda layer, keys: (layer + 1) % n > 0


def _by_pattern(layer: int, keys: Mapping) -> bool:
    pattern = keys["sliding_window_pattern"]  # a number, or letters like LLLG
    if isinstance(pattern, str):
        return pattern[layer % len(pattern)] == "L" if pattern else False
    return (layer + 1) % pattern > 0 if pattern else False


def _from_layer(layer: int, keys: Mapping) -> bool:
    return layer >= keys["max_window_layers"]


def rotates(layer: int, keys: Mapping) -> bool:
    """SmolLM3's rule: all layers but each interval-th, unless a list says which."""
    listed = keys.get("no_rope_layers")
    return bool(listed[layer] if listed else (layer + 1) % keys["no_rope_layer_interval"])


# NAME is the model_type. Where a paper says more than the code, it is named.
FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA),  # arXiv 2407.21783
    "mistral": Family(_MISTRAL),  # arXiv 2310.06825
    "ministral": Family(_keys(_MISTRAL, _WINDOW)),
    "ministral3": Family(
        _keys(_MISTRAL, head_dim=128, max_position_embeddings=262144, rms_norm_eps=1e-5, sliding_window=None),
        rope=_MINISTRAL3_ROPE,
    ),
    "phi3": Family(  # arXiv 2404.14219
        _keys(
            _COMMON,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            partial_rotary_factor=1.0,
            sliding_window=None,
        ),
        rope_types={"su": "longrope", "yarn": "longrope"},
    ),
    "qwen2": Family(_QWEN, {"qkv_bias": True}, sliding=_from_layer),  # arXiv 2407.10671
    "qwen2_5_vl_text": Family(  # arXiv 2502.13923
        _keys(_QWEN, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, max_window_layers=80),
        {"qkv_bias": True},
        rope_types={"mrope": "default"},  # of text, where its three positions are one
        sliding=_from_layer,
    ),
    "qwen3": Family(_keys(_QWEN, head_dim=128, attention_bias=False), {"qk_norm": True}, sliding=_from_layer),
    "qwen3_vl_text": Family(  # arXiv 2511.21631
        _keys(
            _COMMON,
            num_key_value_heads=32,
            head_dim=128,
            max_position_embeddings=128000,
            rope_theta=5e5,
            attention_bias=False,
        ),
        {"qk_norm": True},
    ),
    "smollm3": Family(
        _keys(
            _LLAMA,
            _WINDOW,
            num_key_value_heads=4,
            max_position_embeddings=32768,
            rope_theta=2e6,
            tie_word_embeddings=True,
            sliding_window=None,
            use_sliding_window=False,
            no_rope_layers=None,
            no_rope_layer_interval=4,
        ),
        sliding=lambda layer, keys: not rotates(layer, keys),
    ),
    "cwm": Family(  # arXiv 2510.02387
        _keys(
            {**_MISTRAL, **_WINDOW},
            head_dim=128,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            mlp_bias=False,
            sliding_window=8192,
        ),
        rope=_CWM_ROPE,
        sliding=lambda layer, keys: layer % 4 > 0,
    ),
    "internlm3": Family(
        _keys(_LLAMA, num_key_value_heads=2, head_dim=128, max_position_embeddings=32768, rms_norm_eps=1e-5),
        spelled={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    ),
    "iquestcoder": Family(
        _keys(_LLAMA, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rms_norm_eps=1e-5)
    ),
    "seed_oss": Family(
        _keys(
            _LLAMA,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=524288,
            attention_bias=True,
            attention_out_bias=False,
        )
    ),
    "ernie4_5": Family(
        _keys(
            _COMMON,
            num_key_value_heads=2,
            head_dim=128,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_theta=5e5,
            tie_word_embeddings=True,
            use_bias=False,
        ),
        interleaved=True,
    ),
    "helium": Family(
        _keys(
            _LLAMA,
            num_key_value_heads=20,
            head_dim=128,
            max_position_embeddings=4096,
            rms_norm_eps=1e-8,
            rope_theta=1e5,
        ),
        {"o_bias": False},
        interleaved=True,
    ),
    "exaone": Family(  # arXiv 2408.03541
        _keys(_LLAMA, num_key_value_heads=8, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=5e5),
        layers="transformer.h",
        tensors={
            "tok_embeddings": "transformer.wte",
            "norm": "transformer.ln_f",
            "attention.wqkv": "attn.attention.q_proj attn.attention.k_proj attn.attention.v_proj",
            "attention.wo": "attn.attention.out_proj",
            "feed_forward.w1": "mlp.c_fc_0",
            "feed_forward.w3": "mlp.c_fc_1",
            "feed_forward.w2": "mlp.c_proj",
            "attention_norm": "ln_1",
            "ffn_norm": "ln_2",
        },
        spelled={
            "num_layers": "num_hidden_layers",
            "layer_norm_epsilon": "rms_norm_eps",
            "activation_function": "hidden_act",
        },
    ),
    "exaone4": Family(  # arXiv 2507.11407
        _keys(_COMMON, _WINDOW, num_key_value_heads=32, rms_norm_eps=1e-5, sliding_window_pattern=4),
        {"qk_norm": True, **_POST},
        tensors=_POST_NAMES,
        sliding=_by_pattern,
        window_rope=True,
    ),
    "granite": Family(
        _keys(_LLAMA, embedding_multiplier=1.0, attention_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0)
    ),
    "mixtral": Family(  # arXiv 2401.04088
        _keys(_COMMON, _MOE, num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=1e6)
        | {"sliding_window": None}
    ),
    "qwen2_moe": Family(  # arXiv 2407.10671
        _keys(_QWEN, _QWEN_MOE, num_key_value_heads=16, moe_intermediate_size=1408, num_local_experts=60)
        | {"shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4},
        {"qkv_bias": True},
        spelled=_EXPERTS,
        sliding=lambda layer, keys: layer % 2 == 0 and layer < keys["max_window_layers"],
    ),
    "qwen3_moe": Family(  # arXiv 2505.09388
        _keys(_COMMON, _QWEN_MOE, num_key_value_heads=4, max_position_embeddings=32768, attention_bias=False)
        | {"use_sliding_window": False, "sliding_window": 4096}
        | {"moe_intermediate_size": 768, "num_local_experts": 128, "num_experts_per_tok": 8},
        {"qk_norm": True},
        spelled=_EXPERTS,
    ),
    "olmoe": Family(  # arXiv 2409.02060
        _keys(_COMMON, max_position_embeddings=4096, rms_norm_eps=1e-5, attention_bias=False, norm_topk_prob=False)
        | {"num_local_experts": 64, "num_experts_per_tok": 8},
        {"qk_norm_whole": True},
        spelled=_EXPERTS,
    ),
    "granitemoe": Family(
        _keys(_COMMON, _MOE, attention_bias=False)
        | dict.fromkeys(("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
    ),
    "gpt_oss": Family(  # arXiv 2508.10925
        _keys(_COMMON, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5)
        | {"rope_theta": 1.5e5, "attention_bias": True, "sliding_window": 128, "layer_types": None}
        | {"num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
        {"sinks": True, "router_bias": True, "mlp_bias": True},
        rope=_GPT_OSS_ROPE,
        spelled=_EXPERTS,
        sliding=_every(2),
    ),
    "glm": Family(_GLM, {"o_bias": False}, interleaved=True),  # arXiv 2406.12793
    "glm4": Family(_GLM, {"o_bias": False, "post_norms": True}, tensors=_GLM4_NAMES, interleaved=True),
    "olmo2": Family(_OLMO2, {"qk_norm_whole": True, **_POST}, tensors=_POST_NAMES),  # arXiv 2501.00656
    "olmo3": Family(  # arXiv 2512.13961
        _keys(_OLMO2, _WINDOW, rope_theta=5e5),
        {"qk_norm_whole": True, **_POST},
        tensors=_POST_NAMES,
        sliding=_every(4),
        local_rope=True,
    ),
    "gemma": Family(_GEMMA, _UNIT, sqrt_embedding=True, activations=ACTIVATIONS | {"gelu": "gelu_tanh"}),  # 2403.08295
    "gemma2": Family(  # arXiv 2408.00118
        _GEMMA2, {**_UNIT, "post_norms": True}, tensors=_SANDWICH_NAMES, sqrt_embedding=True, sliding=_every(2)
    ),
    "gemma3_text": Family(  # arXiv 2503.19786
        _GEMMA3,
        {**_UNIT, "post_norms": True, "qk_norm": True, "soft_cap": 0.0},  # of scores, whatever a config.json says
        tensors=_SANDWICH_NAMES,
        sqrt_embedding=True,
        sliding=_by_pattern,
        local_rope=True,
    ),
}
# Models with other senses, whose text model's config is in text_config: its model_type, and whether its output is tied,
# where they do not say.
WRAPPERS = {
    "gemma3": ("gemma3_text", True),
    "mistral3": ("mistral", True),
    "qwen2_5_vl": ("qwen2_5_vl_text", False),
    "qwen3_vl": ("qwen3_vl_text", False),
}
