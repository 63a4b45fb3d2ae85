"""bitsandbytes' files: nf4 and fp4 (arXiv 2305.14314), which become floating point, and int8 (arXiv 2208.07339).

nf4, fp4  weight uint8 (N K / 2, 1), two indices a byte, the first one in the high bits, of the table weight.quant_map;
          a factor weight.absmax for each block of values, itself perhaps in 8 bits (nested_*); the rest as JSON
int8      weight int8 (N, K), SCB fp32 (N,): w = q * SCB / 127
Reference: https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

import json

import torch
from torch import Tensor

from errors import UserError
from formats.fields import integer, list_of, mapping, number, read
from formats.module import FLOATS, Module
from formats.quantised import layout_of, stored, tensors_of
from formats.source import Lazy

MARKERS = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4", "SCB")
KEYS = ("weight", "weight_format", "weight.absmax", "weight.quant_map")
KEYS += ("weight.nested_absmax", "weight.nested_quant_map")
_STATE = {
    "shape": list_of(integer(), most=2),
    "blocksize": integer(),
    "nested_blocksize": integer(default=0),
    "nested_offset": number(-1e30, 1e30, default=0.0),
}


def weight(module: Module, settings: dict) -> Lazy:
    if "SCB" in module:
        N, K = module.shape("weight", None, None)
        module.shape("SCB", N)
        layout = layout_of("int8", 0, K, torch.float32)

        def tensors() -> dict[str, Tensor]:
            scales = module.read("SCB", torch.float32) * (1 / 127)
            return tensors_of(layout, module.read("weight", torch.int8), scales[:, None], None, 0)

        return stored((N, K), layout, tensors)
    marker = next(key for key in MARKERS if key in module)
    try:
        state = mapping().parse(json.loads(bytes(module.read(marker, torch.uint8))))
    except ValueError:
        raise UserError(f"{module.name}.{marker} is no JSON object") from None
    state = read(f"{module.name}.{marker}", _STATE, state)
    N, K = state["shape"] if len(state["shape"]) == 2 else (1, *state["shape"])
    module.shape("weight", -(-N * K // 2), 1)
    module.shape("weight.absmax", -(-N * K // state["blocksize"]))
    module.shape("weight.quant_map", 16)
    return Lazy((N, K), lambda: _dense(module, state, N, K), None, "a table of 16 values (nf4, fp4) fits no layout")


def _dense(module: Module, state: dict, N: int, K: int) -> Tensor:
    packed, table = module.read("weight", torch.uint8).flatten(), module.read("weight.quant_map", *FLOATS).float()
    factors = module.read("weight.absmax", torch.uint8, *FLOATS)
    if factors.dtype is torch.uint8:
        nested, blocks = module.read("weight.nested_quant_map", torch.float32), state["nested_blocksize"]
        module.shape("weight.nested_absmax", -(-len(factors) // max(blocks, 1)))
        outer = module.read("weight.nested_absmax", torch.float32)[torch.arange(len(factors)) // max(blocks, 1)]
        factors = nested[factors.int()] * outer + state["nested_offset"]
    values = table[torch.stack((packed >> 4, packed & 15), 1).flatten().int()][: N * K]
    return (values * factors.float()[torch.arange(N * K) // state["blocksize"]]).view(N, K)
