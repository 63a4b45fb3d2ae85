"""All layers of a model in one call, on a CPU: from hidden states to hidden states of any number of tokens.

prepare(model, dtype)         once, after loading: for models that this file knows every feature of
layers(model, x, pos, cache)  the hidden states, or None where this does not serve; model.py's `hidden` is the reference
"""

import dataclasses
import weakref

import torch
from torch import Tensor, nn

from ops import cpu, memory
from ops import cpu_library as native

# Fields of a config that are implemented. Any other one must have its default: a new feature is a new field.
FIELDS = (
    "dim n_layer n_head n_local_heads head_dim intermediate_size vocab_size block_size norm_eps rope_base rope_scaling"
)
FIELDS += " rotary_dim qkv_bias o_bias mlp_bias qk_norm tied windows rope_layers"
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
MODULES = {"attention", "feed_forward", "attention_norm", "ffn_norm"}
PARTS = {"attention": {"wqkv", "wo", "q_norm", "k_norm"}, "feed_forward": {"w1", "w2", "w3", "w13"}}

_steps: "weakref.WeakKeyDictionary[nn.Module, LayersCall]" = weakref.WeakKeyDictionary()


class LayersCall:
    """What the library is told of a model, and the tensors that it reads."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        config, self.dtype = model.config, dtype
        self.H, self.C = config.n_head, config.dim
        self.tensors = list(model.layers.parameters())
        self.table = (native.Layer * config.n_layer)(
            *(self._layer(layer, i, config) for i, layer in enumerate(model.layers))
        )
        self.caches: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def _layer(self, layer: nn.Module, index: int, config) -> native.Layer:
        attention, feed_forward = layer.attention, layer.feed_forward
        linears = (attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2)
        described = (
            cpu.describe(l.weight, l.scales, l.zeros, l.bias, l.out_features, l.in_features, self.dtype, l.swiglu)
            for l in linears
        )
        norms = (layer.attention_norm, layer.ffn_norm, attention.q_norm, attention.k_norm)
        eps = (norm.eps if norm is not None else 0.0 for norm in norms[:3])
        gains = (norm.weight.data_ptr() if norm is not None else None for norm in norms)
        window = config.windows[index] if config.windows else 0
        return native.Layer(*described, *gains, *eps, window, config.rope_layers[index] if config.rope_layers else True)

    def _pointers(self, cache):
        """The addresses of a cache's tensors, which stay as long as it does."""
        first = cache.k[0].data_ptr()
        known = self.caches.get(cache)
        if known is None or known[0] != first:
            known = self.caches[cache] = (
                first,
                (native.c_void_p * (4 * len(cache.layers)))(
                    *(cpu.address(t) for k, v, *scales in cache.layers for t in (k, v, *(scales or (None, None))))
                ),
            )
        return known[1]

    def __call__(self, x: Tensor, input_pos: Tensor, cache) -> Tensor | None:
        B, S, _ = x.shape
        k, scales = cache.k[0], cache.layers[0][2] if cache.kind else None
        if cpu.most_rows(self.dtype) < B * S or x.dtype is not self.dtype or not cpu.supports_cache(k, self.dtype):
            return None
        ropes = {id(rope): rope for rope in cache.rope if rope is not None}  # layers share them
        if input_pos.dtype is not torch.int64 or len(ropes) > 1:
            return None
        x, input_pos = x.contiguous(), input_pos.contiguous()
        y = torch.empty_like(x)
        call = cpu.describe_attention(k, scales, input_pos, next(iter(ropes.values()), None), B, S, self.H)
        call.half_norm = half = x.element_size() == 2
        pointers = self.table, self._pointers(cache), x.data_ptr(), y.data_ptr()
        step = native.Step(*pointers, len(cache.layers), self.C, half, call)
        native.library().gptfast_step(step, torch.get_num_threads())
        return y


def prepare(model: nn.Module, dtype: torch.dtype) -> None:
    """Serve a model whose weights are packed, if that can be done. On a CPU they move to huge pages in any case."""
    _steps.pop(model, None)
    memory.gather([*model.layers.parameters(), *model.output.parameters()])
    if _supports(model, dtype):
        _steps[model] = LayersCall(model, dtype)


def layers(model: nn.Module, x: Tensor, input_pos: Tensor, cache) -> Tensor | None:
    """What model.hidden says, or None."""
    step = None if torch.compiler.is_compiling() else _steps.get(model)
    return step and step(x, input_pos, cache)


def serves(model: nn.Module) -> bool:
    """Whether a decode step of this model is a call or two."""
    return model in _steps


def _supports(model: nn.Module, dtype: torch.dtype) -> bool:
    config = model.config
    others = [f for f in dataclasses.fields(config) if f.name not in FIELDS.split()]
    known = all(getattr(config, f.name) == _default(f) for f in others)
    scaling = config.rope_scaling
    if not known or scaling.get("rope_type", "default") not in ROPE_TYPES or "llama_4_scaling_beta" in scaling:
        return False
    if config.head_dim % 8 or model.tp.world > 1 or dtype not in (torch.float32, torch.bfloat16):
        return False
    return all(_supports_layer(layer, dtype) for layer in model.layers)


def _default(field: dataclasses.Field) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _supports_layer(layer: nn.Module, dtype: torch.dtype) -> bool:
    parts = {name: set(dict(module.named_children())) for name, module in layer.named_children()}
    if set(parts) != MODULES or not all(parts[name] <= known for name, known in PARTS.items()):
        return False
    attention, feed_forward = layer.attention, layer.feed_forward
    linears = (attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2)
    norms = (layer.attention_norm, layer.ffn_norm, attention.q_norm, attention.k_norm)
    return all(linear is not None and linear.backends[0].__name__ == "_cpu" for linear in linears) and all(
        norm is None or (type(norm) is nn.RMSNorm and norm.weight.dtype is dtype) for norm in norms
    )
