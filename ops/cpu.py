"""The CPU's kernels as ops, for any number of tokens; cpu_step.py runs all layers of a model in one call.

linear(layer, x, ...)        [residual +] W rms_norm(x) [+ bias], or SwiGLU of it
attention(qkv, k_cache, ...) as attention.py says
sample(logits, ...)          as sampling.py says
pack(layer, dtype)           lay a layer's weight out for them
ready()                      whether they can be used: without a C++ compiler plain PyTorch serves

Integer weights meet activations as int8 with a scale for each 32 of them (three such numbers for fp32's precision),
unless there are many rows and the processor multiplies floats as fast. Other weights meet fp32, or for 4 rows and more
bf16 where AVX512-BF16 multiplies it. What is summed is fp32.
"""

import ctypes
import functools
import math
import platform

import torch
from torch import Tensor, nn

from ops import cpu_library as native
from ops import kv_cache
from ops.common import op
from ops.packing import in_16_bits, pack_rows

MAX_ROWS = 64  # with more, PyTorch is faster where `multiplies_half`
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}


def ready() -> bool:
    """Whether the kernels are there. The first call on a machine compiles them, in some 10 s, for all later ones."""
    return native.library() is not None


ready._dynamo_marked_constant = True  # all that torch.compiler.assume_constant_result does, but it imports Dynamo: 3 s


@functools.cache
def multiplies_half() -> bool:
    """Whether PyTorch multiplies many rows of bf16 faster than the kernels: by AMX's tiles, or ARM's instructions."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def most_rows(dtype: torch.dtype) -> int:
    """Of x for floating weights, and of new tokens for attention and all layers."""
    return MAX_ROWS if dtype is torch.bfloat16 and multiplies_half() else 1 << 32


most_rows._dynamo_marked_constant = True


def pack(layer, dtype: torch.dtype) -> bool:
    """Whether `linear` supports a layer (ops/linear.py's) and activations of this dtype. Packs integer weights."""
    weight, scales, zeros, bias = layer.weight, layer.scales, layer.zeros, layer.bias
    if not (
        weight.is_cpu
        and weight.is_contiguous()
        and dtype in (torch.float32, torch.bfloat16)
        and weight.dtype in (dtype, torch.int8, torch.uint8)
        and (scales is None or scales.ndim == 1 or scales.itemsize == 2)
        and (zeros is None or zeros.dtype is scales.dtype)
        and (bias is None or bias.dtype is dtype)
        and ready()
    ):
        return False
    if scales is not None:
        packed = pack_rows(weight, scales, zeros, native.library().lanes)
        layer.weight, layer.scales, layer.zeros = (
            None if t is None else nn.Parameter(t, requires_grad=False) for t in packed
        )
    return True


def narrow_scales(layer) -> None:
    """Scales and zeros of a layer's groups, of any precision, as the kernels read them: both in 16 bits."""
    narrow = in_16_bits(layer.scales, layer.zeros)
    layer.scales, layer.zeros = (None if t is None else nn.Parameter(t, requires_grad=False) for t in narrow)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def describe(
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    N: int,
    K: int,
    dtype: torch.dtype,
    swiglu: bool,
) -> native.Linear:
    """A packed layer for the library, which reads the tensors' memory: they must stay."""
    kind = KINDS[weight.dtype]
    padded = weight.shape[1] * (1, 1, 4, 8)[kind]
    group = padded // scales.shape[1] if scales is not None and scales.ndim == 3 else 0
    parts, fp16 = 3 if dtype is torch.float32 else 1, group > 0 and scales.dtype is torch.float16
    addresses = map(address, (weight, scales, zeros, bias))
    return native.Linear(*addresses, N, K, padded, kind, group, fp16, parts, swiglu, dtype is torch.bfloat16)


@op("cpu_linear")
def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    N: int,
    fp32: bool,
    swiglu: bool,
) -> Tensor:
    """[residual +] W rms_norm(x) [+ bias], or SwiGLU of it: x (..., K) -> (..., N or N / 2) in x's dtype or fp32.

    The weight (N, K) is as `pack` left it; norm (K,), bias (N,) and the residual, like the result, are of x's dtype.
    """
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y, half = _linear_fake(x, weight, scales, zeros, bias, norm, eps, residual, N, fp32, swiglu), x.element_size() == 2
    layer = describe(weight, scales, zeros, bias, N, x.shape[-1], x.dtype, swiglu)
    rows, pointers = x.numel() // x.shape[-1], (address(t) for t in (x, norm, residual, y))
    product = native.Product(ctypes.pointer(layer), *pointers, rows, eps, half, half and not fp32)
    native.library().gptfast_linear(product, torch.get_num_threads())
    return y


