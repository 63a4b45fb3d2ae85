"""What a config.json means: Hugging Face's keys become the fields of model.py's ModelConfig.

Every format is first put in these terms (https://huggingface.co/docs/transformers: each model's Config page lists its
keys). Also here are the configs of models known by name. Loads no torch.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

from errors import UserError, shown
from formats.families import FAMILIES, WRAPPERS, Family, rotates
from formats.fields import NEEDED, Field, either, flag, integer, list_of, mapping, number, read, read_one, text

SIZES = {  # our field -> the key that a config.json must have
    "dim": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
}
# What each key may hold; which of them a family reads, and what they are where they are absent, FAMILIES says. The
# bounds are far from any real model: they keep what is built before weights are compared with it small.
KEYS: dict[str, Field] = {
    "hidden_size": integer(high=2**20),
    "num_hidden_layers": integer(high=10_000),
    "num_attention_heads": integer(high=2**16),
    "num_key_value_heads": integer(high=2**16),  # null: as many as attention heads
    "head_dim": integer(high=2**13),  # null: what hidden_size gives each attention head
    "intermediate_size": integer(high=2**24),
    "vocab_size": integer(high=2**24),
    "hidden_act": text(),
    "hidden_activation": text(),
    "max_position_embeddings": integer(),
    "original_max_position_embeddings": integer(low=2),  # null: max_position_embeddings
    "rms_norm_eps": number(1e-20, 1),
    "rope_theta": number(2, 1e15),
    "rope_local_base_freq": number(2, 1e15),  # of the layers that have a window
    "partial_rotary_factor": number(0, 1),
    "attention_bias": flag(),
    "attention_out_bias": flag(),
    "mlp_bias": flag(),
    "use_bias": flag(),
    "tie_word_embeddings": flag(),
    "sliding_window": integer(low=0),  # 0 or null is none
    "use_sliding_window": flag(),
    "max_window_layers": integer(low=0),  # the first with a window, given use_sliding_window
    "sliding_window_pattern": either(integer(low=0), text()),  # the last of so many layers has none
    "layer_types": list_of(text(("full_attention", "sliding_attention"))),
    "no_rope_layers": list_of(either(integer(0, 1), flag())),  # 1 is a layer that rotates
    "no_rope_layer_interval": integer(),
    "use_bidirectional_attention": flag(),
    "query_pre_attn_scalar": number(1e-6, 1e6),
    "attn_logit_softcapping": number(1e-3, 1e6),
    "final_logit_softcapping": number(1e-3, 1e6),
    "embedding_multiplier": number(1e-6, 1e6),
    "attention_multiplier": number(1e-6, 1e6),
    "residual_multiplier": number(1e-6, 1e6),
    "logits_scaling": number(1e-6, 1e6),
    "num_local_experts": integer(high=2**12),
    "num_experts_per_tok": integer(high=64),
    "moe_intermediate_size": integer(high=2**24),  # of an expert, intermediate_size where a family has none
    "shared_expert_intermediate_size": integer(low=0, high=2**24),
    "norm_topk_prob": flag(),
    "decoder_sparse_step": integer(),  # each so-manieth layer is a mixture,
    "mlp_only_layers": list_of(integer(low=0)),  # but these
    "swiglu_limit": number(1e-3, 1e6),
    "swiglu_alpha": number(1e-3, 1e3),
}
# Where these are null, they are not what an absent key is: there are none, or they follow from others.
NULLABLE = (
    *("num_key_value_heads", "head_dim", "sliding_window", "sliding_window_pattern", "layer_types", "no_rope_layers"),
    *("attn_logit_softcapping", "final_logit_softcapping", "mlp_only_layers"),
)
_FACTOR = number(1, 1e6)
_PER_PAIR = list_of(number(1e-3, 1e6))  # of the features that rotate
ROPE_TYPES: dict[str, dict[str, Field]] = {  # and the parameters of each in config.json
    "default": {},
    "linear": {"factor": _FACTOR},
    "llama3": {"factor": _FACTOR, "low_freq_factor": number(1e-3, 1e6), "high_freq_factor": number(1e-3, 1e6)},
    "longrope": {
        "short_factor": _PER_PAIR,
        "long_factor": _PER_PAIR,
        "factor": replace(_FACTOR, default=None),
        "attention_factor": number(0.01, 100, default=None),
    },
    "yarn": {
        "factor": _FACTOR,
        "beta_fast": number(1e-3, 1e6, default=32.0),
        "beta_slow": number(1e-3, 1e6, default=1.0),
        "attention_factor": number(0.01, 100, default=None),
        "mscale": number(0, 100, default=None),
        "mscale_all_dim": number(0, 100, default=None),
        "truncate": flag(default=True),
        "llama_4_scaling_beta": number(0, 100, default=0.0),
    },
}
_ANYWHERE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")  # with them or at the top level


def text_config(config: Mapping, where: object = "config.json") -> Mapping:
    """The config of the text model inside a wrapper's, or else the config itself. Raises UserError."""
    if (outer := str(config.get("model_type"))) not in WRAPPERS:
        return config
    kind, tied = WRAPPERS[outer]
    inner = read_one(where, "text_config", mapping(default={**config, "model_type": kind}), config.get("text_config"))
    told = [part["tie_word_embeddings"] for part in (config, inner) if part.get("tie_word_embeddings") is not None]
    return {**inner, "model_type": inner.get("model_type") or kind, "tie_word_embeddings": (told or [tied])[0]}


