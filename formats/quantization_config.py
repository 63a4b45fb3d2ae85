"""Hugging Face's quantised checkpoints: what `quantization_config` in config.json means, a reader a quant_method.

A reader takes a module's tensors and makes its weight of them: Lazy, of values as the file has them.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from errors import UserError, shown
from formats import awq, bnb, compressed_tensors, fp4, fp8_block, gptq_file
from formats.fields import Field, read
from formats.module import Module
from formats.source import Lazy


class Scheme(NamedTuple):
    settings: Mapping[str, Field]  # what is read of quantization_config
    markers: tuple[str, ...]  # a module is quantised that has one of these tensors
    keys: tuple[str, ...]  # and perhaps these
    weight: Callable[[Module, dict], Lazy]


_CT_KEYS = ("weight", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")
SCHEMES: dict[str, Scheme | None] = {
    "gptq": Scheme(gptq_file.SETTINGS, ("qweight",), ("qzeros", "scales", "g_idx"), gptq_file.weight),
    "awq": Scheme(awq.SETTINGS, ("qweight",), ("qzeros", "scales"), awq.weight),
    "compressed-tensors": Scheme(
        compressed_tensors.SETTINGS, ("weight_packed", "weight_scale"), _CT_KEYS, compressed_tensors.weight
    ),
    "fp8": Scheme(fp8_block.SETTINGS, ("weight_scale_inv", "weight_scale"), ("weight",), fp8_block.weight),
    "fbgemm_fp8": Scheme({}, ("weight_scale",), ("weight",), fp8_block.weight),
    "bitsandbytes": Scheme({}, bnb.MARKERS, bnb.KEYS, bnb.weight),
    "modelopt": Scheme(fp4.SETTINGS, ("weight_scale", "weight_scale_2"), ("weight",), fp4.modelopt),
    "mxfp4": None,  # gpt-oss' experts, which mixtures.py reads by their names
}
# Scales of activations and caches, which stay in 16 bits here.
_UNUSED = ("input_scale", "activation_scale", "input_global_scale", "k_scale", "v_scale", "output_scale")


def dequantisable(where: object, settings: object, tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    """The tensors of a checkpoint with this quantization_config, each quantised module's as its weight.

    Raises UserError for a quant_method that is not supported, settings out of range, and tensors that do not fit them.
    """
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str) or method not in SCHEMES:
        supported = ", ".join(SCHEMES)
        raise UserError(f"{where}: quant_method {shown(method)} is not supported; supported: {supported}")
    if SCHEMES[method] is None:
        return tensors
    scheme, modules = SCHEMES[method], {}
    settings = read(f"{where}: quantization_config", scheme.settings, settings)
    ends = sorted((*scheme.markers, *scheme.keys), key=len, reverse=True)
    for name in tensors:
        if key := next((end for end in ends if name.endswith(f".{end}")), None):
            modules.setdefault(name[: -len(key) - 1], {})[key] = tensors[name]
    modules = {name: own for name, own in modules.items() if own.keys() & set(scheme.markers)}
    out = {name: lazy for name, lazy in tensors.items() if name.rpartition(".")[2] not in _UNUSED}
    for name, own in modules.items():
        for key in own:
            del out[f"{name}.{key}"]
        out[f"{name}.weight"] = scheme.weight(Module(name, own, method), settings)
    return out
