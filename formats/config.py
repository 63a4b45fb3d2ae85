"""What a config.json means: Hugging Face's keys become the fields of model.py's ModelConfig.

Every format is first put in these terms (https://huggingface.co/docs/transformers: each model's Config page lists its
keys). Also here are the configs of models known by name. Loads no torch.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from errors import UserError, shown
from formats.fields import NEEDED, Field, either, flag, integer, list_of, mapping, number, read, read_one, text

SIZES = {  # our field -> the key that every config.json must have
    "dim": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
}
# The keys read, in every family unless it says otherwise; others are ignored. The bounds are far from any real model:
# they keep what is built before weights are compared with it small.
KEYS: dict[str, Field] = {
    "hidden_size": integer(high=2**20),
    "num_hidden_layers": integer(high=10_000),
    "num_attention_heads": integer(high=2**16),
    "num_key_value_heads": integer(high=2**16, default=None),  # as many as attention heads
    "head_dim": integer(high=2**13, default=None),  # what hidden_size gives each attention head
    "intermediate_size": integer(high=2**24),
    "vocab_size": integer(high=2**24),
    "max_position_embeddings": integer(default=2048),
    "original_max_position_embeddings": integer(low=2, default=None),  # max_position_embeddings
    "rms_norm_eps": number(1e-20, 1, default=1e-5),
    "rope_theta": number(2, 1e15, default=10000.0),
    "partial_rotary_factor": number(0, 1, default=1.0),
    "attention_bias": flag(default=False),
    "mlp_bias": flag(default=False),
    "tie_word_embeddings": flag(default=False),
    "sliding_window": integer(low=0, default=0),  # 0 is none
    "use_sliding_window": flag(default=None),  # where there is one, and then in all layers
    "max_window_layers": integer(low=0, default=0),  # the first with a window, given use_sliding_window
    "layer_types": list_of(text(("full_attention", "sliding_attention")), default=()),
    "no_rope_layers": list_of(either(integer(0, 1), flag()), default=()),  # 1 is a layer that rotates
}
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
    },
}
_ANYWHERE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")  # with them or at the top level
ACTIVATIONS = ("silu", "swish")  # two names of one


@dataclass(frozen=True)
class Family:
    """What a family means beyond what its config.json says."""

    fixed: Mapping[str, object] = field(default_factory=dict)  # fields of ModelConfig
    keys: Mapping[str, Field] = field(default_factory=dict)  # its own, or with other defaults


_WINDOW_ON_DEMAND = {"use_sliding_window": flag(default=False)}
# A dense Llama-like family is one line here.
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "phi3": Family(),
    "qwen2": Family({"qkv_bias": True}, _WINDOW_ON_DEMAND),
    "qwen3": Family({"qk_norm": True}, _WINDOW_ON_DEMAND),
    "smollm3": Family({}, {"no_rope_layer_interval": integer(default=4), **_WINDOW_ON_DEMAND}),
}


def config_fields(config: Mapping, where: object = "config.json") -> dict:
    """The keyword arguments of ModelConfig that a config.json stands for. where: the file, for messages.

    Raises UserError naming what is unknown and what is supported, or the key whose value is not accepted.
    """
    family = FAMILIES[_choice("model_type", config.get("model_type"), FAMILIES)]
    if (activation := config.get("hidden_act")) is not None:
        _choice("hidden_act", activation, ACTIVATIONS)
    rope = _rope_parameters(where, config)
    values = read(where, {**KEYS, **family.keys}, {**config, **{key: rope[key] for key in _ANYWHERE if key in rope}})
    fields = {ours: values[key] for ours, key in SIZES.items()} | {
        **_heads(where, values),
        "norm_eps": values["rms_norm_eps"],
        "qkv_bias": values["attention_bias"],
        "o_bias": values["attention_bias"],
        "mlp_bias": values["mlp_bias"],
        "tied": values["tie_word_embeddings"],
        "windows": _windows(where, values),
        "rope_layers": _rope_layers(where, values),
    }
    return fields | _rope(where, values, rope, fields["head_dim"]) | family.fixed


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


def _rope_parameters(where: object, config: Mapping) -> dict:
    """All that stands in rope_parameters, where transformers 5 keeps it, and in rope_scaling, an addition to it."""
    parts = read(where, dict.fromkeys(("rope_parameters", "rope_scaling"), mapping(default={})), config)
    rope = {key: value for part in parts.values() for key, value in part.items() if value is not None}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    if by_layer_type and any(value != by_layer_type[0] for value in [*by_layer_type, *rope.values()]):
        raise UserError(f"{where}: rope_parameters differ between {shown(list(rope))}; one for all layers is supported")
    return {key: value for key, value in by_layer_type[0].items() if value is not None} if by_layer_type else rope


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
    rotary_dim = int(head_dim * values["partial_rotary_factor"] + 1e-9)  # of a quotient, perhaps a little less
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


def _rope_layers(where: object, values: dict) -> tuple[bool, ...]:
    """Whether each layer rotates, () where all do."""
    if interval := not values["no_rope_layers"] and values.get("no_rope_layer_interval"):
        return tuple((layer + 1) % interval != 0 for layer in range(values["num_hidden_layers"]))
    return tuple(map(bool, _for_each_layer(where, values, "no_rope_layers")))


def _windows(where: object, values: dict) -> tuple[int, ...]:
    """Each layer's sliding window (transformers' rules: layer_types, else use_sliding_window and max_window_layers)."""
    window, used, types = values["sliding_window"], values["use_sliding_window"], values["layer_types"]
    _for_each_layer(where, values, "layer_types")
    if used is False or not (window or "sliding_attention" in types):
        return ()
    if not window:
        raise UserError(f"{where}: layer_types has sliding_attention, but sliding_window is missing")
    if types:
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    first = values["max_window_layers"] if used else 0
    return tuple(window if layer >= first else 0 for layer in range(values["num_hidden_layers"]))


def _for_each_layer(where: object, values: dict, key: str) -> tuple:
    if len(values[key]) not in (0, values["num_hidden_layers"]):
        raise UserError(f"{where}: {key} are told of {len(values[key])} layers of {values['num_hidden_layers']}")
    return values[key]


def _choice(what: str, value: object, known: Collection[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{what} {shown(value)} is not supported; supported: {', '.join(sorted(known))}")
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