def family_of(config: Mapping) -> Family:
    """The family of a text model by its config. Raises UserError naming those supported."""
    return FAMILIES[_choice("model_type", config.get("model_type"), FAMILIES, *WRAPPERS)]


def unread(config: Mapping) -> list[str]:
    """The keys of a config that its family does not read, though others do, and that are not null, false or 0."""
    config = text_config(config)
    known = {*family_of(config).keys, *SIZES.values(), "hidden_act"}
    return [key for key in KEYS if config.get(key) and key not in known]


def config_fields(config: Mapping, where: object = "config.json") -> dict:
    """The keyword arguments of ModelConfig that a config.json stands for. where: the file, for messages.

    Raises UserError naming what is unknown and what is supported, or the key whose value is not accepted.
    """
    config = text_config(config, where)
    family = family_of(config)
    rope, local = _rope_parameters(where, config, family)
    values = _values(where, config, family, rope)
    if values.get("use_bidirectional_attention"):
        raise UserError(f"{where}: use_bidirectional_attention is true; causal attention alone is supported")
    bias = values.get("use_bias", values.get("attention_bias", False))
    windows, heads = _windows(where, family, values), _heads(where, values)
    fields = {ours: values[key] for ours, key in SIZES.items()} | {
        **heads,
        **_scales(family, values),
        "activation": _activation(family, values),
        "norm_eps": values["rms_norm_eps"],
        "qkv_bias": bias,
        "o_bias": values.get("attention_out_bias", bias),
        "mlp_bias": values.get("use_bias", values.get("mlp_bias", False)),
        "tied": values["tie_word_embeddings"],
        "windows": windows,
        "rope_layers": _rope_layers(family, values, windows),
        **_mixture(where, values),
    }
    fields |= _rope(where, values, rope, heads["head_dim"])
    if local is not None and any(windows):
        own = _rope(where, _values(where, config, family, local), local, heads["head_dim"])
        fields["local_rope"] = {key: own[key] for key in ("rope_base", "rope_scaling") if own[key] != fields[key]}
    return fields | family.fixed


def weight_factors(config: Mapping) -> dict[str, float]:
    """What to multiply tensors by at conversion, by our modules' names: Granite's scalars, which linear layers can
    absorb."""
    config = text_config(config)
    values = _values("config.json", config, family_of(config), {})
    branch, logits = values.get("residual_multiplier", 1.0), values.get("logits_scaling", 1.0)
    last = dict.fromkeys(("attention.wo", "feed_forward.w2", "block_sparse_moe.cond_ffn.w2"), branch)
    factors = last | {"norm": 1 / logits}
    return {name: factor for name, factor in factors.items() if factor != 1}


def _values(where: object, config: Mapping, family: Family, rope: Mapping) -> dict:
    """The keys that a family reads, SIZES among them, each with what the config or else the family says of it."""
    config = {**config, **{ours: config[key] for key, ours in family.spelled.items() if key in config}}
    original = "original_max_position_embeddings"  # of these keys the one that goes before rope_parameters'
    before = original if config.get(original) or family.keys[original] else None
    config |= {key: rope[key] for key in _ANYWHERE if key in rope and key != before}
    defaults = dict.fromkeys(SIZES.values(), NEEDED) | family.keys
    values = read(where, {key: replace(KEYS[key], default=default) for key, default in defaults.items()}, config)
    for key in ("layer_types", "no_rope_layers"):
        if (listed := values.get(key)) and len(listed) != values["num_hidden_layers"]:
            raise UserError(f"{where}: {key} are told of {len(listed)} layers of {values['num_hidden_layers']}")
    return values | {key: None for key in NULLABLE if key in values and config.get(key, NEEDED) is None}


