"""Tensor parallelism: shards add up, ranks compute what one process does, nobody hangs."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.device_count() > 0  # does not start CUDA, after which no process could be forked
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # has to be set before Triton is imported


from batches import serve  # noqa: E402
from checkpoint import load_model  # noqa: E402
from engine import Engine  # noqa: E402
from errors import UserError  # noqa: E402
from formats.quantised import layout_of, tensors_of  # noqa: E402
from generate import generate, load  # noqa: E402
from gptq import Hessian, gptq  # noqa: E402
from linear import Linear, quantize_linear  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from ops import exchange, linear_triton, packing, symmetric, tuning  # noqa: E402
from ops.common import MAX_ROWS  # noqa: E402
from process.ranks import session  # noqa: E402
from sampling import Sampler  # noqa: E402
from tp import TensorParallel  # noqa: E402

REPO = Path(__file__).resolve().parent.parent
KINDS = ["plain", "int8", "fp8", "int4:32", "int4:128"]
CONVERTED = {"gptq file": ("int4", 32), "gguf file": ("int8", 16)}  # formats' layouts, with scales in fp16
# What families bring: OLMo 2's norms over all heads, Gemma's block, Ministral 3's growing queries.
SCALES = {"embedding_scale": 8.0, "attention_scale": 0.2, "soft_cap": 3.0, "output_soft_cap": 4.0}
LOCAL = {"windows": (4, 0), "local_rope": {"rope_base": 100.0}}
GROWTH = {"rope_type": "default", "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.5}
FAMILIES = (
    {"qk_norm_whole": True, "pre_norms": False, "post_norms": True},
    {"tied": True, "unit_offset": True, "post_norms": True, "activation": "gelu_tanh", **SCALES, **LOCAL},
    {"rope_scaling": GROWTH},
)
# World size: query heads, key/value heads, head dimension; those of 16 and 48 make int4 groups straddle ranks.
SHAPES = {2: (4, 1, 48), 3: (6, 3, 32), 4: (8, 2, 16)}


def tiny_config(world, **more):
    H, Hkv, D = SHAPES[world]
    shape = {"n_head": H, "n_local_heads": Hkv, "head_dim": D, "intermediate_size": 160, "vocab_size": 259}
    return ModelConfig(dim=64, n_layer=2, block_size=64, **shape, **more)


def write_model(path, config, kind):
    """A random checkpoint of `config`, quantised to `kind`."""
    torch.manual_seed(0)
    model = Transformer(config)
    state = {}
    for name, module in model.named_modules():
        own = {key: torch.randn_like(p) / 2**p.ndim for key, p in module.named_parameters(recurse=False)}
        if config.tied and name == "output":
            continue
        if kind == "int4-gptq" and isinstance(module, Linear):
            hessian = Hessian(module.in_features)
            hessian.add(torch.randn(200, module.in_features))
            own |= gptq(own["weight"], hessian.mean, "int4:32")
        elif kind in CONVERTED and isinstance(module, Linear):
            bits, group = CONVERTED[kind]
            layout, (N, K) = layout_of(bits, group, module.in_features, torch.float16, torch.float32), module.shape
            q, n = torch.randint(-8, 8, (N, K)), -(-K // group)
            own |= tensors_of(layout, q, torch.rand(N, n) / 16, torch.randn(N, n) / 16, group)
        elif kind != "plain" and isinstance(module, Linear):
            own = quantize_linear(kind, own, name)
        state |= {f"{name}.{key}": t for key, t in own.items()}
    torch.save(state, path)


# --- without other processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_a_weight_make_up_the_whole(world, kind):
    config = tiny_config(world, qkv_bias=True, o_bias=True)
    H, Hkv, D = config.n_head, config.n_local_heads, config.head_dim
    ranks = [TensorParallel(rank, world) for rank in range(world)]
    models = [Transformer(config, rank) for rank in ranks]
    linears = {name: module for name, module in Transformer(config).named_modules() if isinstance(module, Linear)}
    for name in ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "output"):
        name = name if name == "output" else f"layers.0.{name}"
        N, K = linears[name].shape
        tensors = {"weight": torch.randn(N, K), "bias": torch.randn(N)}
        if kind != "plain":
            tensors = quantize_linear(kind, tensors, name)
        whole, x, results = Linear(K, N).assign(tensors), torch.randn(3, K), []
        for model in models:
            part = model.get_submodule(name)
            part.assign(part.shard(tensors, name), f"{name} of {part.rank}").reduce = ""  # its share alone
            columns = part.columns or range(K)
            own = torch.zeros(3, len(columns))
            own[:, : len(columns[: max(0, K - columns.start)])] = x[:, columns.start : columns.stop]
            results.append(part(own))
        if linears[name].columns:
            found = sum(results)
        elif name.endswith("wqkv"):  # heads that are in several ranks must agree; take the last one's
            found = torch.full((3, N), torch.nan)
            for rank, y in zip(ranks, results):
                queries, keys = rank.heads(H, Hkv)
                spans = [range(a + s.start, a + s.stop) for a, s in ((0, queries), (H, keys), (H + Hkv, keys))]
                index = torch.tensor([head * D + d for span in spans for head in span for d in range(D)])
                found[:, index] = y
        else:
            found = torch.cat(results, 1)[:, :N]
        torch.testing.assert_close(found, whole(x), rtol=1e-4, atol=1e-4)


def test_world_sizes_that_work_are_named():
    with pytest.raises(UserError, match=r"world size 3 .* 4 query and 2 key/value heads; .* that work: 1, 2, 4$"):
        TensorParallel(0, 3).heads(4, 2)
    assert TensorParallel(5, 6).heads(12, 2) == (range(10, 12), range(1, 2))  # three ranks share a head


def test_a_draft_that_every_rank_holds_whole_is_compared_with_the_whole_target():
    config = tiny_config(2)
    target, draft = Transformer(config, TensorParallel(0, 2)), Transformer(config)
    assert Engine(target, max_seq_length=8, draft=draft).speculator.draft.model is draft


def symmetric_buffers(world, slots):
    memory = [torch.zeros(2, world, slots, dtype=torch.int64) for _ in range(world)]
    return memory, torch.tensor([buffer.data_ptr() for buffer in memory])


@pytest.mark.skipif(CUDA, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("mode", ["sum fp32", "sum fp16", "sum and residual fp32", "sum and residual fp16", "gather"])
def test_all_reduce_kernel(world, mode):
    """Rank 1's kernel, with what the other ranks send put into its buffer beforehand."""
    pytest.importorskip("triton")
    rank = 1
    memory, buffers = symmetric_buffers(world, symmetric.MAX_WORDS)
    counts = torch.zeros(symmetric.MAX_WORDS // symmetric.BLOCK, dtype=torch.int64)
    for number in (1, 2, 3):  # the two places take turns
        x = torch.randn(world, 2, 3, 130).to(torch.float16 if mode.endswith("fp16") else torch.float32)
        for other in range(world):
            words = x[other].view(torch.int32).flatten().long()
            if other != rank:
                memory[rank][number % 2, other, : len(words)] = words << 32 | number
        residual = torch.randn(2, 3, 130).to(x.dtype) if "residual" in mode else None
        out = symmetric.all_reduce_triton(x[rank], mode == "gather", rank, world, buffers, counts, residual)
        total = x.float().sum(0) + (0 if residual is None else residual.float())
        expected = torch.cat(list(x), -1) if mode == "gather" else total.to(x.dtype)
        torch.testing.assert_close(out, expected)
        mine = x[rank].view(torch.int32).flatten().long() << 32 | number
        assert all(torch.equal(buffer[number % 2, rank, : len(mine)], mine) for buffer in memory)


@pytest.mark.skipif(CUDA, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("kind,world", list(zip(KINDS, (2, 3, 3, 2, 3))))
def test_linear_kernel_sums_or_gathers_over_ranks(world, kind, monkeypatch):
    """Rank 1's kernel, with the other ranks' products put into its buffer beforehand: tiles and rows change, and
    weights are narrower in between, as a draft model's may be."""
    pytest.importorskip("triton")
    rank, features = 1, symmetric.MAX_FEATURES
    memory, buffers = symmetric_buffers(world, features * MAX_ROWS)
    counts = torch.zeros(features // 8, dtype=torch.int64)
    monkeypatch.setattr(symmetric, "symmetric_buffers", lambda device: (None, (buffers, counts)))
    sent = [0, 0]  # so far, of the first 40 features and of the others
    cases = ((1, 104, 2, 0), (3, 104, 4, 0), (1, 40, 2, 0), (2, 104, 2, 2), (1, 104, 2, 3), (2, 96, 4, 5))
    for (rows, N, R, programs), gather in itertools.product(cases, (False, True)):
        how = tuning.Configuration(8 * R, 1, 2, 128, programs, share=N % 16 == 0)
        monkeypatch.setattr(tuning, "configuration", lambda *_, how=how: how)
        monkeypatch.setattr(tuning, "processors", lambda device: 1)
        sent[0] += 1
        sent[1] += N > 40
        number = torch.where(torch.arange(N) < 40, *sent)
        x, residual = torch.randn(rows, 288).half(), torch.randn(rows, N).half()
        tensors = {"weight": torch.randn(N, 288) * 0.1}
        if kind == "plain":
            tensors = {"weight": tensors["weight"].half()}
        else:
            tensors = quantize_linear(kind, tensors, "w")
        weight = packing.dequantize(tensors["weight"], tensors.get("scales"), tensors.get("zeros"), torch.float32)[
            :, :288
        ]
        if kind.startswith("int4"):
            tensors["weight"], tensors["scales"] = packing.pack_int4(*tensors.values())
        theirs = torch.randn(world, rows, N)
        for other in range(world):
            words = theirs[other].view(torch.int32).long() << 32 | number
            if other != rank:
                place = memory[rank].view(2, world, MAX_ROWS, features)[:, other, :rows, :N]
                place.scatter_(0, (number % 2).expand(1, rows, N), words[None])
        here = {"rank": rank, "world": world, "gather": gather, "residual": None if gather else residual}
        out = linear_triton.linear(x, tensors["weight"], tensors.get("scales"), **here)
        theirs[rank] = x.float() @ weight.t()
        expected = torch.cat(list(theirs), -1) if gather else residual.float() + theirs.sum(0)
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=5e-2)
        for buffer in memory:  # everyone got this rank's products
            place = buffer.view(2, world, MAX_ROWS, features)[:, rank, :rows, :N]
            got = place.gather(0, (number % 2).expand(1, rows, N))[0]
            assert torch.equal(got & 0xFFFFFFFF, number.expand(rows, N))
            torch.testing.assert_close((got >> 32).int().view(torch.float32), theirs[rank], rtol=2e-2, atol=5e-2)


@pytest.mark.skipif(CUDA, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("world,n", [(2, 5000), (3, 8192), (4, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exchange_kernel(world, n, dtype):
    """Rank 1's kernel, with what the other ranks write put into its inbox beforehand."""
    pytest.importorskip("triton")
    rank, blocks = 1, -(-n // exchange.BLOCK)
    inboxes = [torch.zeros(exchange.inbox_bytes(world), dtype=torch.uint8) for _ in range(world)]
    buffers = torch.tensor([inbox.data_ptr() for inbox in inboxes])
    counts, flags = torch.zeros(exchange.BLOCKS, dtype=torch.int32), 2 * world * exchange.PLACE
    places = [inbox[:flags].view(dtype).view(2, world, -1) for inbox in inboxes]
    numbers = [inbox[flags:].view(torch.int32).view(2, world, -1) for inbox in inboxes]
    for number in (1, 2, 3):  # the two places take turns
        x, out = torch.randn(world, n).to(dtype), torch.full((n,), torch.nan, dtype=dtype)
        for other in set(range(world)) - {rank}:
            places[rank][number % 2, other, :n] = x[other]
            numbers[rank][number % 2, other, :blocks] = number
        residual = None if number == 2 else torch.randn(n).to(dtype)
        exchange.sum_triton(out, x[rank], residual, buffers, counts, rank, world)
        expected = torch.zeros(n)
        for part in (*x, *(() if residual is None else (residual,))):
            expected += part
        assert torch.equal(out, expected.to(dtype))
        for other in set(range(world)) - {rank}:
            assert torch.equal(places[other][number % 2, rank, :n], x[rank])
            assert (numbers[other][number % 2, rank, :blocks] == number).all()
            assert not places[other][:, other].any()
    assert (counts[:blocks] == 3).all() and not counts[blocks:].any()


# --- in several processes ---------------------------------------------------------------------------------------------


def start(*command):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(*args, ranks):
    return start("-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *args)


def finish(process, timeout=120):
    """Status, stdout and stderr; a process that hangs fails the test and leaves nothing behind."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, err = process.communicate()
        pytest.fail(f"hangs after {timeout} s:\n{out}\n{err}")
    return process.returncode, out, err


@pytest.mark.parametrize("world", SHAPES)
def test_ranks_compute_what_one_process_computes(world, tmp_path):
    status, out, err = finish(start(__file__, tmp_path, world))
    assert status == 0, err
    assert out == "all equal\n"


def _launch(directory: Path, world: int) -> None:
    """torchrun's part, by forking: the ranks need not import PyTorch each for itself."""
    os.environ.update(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    ranks = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
            _rank(directory)
            sys.stdout.flush()
            os._exit(0)
        ranks.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks))


def _rank(directory: Path) -> None:
    """What every rank runs: models of many kinds, sharded and whole, in the same process."""
    torch.set_num_threads(1)
    with session() as tp:
        plain = tiny_config(tp.world)
        cases = [(plain, kind, torch.float32) for kind in (*KINDS, *CONVERTED, "int4-gptq")]
        cases += [(plain, kind, torch.bfloat16) for kind in ("plain", "int8", "int4:32")]
        cases += [
            (tiny_config(tp.world, **more), "plain", torch.float32)
            for more in ({"qkv_bias": True}, {"tied": True}, {"qk_norm": True, "o_bias": True, "mlp_bias": True})
        ]
        cases += [(tiny_config(tp.world, **more), "plain", torch.float32) for more in FAMILIES]
        mixture = tiny_config(tp.world, n_expert=5, n_expert_used=2, expert_size=96, shared_size=160)
        cases += [(mixture, kind, torch.float32) for kind in ("plain", "int8", "int4:128")]
        gpt_oss = {"n_expert": 3, "n_expert_used": 2, "expert_size": 64, "norm_topk": True, "router_bias": True}
        gpt_oss |= {"glu_limit": 1.0, "glu_alpha": 1.7, "mlp_bias": True, "sinks": True}
        cases.append((tiny_config(tp.world, **gpt_oss), "plain", torch.float32))
        for i, (config, kind, dtype) in enumerate(cases):
            path = directory / f"{i}.pth"
            if tp.rank == 0:
                write_model(path, config, kind)
            tp.share(0)  # the file is there
            _compare(path, config, dtype, None, tp)
        _compare(directory / "0.pth", plain, torch.float32, "int4:64", tp)  # quantised on the way
        _same_tokens(directory / "0.pth", plain, tp)
        _same_sums(tp)
        print("all equal")


def never(row, token):
    return False


def place(tp):
    """A GPU a rank, where there are enough."""
    return f"cuda:{tp.rank}" if torch.cuda.device_count() >= tp.world else "cpu"


def _compare(path, config, dtype, quantize, tp):
    device = place(tp)
    options = {"config": config, "dtype": dtype, "quantize": quantize, "device": device}
    whole, part = load_model(path, **options), load_model(path, tp=tp, **options)
    tokens = torch.randint(0, 259, (3, 9), generator=torch.Generator().manual_seed(1)).to(device)
    at = torch.tensor([0, 0, 0], device=device)
    logits, cache_kind = [], "int8" if quantize else None
    for model in (whole, part):
        cache = model.cache(3, 16, cache_kind)
        with torch.inference_mode():
            first = model(tokens, at, cache, all_logits=True)
            logits.append(torch.cat((first, model(tokens[:, :1], at + 9, cache)), 1))
    bound = 1e-4 if dtype is torch.float32 else 0.06
    if quantize and tp.world == 2:  # once is enough
        with torch.inference_mode():
            traced = torch.compile(part, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(traced(tokens[:, :1], at + 9, cache), logits[1][:, 9:])
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert logits[0].shape == logits[1].shape == (3, 10, 259), logits[1].shape
    assert error < bound, f"{path.name} {config} {dtype} {quantize}: {error}"


def _same_tokens(path, config, tp):
    """Greedy, sampled and speculative text equal one process's, and so all ranks'."""
    prompts = [[5, 6, 7], [8], [9, 10]]
    for sampler in (Sampler(temperature=0), Sampler(temperature=0.8, top_k=20), Sampler(temperature=1, top_p=0.9)):
        texts = []
        for ranks in (None, tp):
            model = load_model(path, config=config, dtype=torch.float32, device=place(tp), tp=ranks)
            llm = Engine(model, batch_size=3, max_seq_length=40, sampler=sampler)
            llm.seed(3)
            texts.append(list(generate(llm, prompts, 20, is_stop=never)))
        if sampler.temperature == 0:  # draft tokens must not change greedy text
            options = {"config": config, "dtype": torch.float32, "device": place(tp)}
            whole = load_model(path, quantize="int8", **options)  # each rank runs all of this draft
            for draft in (model, whole, "prompt_lookup"):
                llm = Engine(model, batch_size=3, max_seq_length=40, sampler=sampler, draft=draft, speculate_k=3)
                assert texts[0] == list(generate(llm, prompts, 20, is_stop=never)), draft
            llm = Engine(model, batch_size=2, max_seq_length=40, sampler=sampler, draft=model, speculate_k=3)
            queue = [*prompts, [11, 12], [13]]  # answered on two rows as they become free
            answers = [[] for _ in queue]
            for index, token, _ in serve(llm, queue, 20, is_stop=never):
                answers[index].append(token)
            assert answers[:3] == [list(text) for text in zip(*texts[0])], answers
        assert texts[0] == texts[1], f"rank {tp.rank}, {sampler}: {texts}"
    if place(tp) != "cpu":  # the kernels' path, in a CUDA graph and not
        model = load_model(path, config=config, device=place(tp), tp=tp)
        texts = []
        for compiled in (False, True):
            llm = Engine(model, batch_size=3, max_seq_length=40, compile=compiled)
            llm.seed(3)
            texts.append(list(generate(llm, prompts, 30, is_stop=never)))
        assert texts[0] == texts[1], f"rank {tp.rank}: {texts}"
    every = [None] * tp.world
    torch.distributed.all_gather_object(every, texts)
    assert all(texts == other for other in every)


def _same_sums(tp):
    """On both sides of what limits the ways to sum, and in several messages; places take turns."""
    generator = torch.Generator().manual_seed(1)
    for n, residual in ((1000, True), (2**18, True), (2**18 + 8, False), (2**18 + 8, True), (2**23 + 8, True)):
        parts = torch.randn(tp.world + residual, n, generator=generator).bfloat16()
        x, *more = parts[[tp.rank, *range(tp.world, len(parts))]].to(place(tp))
        found = symmetric.all_reduce(x, False, tp.rank, tp.world, *more)
        torch.testing.assert_close(found.cpu(), parts.float().sum(0).bfloat16())


def write_tiny_checkpoint(directory):
    """A directory that generate.py takes: 4 query and 2 key/value heads."""
    from tiny import write_checkpoint  # needs transformers, which torchrun's ranks need not

    write_checkpoint(directory)
    return directory / "model.pth"


def generate_py(path, *args):
    return [REPO / "generate.py", "--checkpoint_path", path, "--device", "cpu", "--precision", "fp32", *args]


def test_two_machines_then_one_with_a_damaged_file(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "one")
    args = ["--prompt", "abc", "--max_new_tokens", "12", "--temperature", "0"]
    llm = load(path, device="cpu", precision="fp32", sampler=Sampler(temperature=0))
    prompt = llm.tokenizer.encode("abc")
    expected = llm.tokenizer.decode(prompt + list(generate(llm, prompt, 12))) + "\n"

    def nodes(paths):
        """Two agents, as on two machines: the same command but for the checkpoint's place."""
        where = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
        where.append("--local_addr=127.0.0.1")
        running = [torchrun(*where, *generate_py(p, *args), ranks=1) for p in paths]
        return [finish(process) for process in running]

    results = nodes([path, path])
    assert [status for status, _, _ in results] == [0, 0], results
    assert sorted(out for _, out, _ in results) == ["", expected]  # one of them holds rank 0

    damaged = tmp_path / "two" / "model.pth"
    write_tiny_checkpoint(damaged.parent)
    damaged.write_bytes(path.read_bytes()[:5000])
    begin = time.monotonic()
    results = nodes([path, damaged])
    assert time.monotonic() - begin < 60
    assert all(status != 0 for status, _, _ in results)
    assert f"error: {damaged} is truncated or not a file of weights" in results[1][2]
    assert "error:" in results[0][2], results[0][2]


def test_wrong_world_size(tmp_path):
    path = write_tiny_checkpoint(tmp_path)
    status, out, err = finish(torchrun("--standalone", *generate_py(path), ranks=3))
    assert status != 0
    assert out == ""
    assert err.count("world size 3 does not divide 4 query and 2 key/value heads; world sizes that work: 1, 2, 4") == 1


def test_help_is_printed_once_and_all_ranks_leave():
    status, out, _ = finish(torchrun("--standalone", REPO / "generate.py", "--help", ranks=2))
    assert (status, out.count("usage:")) == (0, 1)


def ranks_of(process):
    """Process ids of torchrun's children."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's children in /proc")
@pytest.mark.parametrize("how", ["killed rank", "Ctrl-C"])
def test_all_ranks_end_together(how, tmp_path):
    path = write_tiny_checkpoint(tmp_path)
    endless = ["--max_new_tokens", "250", "--num_samples", "100000", "--stream"]
    process = torchrun("--standalone", *generate_py(path, *endless), ranks=2)
    assert process.stdout.readline()  # they are generating
    ranks = ranks_of(process)
    assert len(ranks) == 2
    begin = time.monotonic()
    if how == "killed rank":
        os.kill(ranks[1], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGINT)
    status, _, err = finish(process, 30)
    assert time.monotonic() - begin < 30
    assert status != 0
    words = {"killed rank": r"rank +: 1 [^=]*SIGKILL", "Ctrl-C": "interrupted"}  # torchrun's, and our own
    assert re.search(words[how], err), err
    assert how == "Ctrl-C" or re.search("error: .*another rank has stopped", err), err  # says the rank that was left
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.parametrize("more", [[], ["--kv_cache", "int8"]])
def test_what_bench_tp_starts_measures(more, monkeypatch, capsys):
    """One rank's part of scripts/bench_tp.py, on a CPU."""
    monkeypatch.syspath_prepend(REPO / "scripts")
    import bench_tp

    monkeypatch.setattr(bench_tp, "pick_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a CPU")
    shape = ["--models", "stories15M", "--modes", "int8", "--prompt_length", "5", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_tp.py", "x.json", "--rank", *shape, "--runs", "1", *more])
    bench_tp.main()
    about, row = map(json.loads, capsys.readouterr().out.splitlines())
    assert about["device"] == "a CPU"
    assert (row["mode"], row["prompt_length"], row["kv_cache"]) == ("int8", 5, "int8" if more else None)
    assert row["step_ms"] > 0


def test_smollm2_on_three_ranks(smollm2_dir):
    """9 query and 3 key/value heads."""
    case = json.loads((REPO / "tests/data/smollm2_135m_instruct.json").read_text())["prompts"][0]
    args = ["--prompt", case["prompt"], "--max_new_tokens", "30", "--temperature", "0"]
    status, out, err = finish(torchrun("--standalone", *generate_py(smollm2_dir / "model.pth", *args), ranks=3))
    assert status == 0, err
    assert out.strip() == (case["prompt"] + case["text"]).removesuffix("<|im_end|>")


if __name__ == "__main__":
    _launch(Path(sys.argv[1]), int(sys.argv[2]))