@torch.library.register_fake("gptfast::cpu_linear")
def _linear_fake(x, weight, scales, zeros, bias, norm, eps, residual, N, fp32, swiglu):
    return x.new_empty((*x.shape[:-1], N // 2 if swiglu else N), dtype=torch.float32 if fp32 else x.dtype)


def supports_cache(cache: Tensor, dtype: torch.dtype) -> bool:
    """Whether keys or values are kept as this library reads them, for activations of `dtype`."""
    D = cache.shape[-1]
    return cache.dtype in (dtype, *kv_cache.DTYPES.values()) and D % 8 == 0 and cache.stride()[2:] == (D, 1)


def supports_attention(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor) -> bool:
    """Whether `attention` supports these. Caches may be the first positions of longer ones."""
    dtype = qkv.dtype
    return (
        qkv.is_cpu
        and dtype in (torch.float32, torch.bfloat16)
        and k_cache.dtype is v_cache.dtype
        and supports_cache(k_cache, dtype)
        and qkv.shape[1] <= most_rows(dtype)
        and input_pos.dtype is torch.int64
        and k_cache.stride() == v_cache.stride()
        and ready()
    )


CACHES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.float8_e4m3fn: 4}  # cpu.h's Kind


def describe_attention(
    k_cache: Tensor, k_scales: Tensor | None, input_pos: Tensor, rope: Tensor | None, B: int, S: int, H: int
) -> native.Attention:
    """What is the same for all layers."""
    _, Hkv, T, D = k_cache.shape
    sizes = {"B": B, "S": S, "T": T, "H": H, "Hkv": Hkv, "D": D, "kind": CACHES[k_cache.dtype]}
    sizes |= {"of_row": k_cache.stride(0), "of_head": k_cache.stride(1)}
    if k_scales is not None:
        sizes |= {"scales_of_row": k_scales.stride(0), "scales_of_head": k_scales.stride(1)}
    if rope is not None:
        sizes |= {"rope": rope.data_ptr(), "turns": rope.shape[0], "rotary": 2 * rope.shape[1]}
    return native.Attention(pos=input_pos.data_ptr(), **sizes)


@op("cpu_attention", mutates=("k_cache", "v_cache", "k_scales", "v_scales"))
def attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    input_pos: Tensor,
    rope: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    n_head: int,
    window: int,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """What `supports_attention` said; see attention.py."""
    qkv, input_pos = qkv.contiguous(), input_pos.contiguous()
    y = _attention_fake(qkv, k_cache, v_cache, input_pos, rope, q_norm, k_norm, eps, n_head, window)
    call = describe_attention(k_cache, k_scales, input_pos, rope, *qkv.shape[:2], n_head)
    call.qkv, call.k, call.v, call.y = (t.data_ptr() for t in (qkv, k_cache, v_cache, y))
    call.k_scales, call.v_scales = address(k_scales), address(v_scales)
    call.q_norm, call.k_norm, call.eps, call.window = address(q_norm), address(k_norm), eps, window
    call.half_x = call.half_norm = qkv.element_size() == 2
    native.library().gptfast_attention(call, torch.get_num_threads())
    return y


@torch.library.register_fake("gptfast::cpu_attention")
def _attention_fake(
    qkv, k_cache, v_cache, input_pos, rope, q_norm, k_norm, eps, n_head, window, k_scales=None, v_scales=None
):
    return qkv.new_empty((*qkv.shape[:2], n_head * k_cache.shape[-1]))


def sample(logits, temperature, top_k, min_p, rng, history=None, pos=None):
    """sampling.py's `sample` of contiguous logits."""
    B, V = logits.shape
    drawn = torch.empty(B, dtype=torch.int64)
    margin = temperature * math.log(min_p) if min_p > 0 else -math.inf
    native.library().gptfast_sample(
        logits.data_ptr(), B, V, temperature, top_k, margin, rng.data_ptr(), drawn.data_ptr()
    )
    if history is not None:
        history.scatter_(1, pos.add_(1)[:, None], drawn[:, None])
    return drawn
