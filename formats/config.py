"""What a config.json means: Hugging Face's keys become the fields of model.py's ModelConfig.

Every format is first put in these terms (https://huggingface.co/docs/transformers: each model's Config page lists its
keys). Also here are the configs of models known by name. Loads no torch.
"""

from collections.abc import Collection

from errors import UserError

# What a family fixes beyond what its config.json says. A dense Llama-like family is one line here.
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {},
    "phi3": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "smollm3": {},
}
ROPE_TYPES = {  # and the parameters that each needs in config.json
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
    "yarn": ("factor",),
}
ACTIVATIONS = ("silu", "swish")  # two names of one
SIZES = {  # our field -> the key that every config.json must have
    "dim": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
}


def config_fields(config: dict) -> dict:
    """The keyword arguments of ModelConfig that a config.json stands for.

    Raises UserError naming what is unknown and what is supported, or the key that is missing or of a wrong type.
    """
    try:
        return _fields(config)
    except (TypeError, ValueError) as error:  # a value of another type than families have there
        raise UserError(f"config.json: {error}") from None


def builtin(name: str) -> dict:
    """The config of one of gpt-fast's model names, for directories that hold no config.json. Raises UserError."""
    return BUILTIN[_choice("model name", name, BUILTIN)]


def _fields(config: dict) -> dict:
    family = _choice("model_type", config.get("model_type"), FAMILIES)
    _choice("hidden_act", config.get("hidden_act", "silu"), ACTIVATIONS)
    fields = {field: _positive(config, key) for field, key in SIZES.items()}
    fields |= _heads(config, fields["dim"], fields["n_head"])
    fields |= _rope(config, fields["head_dim"])
    bias = bool(config.get("attention_bias", False))
    fields |= {
        "norm_eps": config.get("rms_norm_eps", 1e-5),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "tied": bool(config.get("tie_word_embeddings", False)),
    }
    return fields | _by_layer(config, fields["n_layer"]) | FAMILIES[family]


def _heads(config: dict, dim: int, n_head: int) -> dict:
    n_local_heads = config.get("num_key_value_heads") or n_head
    if n_head % n_local_heads:
        raise UserError(f"config.json: num_key_value_heads {n_local_heads} does not divide {n_head} attention heads")
    return {"n_local_heads": n_local_heads, "head_dim": config.get("head_dim") or dim // n_head}


def _rope(config: dict, head_dim: int) -> dict:
    """Positions: transformers 5 keeps all that concerns them in rope_parameters, before it was spread."""
    context = config.get("max_position_embeddings", 2048)
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = {key: value for key, value in rope.items() if value is not None}
    rope["rope_type"] = kind = rope.get("rope_type") or rope.get("type") or "default"  # `type` is the older spelling
    if missing := [key for key in ROPE_TYPES[_choice("rope_type", kind, ROPE_TYPES)] if key not in rope]:
        raise UserError(f"config.json: rope_type {kind!r} needs {', '.join(missing)}")
    original = config.get("original_max_position_embeddings") or context
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return {
        "block_size": context,
        "rope_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "rope_scaling": {"original_max_position_embeddings": original, "max_position_embeddings": context, **rope},
        "rotary_dim": int(head_dim * partial),
    }


def _by_layer(config: dict, n_layer: int) -> dict:
    """Fields that hold a value a layer, or none where all layers are alike."""
    fields = {
        "windows": _windows(config, n_layer),
        "rope_layers": tuple(bool(r) for r in config.get("no_rope_layers") or ()),
    }
    for name, values in fields.items():
        if len(values) not in (0, n_layer):
            raise UserError(f"config.json: {name} are told of {len(values)} layers of {n_layer}")
    return fields


def _windows(config: dict, n_layer: int) -> tuple[int, ...]:
    """Each layer's sliding window (transformers' rules: layer_types, else use_sliding_window and max_window_layers)."""
    window = config.get("sliding_window") or 0
    if not window or not config.get("use_sliding_window", True):
        return ()
    if types := config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    first = config.get("max_window_layers", 0) if "use_sliding_window" in config else 0
    return tuple(window if layer >= first else 0 for layer in range(n_layer))


def _positive(config: dict, key: str) -> int:
    if not isinstance(config.get(key), int) or config[key] <= 0:
        raise UserError(f"config.json: {key} is {config.get(key)!r}; a positive integer is needed")
    return config[key]


def _choice(what: str, value: object, known: Collection[str]) -> str:
    if value not in known:
        raise UserError(f"{what} {value!r} is not supported; supported: {', '.join(sorted(known))}")
    return value


# --- models known by name ---------------------------------------------------------------------------------------------


def _llama(dim, layers, heads, intermediate, *, kv=None, vocab=32000, context=4096, base=10000.0, **more) -> dict:
    sizes = dict(zip(SIZES.values(), (dim, layers, heads, intermediate, vocab)))
    rest = {"num_key_value_heads": kv or heads, "max_position_embeddings": context, "rope_theta": base}
    return {"model_type": "llama", "rms_norm_eps": 1e-5, **sizes, **rest, **more}


def llama3_scaling(factor: float) -> dict:
    """Llama 3.1's rope parameters, in config.json's terms."""
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **bands}


_LLAMA3 = {"kv": 8, "vocab": 128256, "context": 8192, "base": 5e5}
_LLAMA31 = {**_LLAMA3, "context": 131072, "rope_scaling": llama3_scaling(8.0)}
_LLAMA32 = {**_LLAMA3, "context": 131072, "rope_scaling": llama3_scaling(32.0), "tie_word_embeddings": True}

# The dense models that gpt-fast lists by name, llama2.c's and Llama 3.2's, in config.json's terms.
BUILTIN: dict[str, dict] = {
    "CodeLlama-7b-Python-hf": _llama(4096, 32, 32, 11008, context=16384, base=1e6),
    "7B": _llama(4096, 32, 32, 11008),
    "13B": _llama(5120, 40, 40, 13824),
    "30B": _llama(6656, 60, 52, 17920, context=2048),
    "34B": _llama(8192, 48, 64, 22016, kv=8, context=16384, base=1e6),
    "70B": _llama(8192, 80, 64, 28672, kv=8),
    "Mistral-7B": _llama(4096, 32, 32, 14336, kv=8, context=32768, model_type="mistral", sliding_window=4096),
    "stories15M": _llama(288, 6, 6, 768, context=256),
    "stories42M": _llama(512, 8, 8, 1376, context=1024),
    "stories110M": _llama(768, 12, 12, 2048, context=1024),
    "Llama-3-8B": _llama(4096, 32, 32, 14336, **_LLAMA3),
    "Llama-3-70B": _llama(8192, 80, 64, 28672, **_LLAMA3),
    "Llama-3.1-8B": _llama(4096, 32, 32, 14336, **_LLAMA31),
    "Llama-3.1-70B": _llama(8192, 80, 64, 28672, **_LLAMA31),
    "Llama-3.1-405B": _llama(16384, 126, 128, 53248, **_LLAMA31),
    "Llama-3.2-1B": _llama(2048, 16, 32, 8192, **_LLAMA32),
    "Llama-3.2-3B": _llama(3072, 28, 24, 8192, **_LLAMA32),
}
