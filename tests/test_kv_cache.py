"""Keys and values in 8 bits: what is stored, the kernels over it, and all that copies, cuts or shares a cache."""

import itertools
import math
import os

import pytest
import torch
from tiny import never, write_checkpoint

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # has to be set before Triton is imported

from test_kernels import error, scalars_index  # noqa: E402, F401

from batches import serve  # noqa: E402
from checkpoint import load_model  # noqa: E402
from engine import Engine  # noqa: E402
from errors import UserError  # noqa: E402
from eval import LanguageModel, perplexity  # noqa: E402
from generate import generate, load  # noqa: E402
from model import KVCache, ModelConfig  # noqa: E402
from ops import kv_cache  # noqa: E402
from ops.attention import attention_plain  # noqa: E402
from ops.attention_triton import attention_triton  # noqa: E402
from ops.common import tl, triton  # noqa: E402
from ops.prefill import attention_prefill  # noqa: E402
from sampling import Sampler  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
KINDS = list(kv_cache.DTYPES)
GREEDY = Sampler(temperature=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_quantize(kind):
    x = torch.randn(50, 64) * torch.logspace(-20, 20, 50)[:, None]
    x[7], x[8, 1:] = 0, 0
    q, scales = kv_cache.quantize(x, kv_cache.DTYPES[kind])
    back = kv_cache.dequantize(q, scales, torch.float32)
    largest = x.abs().amax(1, keepdim=True)
    step = largest / 127 if kind == "int8" else x.abs() / 8 + largest / 448 / 512  # of the grid, there
    assert ((back - x).abs() <= 0.51 * 1.008 * step).all()
    assert scales.dtype is torch.bfloat16 and q.element_size() == 1
    assert torch.equal(kv_cache.dequantize(x, None, torch.float64), x.double())


if triton is not None:

    @triton.jit
    def _encode(q, scales, own, x, KIND: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
        row = tl.arange(0, ROWS)
        at = row[:, None] * D + tl.arange(0, D)[None, :]
        code, scale, value = kv_cache.encode(tl.load(x + at), KIND)
        tl.store(q + at, code)
        tl.store(scales + row, scale)
        tl.store(own + at, value)


@pytest.mark.skipif(triton is None, reason="the kernels need Triton")
@pytest.mark.parametrize("kind", KINDS)
def test_encode_rounds_as_quantize_does(kind):
    """All of fp8's values, what lies between them, and small, large and random numbers."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (grid[1:] + grid[:-1]) / 2
    near = [t * (1 + sign * 2**-20) for t in (grid[:-1], between) for sign in (-1, 1)]
    x = torch.cat((grid, between, *near, torch.rand(1024 - 127 - 126 - 4 * 126) * 448)).view(16, 64)
    x = torch.cat((x, torch.randn(16, 64) * torch.logspace(-20, 20, 16)[:, None])) * torch.randn(32, 64).sign()
    x[:16, 0] = 448.0  # whose scale is one
    if kind == "int8":
        x[:16] *= 127 / 448
    x = x.to(DEVICE)
    expected, expected_scales = kv_cache.quantize(x, kv_cache.DTYPES[kind])
    q, scales, own = torch.empty_like(expected), torch.empty_like(x[:, 0]), torch.empty_like(x)
    _encode[(1,)](q, scales, own, x, kind, 32, 64)
    assert torch.equal(own, kv_cache.dequantize(q, scales, torch.float32))
    exact, found = x / scales[:, None], own / scales[:, None]
    step = torch.ones_like(exact) if kind == "int8" else 2 ** exact.abs().clamp(min=2**-6).log2().floor() / 8
    assert ((exact - found).abs() <= 0.5 * step * (1 + 2**-14)).all()
    if CUDA:  # where division rounds otherwise
        torch.testing.assert_close(scales, expected_scales.float(), rtol=2**-7, atol=0)
    else:
        assert torch.equal(scales.bfloat16(), expected_scales)
        assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))


def expected_attention(qkv, cache, positions, H, window, soft_cap, sinks):
    """In fp64, of what the cache holds after the kernel."""
    B, S, _ = qkv.shape
    _, Hkv, _, D = cache[0].shape
    k, v = (
        kv_cache.dequantize(c, s if s is None else s[:, :, : c.shape[2]], torch.float32).double()
        for c, s in itertools.zip_longest(cache[:2], cache[2:])
    )
    q, out = qkv.view(B, S, -1, D)[:, :, :H].double(), torch.zeros(B, S, H, D, dtype=torch.float64, device=qkv.device)
    for b, s, h in itertools.product(range(B), range(S), range(H)):
        end = positions[b] + s + 1
        seen = slice(max(0, end - window) if window else 0, end)
        scores = k[b, h * Hkv // H, seen] @ q[b, s, h] / math.sqrt(D)
        scores = soft_cap * torch.tanh(scores / soft_cap) if soft_cap else scores
        weights = scores.exp() / (scores.exp().sum() + (0 if sinks is None else sinks[h].double().exp()))
        out[b, s, h] = weights @ v[b, h * Hkv // H, seen]
    return out.flatten(2)


@pytest.mark.skipif(triton is None, reason="the kernels need Triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if CUDA else [torch.float16])
@pytest.mark.parametrize(
    "B,S,H,Hkv,D,T,window,soft_cap,with_sinks,positions",
    [
        (1, 1, 4, 2, 128, 300, 0, 0.0, False, [280]),  # three splits
        (2, 1, 4, 2, 64, 205, 100, 0.0, True, [201, 0]),  # a window, an empty row, an odd length
        (1, 3, 8, 2, 80, 70, 0, 3.0, False, [60]),  # grouped heads, a head dimension that is no power of two
        (1, 2, 2, 1, 256, 45, 20, 0.0, False, [40]),
        (2, 20, 4, 2, 64, 90, 33, 3.0, True, [60, 7]),  # of many tokens
        (1, 150, 2, 1, 80, 160, 0, 0.0, False, [10]),
    ],
)
def test_attention(B, S, H, Hkv, D, T, window, soft_cap, with_sinks, positions, kind, dtype):
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(B, S, (H + 2 * Hkv) * D, generator=generator).to(dtype)
    cache = kv_cache.allocate((B, Hkv, T, D), dtype, kind, "cpu")
    for tensor, scales in zip(cache[:2], cache[2:]):
        q, own = kv_cache.quantize(2 * torch.randn(B, Hkv, T, D, generator=generator), tensor.dtype)
        tensor.copy_(q)
        scales[:, :, :T] = own
        scales[:, :, T:] = math.nan
    for b, position in enumerate(positions):  # what is read from there shows
        first = max(0, position - window + 1) if window else 0
        for unseen in (slice(first), slice(position, None)):
            for tensor, scales in zip(cache[:2], cache[2:]):
                tensor.view(torch.uint8)[b, :, unseen] = 255 if kind == "int8" else 127  # fp8's NaN
                scales[b, :, unseen] = math.nan
    sinks = torch.randn(H, generator=generator).to(dtype) if with_sinks else None
    qkv, pos, *cache = (t.to(DEVICE) for t in (qkv, torch.tensor(positions), *cache))
    sinks = sinks if sinks is None else sinks.to(DEVICE)
    plain = [t.clone() for t in cache]
    before = [t.clone() for t in cache]
    rest = (None, None, None, 0.0, H, window, None, soft_cap, sinks)
    kernel = attention_triton if S <= 16 else attention_prefill
    for _ in range(2):
        out = kernel(qkv, *cache[:2], pos, *rest, *cache[2:])
        assert error(out, expected_attention(qkv, cache, positions, H, window, soft_cap, sinks)) < 1e-2
    attention_plain(qkv, *plain[:2], pos, *rest, *plain[2:])
    for tensors in zip(cache, plain, before):
        for b, position in enumerate(positions):
            ours, old = (t.view(torch.uint8 if t.element_size() == 1 else t.dtype)[b] for t in tensors[::2])
            assert torch.equal(ours[:, position + S :].isnan(), old[:, position + S :].isnan())
            assert torch.equal(ours[:, :position].nan_to_num(), old[:, :position].nan_to_num())
            new = slice(position, position + S)
            a, b = (t[b][:, new].float() for t in tensors[:2])
            # Division may round to another side: a step of the grid.
            step = {torch.uint8: 1, torch.bfloat16: 0}.get(tensors[0].dtype, b.abs() / 8 + 2**-9)
            assert ((a - b).abs() <= step).all()
            assert (a != b).float().mean() < 0.01


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory)
    return directory / "model.pth"


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_shares_a_cache(kind, tiny):
    """Chunks, batches with refill and a shared prefix, and speculation give plain greedy decoding's tokens."""
    options = {"precision": "fp32", "max_seq_length": 64, "sampler": GREEDY, "kv_cache": kind}
    prompt = [5, 9, 30, 77, 12, 40] * 5
    llm = load(tiny, **options)
    expected = list(generate(llm, prompt, 20, is_stop=never))
    assert llm.state.cache.layers[0][0].dtype is kv_cache.DTYPES[kind]
    whole = [t.clone() for t in llm.state.cache.tensors]
    llm.prefill([prompt[:13]])
    llm.prefill([prompt], 13)
    for ours, once in zip(llm.state.cache.tensors, whole):
        torch.testing.assert_close(ours[:, :, :30].float(), once[:, :, :30].float(), rtol=0.01, atol=1)
    for draft in ("prompt_lookup", tiny):
        speculating = load(tiny, draft=draft, **options)
        assert list(generate(speculating, prompt, 20, is_stop=never)) == expected
    assert speculating.speculator.draft.cache.kind == kind
    rows, found = load(tiny, batch_size=2, **options), {}
    for index, token, _ in serve(rows, [prompt, prompt[:20], prompt[:7], prompt], 20, is_stop=never):
        found.setdefault(index, []).append(token)
    assert found[0] == found[3] == expected
    lm = LanguageModel(llm.model, load_tokenizer(tiny.parent), kv_cache=kind)
    exact = LanguageModel(llm.model, load_tokenizer(tiny.parent))
    pairs = [(prompt, [7, 8, 9]), (prompt, [4]), (prompt[:9], [3, 3])]
    for (a, _), (b, _) in zip(lm.score(pairs), exact.score(pairs)):
        assert a != b and a == pytest.approx(b, rel=0.2 if kind == "fp8" else 0.05)


def test_a_cache_counts_and_cuts_what_it_holds():
    config = ModelConfig(dim=64, n_layer=3, n_head=4, n_local_heads=2, head_dim=16, intermediate_size=64, vocab_size=9)
    like = {"dtype": torch.bfloat16, "device": "cpu"}
    sizes = {kind: KVCache(config, 2, 37, kind=kind, **like).bytes_per_position for kind in (None, *KINDS)}
    assert sizes == {None: 3 * 2 * 2 * 16 * 2, "int8": 3 * 2 * 2 * (16 + 2), "fp8": 3 * 2 * 2 * (16 + 2)}
    cache = KVCache(config, 2, 37, kind="int8", shards=2, **like)
    part = cache.first(5)
    assert (part.length, part.kind) == (5, "int8")
    assert [t.shape for t in part.layers[0]] == [(2, 1, 5, 16)] * 2 + [(2, 1, 5)] * 2
    assert part.layers[0][2].stride(1) % kv_cache.PAD == 0  # as kernels want them
    part.layers[1][0].fill_(3)
    assert cache.layers[1][0][:, :, :5].eq(3).all() and cache.layers[1][0].sum() == 2 * 5 * 16 * 3
    assert KVCache(config, 1, 3, kind="fp8", **like).select(torch.tensor([0, 0])).layers[2][3].shape[0] == 2
    with pytest.raises(UserError, match="kv_cache is 'int4'; accepted: int8, fp8"):
        KVCache(config, 1, 8, kind="int4", **like)


def test_an_unknown_kind_is_one_line(refuses):
    for script in ("generate.py", "eval.py", "scripts/bench.py"):
        refuses(script, "--kv_cache", "int4", words="--kv_cache: invalid choice: 'int4'.*fp8.*int8")


def test_smollm2(smollm2_dir):
    """Logits near those of a cache in fp32, and a text's perplexity."""
    model = load_model(smollm2_dir / "model.pth", dtype=torch.float32, device=DEVICE)
    tokenizer = load_tokenizer(smollm2_dir)
    prompt = tokenizer.encode("The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is")
    tokens, logits, texts = torch.tensor([prompt], device=DEVICE), {}, {}
    for kind in (None, *KINDS):
        logits[kind] = model(tokens, torch.zeros(1, dtype=torch.int64), model.cache(1, 64, kind), all_logits=True)
        llm = Engine(model, max_seq_length=64, sampler=GREEDY, kv_cache=kind)
        texts[kind] = tokenizer.decode(list(generate(llm, prompt, 8, is_stop=never)))
    assert error(logits["int8"], logits[None]) < 0.035 and error(logits["fp8"], logits[None]) < 0.06
    assert all(text.startswith(" Madrid.") for text in texts.values())
    nll = {
        kind: perplexity(LanguageModel(model, tokenizer, kv_cache=kind), "\n".join(texts.values()) * 3)["nll"]
        for kind in (None, *KINDS)
    }
    assert all(abs(nll[kind] / nll[None] - 1) < 0.02 for kind in KINDS)