def _activation(family: Family, values: dict) -> str:
    key = "hidden_activation" if "hidden_activation" in values else "hidden_act"
    return family.activations[_choice(key, values[key], family.activations)]


def _scales(family: Family, values: dict) -> dict:
    """Scales and soft caps, of which 0 is none."""
    scalar = values.get("query_pre_attn_scalar")
    return {
        "attention_scale": scalar**-0.5 if scalar else values.get("attention_multiplier", 0.0),
        "embedding_scale": values["hidden_size"] ** 0.5
        if family.sqrt_embedding
        else values.get("embedding_multiplier", 1.0),
        "soft_cap": values.get("attn_logit_softcapping") or 0.0,
        "output_soft_cap": values.get("final_logit_softcapping") or 0.0,
    }


def builtin(name: str) -> dict:
    """The config of one of gpt-fast's model names, for directories that hold no config.json. Raises UserError."""
    return BUILTIN[_choice("model name", name, BUILTIN)]


def _heads(where: object, values: dict) -> dict:
    dim, n_head = values["hidden_size"], values["num_attention_heads"]
    n_local_heads = values["num_key_value_heads"] or n_head
    if n_head % n_local_heads:
        raise UserError(f"{where}: num_key_value_heads {n_local_heads} does not divide {n_head} attention heads")
    head_dim = values["head_dim"] or read_one(where, "hidden_size / num_attention_heads", integer(), dim // n_head)
    return {"n_local_heads": n_local_heads, "head_dim": head_dim}


def _mixture(where: object, values: dict) -> dict:
    """Experts, {} in families without them. Raises UserError for numbers that do not fit each other."""
    if "num_experts_per_tok" not in values:
        return {}
    used, step = values["num_experts_per_tok"], values.get("decoder_sparse_step", 1)
    n_expert, dense = values["num_local_experts"], values.get("mlp_only_layers") or ()
    if used > n_expert:
        raise UserError(f"{where}: num_experts_per_tok {used} is more than the {n_expert} experts")
    return {
        "n_expert": n_expert,
        "n_expert_used": used,
        "expert_size": values.get("moe_intermediate_size", values["intermediate_size"]),
        "shared_size": values.get("shared_expert_intermediate_size", 0),
        "norm_topk": values.get("norm_topk_prob", True),
        "glu_limit": values.get("swiglu_limit", 0.0),
        "glu_alpha": values.get("swiglu_alpha", 1.0),
        "dense_layers": tuple(i for i in range(values["num_hidden_layers"]) if i in dense or (i + 1) % step),
    }


def _rope_parameters(where: object, config: Mapping, family: Family) -> tuple[dict, dict | None]:
    """All that stands in rope_parameters, where transformers 5 keeps it, and in rope_scaling, an addition to it; and
    what stands there of the layers with a window, where they have a RoPE of their own."""
    parts = read(where, dict.fromkeys(("rope_parameters", "rope_scaling"), mapping(default={})), config)
    rope = {key: value for part in parts.values() for key, value in part.items() if value is not None}
    nested, local = {key: value for key, value in rope.items() if isinstance(value, dict)}, None
    if family.local_rope:
        local = nested.get("sliding_attention", {})
        rope = {**nested.get("full_attention", {}), **{key: rope[key] for key in rope.keys() - nested.keys()}}
    elif nested:
        same = next(iter(nested.values()))
        if any(value != same for value in rope.values()):
            raise UserError(
                f"{where}: rope_parameters differ between {shown(list(rope))}; one for all layers is supported"
            )
        rope = same
    rope = {key: value for key, value in rope.items() if value is not None} or dict(family.rope)
    kind = rope.get("rope_type") or rope.get("type")  # the older spelling
    if isinstance(kind, str):
        rope["rope_type"] = family.rope_types.get(kind, kind)
    if local is not None and (key := "rope_local_base_freq") in family.keys:
        local = {"rope_theta": config.get(key) or family.keys[key], **local}
    return rope, local


def _rope(where: object, values: dict, rope: Mapping, head_dim: int) -> dict:
    """Positions. Raises UserError for parameters that are missing, out of range or do not fit each other."""
    kind = rope.get("rope_type") or rope.get("type")  # the older spelling
    if kind is None and "factor" in rope:
        raise UserError(f"{where}: rope_scaling has a factor, but no rope_type; supported: {', '.join(ROPE_TYPES)}")
    table = ROPE_TYPES[_choice("rope_type", kind := kind or "default", ROPE_TYPES)]
    if missing := [key for key, field in table.items() if field.default is NEEDED and key not in rope]:
        raise UserError(f"{where}: rope_type {kind!r} needs {', '.join(missing)}")
    scaling, context = read(where, table, rope), values["max_position_embeddings"]
    original = values["original_max_position_embeddings"] or max(2, context)
    rotary_dim = int(head_dim * values.get("partial_rotary_factor", 1.0) + 1e-9)  # of a quotient, perhaps a little less
    if rotary_dim % 2 or not rotary_dim:
        raise UserError(f"{where}: {rotary_dim} of {head_dim} features of a head rotate; an even number is needed")
    for key in ("short_factor", "long_factor"):
        if len(scaling.get(key, ())) not in (0, rotary_dim // 2) or scaling.get(key) == ():
            raise UserError(f"{where}: {key} has {len(scaling[key])} numbers; {rotary_dim // 2} are needed")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in scaling and scaling[low] >= scaling[high]:
            raise UserError(f"{where}: {low} {scaling[low]:g} must be less than {high} {scaling[high]:g}")
    # What yarn stretches may be told before or after it is.
    stretched = int(original * scaling["factor"]) if kind == "yarn" else 0
    lengths = {"original_max_position_embeddings": original, "max_position_embeddings": context}
    return {
        "block_size": read_one(where, "the context", integer(), max(context, stretched)),
        "rope_base": values["rope_theta"],
        "rope_scaling": {"rope_type": kind, **lengths, **scaling},
        "rotary_dim": rotary_dim,
    }


def _rope_layers(family: Family, values: dict, windows: tuple[int, ...]) -> tuple[bool, ...]:
    """Whether each layer rotates, () where all do."""
    if "no_rope_layers" in values:
        return tuple(rotates(layer, values) for layer in range(values["num_hidden_layers"]))
    if not family.window_rope or not values.get("sliding_window"):
        return ()
    return tuple(map(bool, windows or (0,) * values["num_hidden_layers"]))


def _windows(where: object, family: Family, values: dict) -> tuple[int, ...]:
    """Each layer's sliding window (transformers' rules: layer_types, or else the family's), () where none has one."""
    window, types = values.get("sliding_window"), values.get("layer_types") or ()
    if values.get("use_sliding_window") is False:
        return ()
    slides = [kind == "sliding_attention" for kind in types]
    slides = slides or [bool(window and family.sliding(i, values)) for i in range(values["num_hidden_layers"])]
    if any(slides) and not window:
        raise UserError(f"{where}: layer_types has sliding_attention, but sliding_window is missing")
    return tuple(window if slide else 0 for slide in slides) if any(slides) else ()


def _choice(what: str, value: object, known: Collection[str], *more: str) -> str:
    """The value, if it is known. more: what is supported elsewhere, for the message."""
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{what} {shown(value)} is not supported; supported: {', '.join(sorted([*known, *more]))}")
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

_QWEN3_MOE = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
_QWEN3_MOE |= {"rms_norm_eps": 1e-6, "moe_intermediate_size": 768}

# The models that gpt-fast lists by name, llama2.c's, Llama 3.2's and two mixtures, in config.json's terms.
BUILTIN: dict[str, dict] = {
    "CodeLlama-7b-Python-hf": _llama(4096, 32, 32, 11008, context=16384, base=1e6),
    "7B": _llama(4096, 32, 32, 11008),
    "13B": _llama(5120, 40, 40, 13824),
    "30B": _llama(6656, 60, 52, 17920, context=2048),
    "34B": _llama(8192, 48, 64, 22016, kv=8, context=16384, base=1e6),
    "70B": _llama(8192, 80, 64, 28672, kv=8),
    "Mistral-7B": _llama(4096, 32, 32, 14336, kv=8, context=32768, model_type="mistral", sliding_window=4096),
    "Mixtral-8x7B-v0.1": _llama(4096, 32, 32, 14336, kv=8, context=32768, base=1e6, model_type="mixtral"),
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
    "Qwen3-30B-A3B": _llama(
        2048, 48, 32, 6144, kv=4, vocab=151936, context=40960, base=1e6, model_type="qwen3_moe", **_QWEN3_MOE
    ),
    "gpt-oss-20b": _llama(
        2880, 24, 64, 2880, kv=8, vocab=201088, context=131072, base=1.5e5, model_type="gpt_oss", num_local_experts=32
    ),
}
