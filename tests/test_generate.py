"""The runtime: greedy text equals transformers', sampling follows its distribution, stopping, batches, streaming,
compilation counts, and the real model's golden tokens."""

import json
import os
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace

import pytest
import torch
from chance import chi_square, filtered
from conftest import REPO, SMOLLM2, smollm2_parts
from tiny import never, write_checkpoint

import engine
import ops
import state
from cli import peak_memory
from engine import Engine
from errors import UserError
from generate import LLM, answer, generate, load, read_prompts
from measure import report
from sampling import Sampler
from tokenizer import Tokenizer, load_tokenizer

GREEDY = Sampler(temperature=0.0)
ORACLE = json.loads((REPO / "tests/data/smollm2_135m_instruct.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    return directory, write_checkpoint(directory)


def tiny_engine(tiny, **options):
    return load(tiny[0] / "model.pth", device="cpu", **{"precision": "fp32", "sampler": GREEDY, **options})


def reference_greedy(model, prompt, n):
    ids = torch.tensor([prompt])
    for _ in range(n):
        ids = torch.cat((ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)), 1)
    return ids[0, len(prompt) :].tolist()


def test_a_missing_checkpoint_is_named(tiny):
    with pytest.raises(UserError, match="does not exist"):
        load(tiny[0] / "missing.pth", device="cpu", compile=True)


def test_greedy_equals_transformers(tiny):
    prompt = list(range(10, 30))
    expected = reference_greedy(tiny[1], prompt, 30)
    assert list(generate(tiny_engine(tiny), prompt, 30, is_stop=never)) == expected


@pytest.mark.parametrize("rows", [1, 2])
def test_a_prompt_whose_like_was_read_before_is_captured_in_steps(tiny, rows, monkeypatch):
    """Padded to a multiple of STEP, but not beyond the cache, up to AGAIN tokens of all rows."""
    monkeypatch.setattr(engine, "AGAIN", 20 * rows)
    sizes = []

    def capture(function, tokens, **options):
        sizes.append(tokens.shape[1])
        return function

    monkeypatch.setattr("ops.graph.capture", capture)
    plain, llm = (tiny_engine(tiny, batch_size=rows, max_seq_length=22) for _ in range(2))
    llm._captured, llm._again = {2: lambda start: llm._known(2, start)}, ops.Repeated(llm._whole, 8, 22, None)
    for length, captured in ((2, []), (7, []), (8, [8]), (8, [8]), (9, [8]), (16, [8, 16]), (17, [8, 16])):
        prompts = [list(range(5 + row, 5 + row + length)) for row in range(rows)]
        assert list(generate(llm, prompts, 4, is_stop=never)) == list(generate(plain, prompts, 4, is_stop=never))
        assert sizes == captured
    monkeypatch.setattr("ops.graph.has_room", lambda device: length > 18)
    for length, captured in ((18, 2), (18, 2), (19, 3), (20, 3), (21, 3), (21, 3)):
        prompts = [list(range(40 + row, 40 + row + length)) for row in range(rows)]
        assert list(generate(llm, prompts, 1, is_stop=never)) == list(generate(plain, prompts, 1, is_stop=never))
        assert len(sizes) == captured
    assert sizes[2:] == [22]


@pytest.mark.parametrize("rows", [1, 2])
def test_captured_prompts_draw_what_others_do(tiny, rows, monkeypatch):
    """The draw of a first token is captured, too, the reader's without a number from those to come. A captured size
    that would go beyond the history, of 87 tokens here, is not used."""
    used = []

    def capture(function, *inputs, warm_up=2, pool=None):
        for _ in range(warm_up):
            function(*inputs)

        def replay(*values):
            used.append(getattr(function, "args", "draw"))
            return function(*(fixed.copy_(value) for fixed, value in zip(inputs, values)))

        return replay

    monkeypatch.setattr(ops, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    options = {"batch_size": rows, "max_seq_length": 70, "sampler": Sampler(temperature=1.0, top_k=None)}
    plain, llm = (tiny_engine(tiny, **options) for _ in range(2))
    with torch.inference_mode():
        llm._capture_prefill()
    llm.seed(0)
    # From start on 35 tokens are read of 45, 57 and 58, where 64 end at 74, 86 and 87 or, with one more, beyond.
    for length, start, size in ((1, 0, 8 // rows), (9, 0, 16), (33, 0, 64), (45, 10, 64), (58, 23, 64), (59, 24, None)):
        prompts = [list(range(5, 5 + length)), list(range(5, 6 + start))][:rows]
        expected = list(generate(plain, prompts, 8, is_stop=never, start=start))
        used.clear()
        assert list(generate(llm, prompts, 8, is_stop=never, start=start)) == expected
        assert used == [(size,), "draw"][size is None :]
    for own in (plain, llm):
        own.fill(0, [7, 8, 9])
    assert torch.equal(llm.state.rng, plain.state.rng)
    assert torch.equal(llm.state.history[0, :4], plain.state.history[0, :4])


def test_ragged_batch_equals_single_rows(tiny, monkeypatch):
    monkeypatch.setattr(state.feed, "__defaults__", (0, 8))
    prompts = [list(range(5, 30)), [7, 8, 9], list(range(40, 52))]
    llm = tiny_engine(tiny, batch_size=3, max_seq_length=60)
    rows = list(zip(*generate(llm, prompts, 20, is_stop=never)))
    for row, prompt in zip(rows, prompts):
        assert list(row) == reference_greedy(tiny[1], prompt, 20)


def test_rows_stop_each_on_their_own(tiny):
    prompts = [[11, 12], [13, 14]]
    llm = tiny_engine(tiny, batch_size=2)
    free = list(generate(llm, prompts, 12, is_stop=never))
    stop = free[4][0]
    first = next(i for i, step in enumerate(free) if step[0] == stop)
    steps = list(generate(llm, prompts, 12, is_stop=lambda row, token: row == 0 and token == stop))
    assert [s[0] for s in steps[: first + 1]] == [s[0] for s in free[: first + 1]]
    assert all(s[0] is None for s in steps[first + 1 :])
    assert [s[1] for s in steps] == [s[1] for s in free]


def test_default_stop_ids_end_generation(tiny):
    llm = tiny_engine(tiny)
    tokens = list(generate(llm, [20, 21, 22], 200, is_stop=never))
    llm.stop_ids = frozenset({tokens[6]})
    assert list(generate(llm, [20, 21, 22], 200)) == tokens[: tokens.index(tokens[6]) + 1]


def test_the_first_token_comes_before_the_first_step(tiny):
    llm, steps = tiny_engine(tiny), []
    eager = llm._step
    llm._step = lambda: (steps.append(1), eager())
    tokens = generate(llm, [20, 21, 22], 3, is_stop=never)
    for taken in range(3):
        next(tokens)
        assert len(steps) == taken
    assert list(generate(llm, [20, 21, 22], 0)) == [] and len(steps) == 2


def test_measures_are_of_the_run_and_not_of_the_measuring(tiny, monkeypatch):
    order = []
    monkeypatch.setattr("measure.peak_memory", lambda: order.append("memory") or 1)
    monkeypatch.setattr("ops.read_bandwidth", lambda device: order.append("bandwidth") or 1e9)
    llm = tiny_engine(tiny)
    _, measure = answer(llm, [[30, 31, 32]], 20)
    plain = report(llm, measure)
    assert order == ["memory", "bandwidth"] and plain["memory_bytes"] == 1
    positions = 3 + (measure.steps + 1) / 2
    assert plain["kv_bytes_per_step"] == round(positions * llm.state.cache.bytes_per_position)
    llm.model.config = replace(llm.model.config, windows=(2,) + (0,) * (llm.model.config.n_layer - 1))
    saved = (positions - 2) * llm.state.cache.bytes_per_position / llm.model.config.n_layer
    assert report(llm, measure)["kv_bytes_per_step"] == round(positions * llm.state.cache.bytes_per_position - saved)


def test_generation_ends_when_the_cache_is_full(tiny):
    llm = tiny_engine(tiny, max_seq_length=16)
    tokens = list(generate(llm, list(range(10, 20)), 100, is_stop=never))
    assert tokens == reference_greedy(tiny[1], list(range(10, 20)), 7)  # positions 10..15 are fed, one more is sampled


def test_later_turns_reuse_the_cache(tiny):
    llm = tiny_engine(tiny)
    prompt = list(range(10, 40))
    turn = list(generate(llm, prompt, 10, is_stop=never))
    longer = [*prompt, *turn, 50, 51, 52]
    again = list(generate(llm, longer, 10, is_stop=never, start=len(prompt) + 9))  # all but the last token was fed
    assert again == reference_greedy(tiny[1], longer, 10)


def test_stopping_early_leaves_a_usable_engine(tiny):
    llm = tiny_engine(tiny)
    for token in generate(llm, [5, 6, 7], 50, is_stop=never):
        assert token >= 0
        break
    assert list(generate(llm, [8, 9], 5, is_stop=never)) == reference_greedy(tiny[1], [8, 9], 5)


def test_compiled_equals_eager_and_never_recompiles(tiny, monkeypatch):
    monkeypatch.setattr(ops, "has_kernels", lambda model: False)  # what a CPU's own step does not serve
    torch._dynamo.reset()
    eager = tiny_engine(tiny, max_seq_length=64)
    llm = tiny_engine(tiny, max_seq_length=64, compile=True)
    assert llm.compile_seconds > 0
    torch._dynamo.utils.counters.clear()
    for length in (1, 2, 3, 7, 16, 31, 50):
        prompt = torch.randint(3, 259, (length,)).tolist()
        assert list(generate(llm, prompt, 9, is_stop=never)) == list(generate(eager, prompt, 9, is_stop=never))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize(("batch_size", "precision"), [(1, "fp32"), (3, "fp32"), (3, "bf16")])
def test_prompts_of_all_kinds_of_lengths_are_read_without_compiling_again(tiny, batch_size, precision):
    """Beside the numbers of rows beyond which ops take another path, of one sequence and of all of them; beside the
    sizes of the model and the cache, which a graph must not take for its own; and where vectors end."""
    torch._dynamo.reset()
    options = {"max_seq_length": 150, "batch_size": batch_size, "precision": precision}
    eager, llm = tiny_engine(tiny, **options), tiny_engine(tiny, **options, compile=True, compile_prefill=True)
    limits = ops.row_limits(llm.device, torch.float32)
    assert all(limit < 148 for limit in limits)
    sizes = [n for limit in limits for n in (limit, limit // batch_size)] + [1, 8, 16, 32, 48, 64, 96, 128, 148]
    torch._dynamo.utils.counters.clear()
    for length in sorted({n + more for n in sizes for more in (-1, 0, 1)} - {0}):
        prompts = torch.randint(3, 259, (batch_size, length)).tolist()
        found, expected = (list(generate(one, prompts, 2, is_stop=never)) for one in (llm, eager))
        assert found == expected or precision == "bf16"  # where rounding may part them
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_steps_are_taken_in_blocks_where_they_are_whole(tiny):
    llm, blocks = tiny_engine(tiny, max_seq_length=32), []
    llm.block = 4
    llm._block = lambda: blocks.append([llm._step() for _ in range(4)])
    for tokens, whole in ((1, 0), (4, 0), (5, 1), (12, 2), (100, 7)):  # one comes from prefill; the cache holds 32
        blocks.clear()
        expected = list(generate(tiny_engine(tiny, max_seq_length=32), [5, 6, 7], tokens, is_stop=never))
        assert list(generate(llm, [5, 6, 7], tokens, is_stop=never)) == expected
        assert len(expected) == min(tokens, 30) and len(blocks) == whole


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 8, 9, 30])
def test_cuda_graphs_equal_eager_steps(tiny, tokens):
    options = {"device": "cuda", "precision": "bf16", "max_seq_length": 128, "sampler": Sampler(0.8, 20)}
    eager, compiled = (load(tiny[0] / "model.pth", compile=True, **options) for _ in range(2))
    eager._step, eager._block = eager._eager_step, None
    for prompt in ([5], [5, 6, 7, 8]):
        for llm in (eager, compiled):
            llm.seed(1)
        got, expected = (list(generate(llm, prompt, tokens, is_stop=never)) for llm in (compiled, eager))
        assert got == expected


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4:32"])
def test_compiled_equals_eager_for_quantised_weights(tiny, kind, monkeypatch):
    monkeypatch.setattr(ops, "has_kernels", lambda model: False)
    options = {"device": "cpu", "sampler": GREEDY, "max_seq_length": 48, "quantize": kind}
    eager, compiled = (load(tiny[0] / "model.pth", **options, compile=compile) for compile in (False, True))
    for llm in (eager, compiled):
        llm.prefill([[9, 8, 7]])
    for _ in range(9):
        eager._step()
        compiled.state.history.copy_(eager.state.history)  # equal but for rounding: keep to the same text
        compiled._step()
        for a, b in zip(eager.state.cache.tensors, compiled.state.cache.tensors):
            assert (a - b).float().norm() < 0.03 * b.float().norm()


def test_models_of_different_shapes_compile_in_one_process(tiny, tmp_path):
    write_checkpoint(tmp_path, hidden_size=96, intermediate_size=64)
    for path in (tiny[0], tmp_path):
        options = {"device": "cpu", "precision": "fp32", "sampler": GREEDY, "max_seq_length": 48}
        eager, compiled = (load(path / "model.pth", **options, compile=compile) for compile in (False, True))
        assert list(generate(compiled, [9, 8, 7], 9, is_stop=never)) == list(
            generate(eager, [9, 8, 7], 9, is_stop=never)
        )


def test_seed_repeats_a_run(tiny):
    llm = tiny_engine(tiny, sampler=Sampler(temperature=1.5, top_k=None))
    runs = []
    for seed in (1, 1, 2):
        llm.seed(seed)
        runs.append(list(generate(llm, [5, 6], 30, is_stop=never)))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": None},
        {"top_k": 5},
        {"top_k": None, "top_p": 0.7},
        {"top_k": 8, "top_p": 0.8},
        {"top_k": None, "min_p": 0.1},
        {"top_k": 10, "top_p": 0.9, "min_p": 0.2, "temperature": 1.7},
    ],
)
def test_sampling_follows_the_distribution(options):
    sampler = Sampler(**{"temperature": 0.9, **options})
    logits = torch.randn(40) * 2
    n = 20000
    history, pos = torch.zeros(n, 4, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    drawn = Counter(sampler(logits.expand(n, -1).contiguous(), history, pos, torch.tensor([7, 0])).tolist())
    assert chi_square(drawn, dict(enumerate(filtered(logits, sampler).tolist()))) < 5


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -1.0, 1.9, 0.5]])
    history = torch.tensor([[0, 1, 2, 2]])  # position 2 and later are not known yet
    sampler, rng = Sampler(temperature=0.0, repetition_penalty=2.0), torch.zeros(2, dtype=torch.int64)
    assert sampler(logits, history, torch.tensor([1]), rng).item() == 2
    assert sampler(logits, history, torch.tensor([2]), rng).item() == 0
    both = torch.tensor([[-0.5, -0.1, -3.0, -0.3]])
    assert sampler(both, history, torch.tensor([1]), rng).item() == 1  # -0.1 becomes -0.2: negative ones fall, too


def test_a_temperature_that_no_logits_can_be_divided_by_is_greedy():
    logits, rng = torch.tensor([[1.0, 3.0, 2.0]]), torch.zeros(2, dtype=torch.int64)
    assert Sampler(temperature=1e-39).draw(logits, rng).item() == 1


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": -2}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 2}])
def test_sampler_refuses_nonsense(options):
    with pytest.raises(UserError, match=f"{next(iter(options))} is .*; accepted"):
        Sampler(**options)


def test_bad_prompts(tiny):
    llm = tiny_engine(tiny, max_seq_length=8)
    for prompt, words in (
        ([], "empty"),
        ([9999], "token id 9999"),
        (list(range(9)), "holds 8"),
        ([[1], [2]], "batch_size"),
    ):
        with pytest.raises(UserError, match=words):
            list(generate(llm, prompt, 4))


def test_answers_stop_at_strings_and_stream_whole_characters(tiny):
    llm = tiny_engine(tiny)
    (whole,), _ = answer(llm, [[30, 31, 32]], 40)
    pieces = []
    (streamed,), measure = answer(llm, [[30, 31, 32]], 40, emit=pieces.append)
    assert "".join(pieces) == streamed.text == whole.text
    assert measure.new_tokens == len(streamed.tokens) == measure.steps + 1
    stop = whole.text[5:8]
    (cut,), _ = answer(llm, [[30, 31, 32]], 40, stop_strings=(stop,))
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_peak_memory_is_in_bytes_on_linux_and_macos(monkeypatch):
    linux = peak_memory()
    assert linux > 50e6  # PyTorch alone takes more
    monkeypatch.setattr(sys, "platform", "darwin")
    assert 1024 * peak_memory() == pytest.approx(linux, rel=0.2)  # where the system counts bytes, not kilobytes


def test_engine_without_a_tokenizer(tiny):
    llm = Engine(tiny_engine(tiny).model, sampler=GREEDY, max_seq_length=32)
    assert list(generate(llm, [5, 6], 4)) == reference_greedy(tiny[1], [5, 6], 4)


# --- what the command line says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--interactive", "--prompt_file", "x"], "--prompt_file does nothing beside --interactive; give one of them"),
        (["--interactive", "--prompt", "Hi"], "--prompt does nothing beside --interactive"),
        (["--interactive", "--batch_size", "2"], "--batch_size does nothing beside --interactive"),
        (["--interactive", "--num_samples", "2"], "--num_samples does nothing beside --interactive"),
        (["--interactive", "--json"], "--json does nothing beside --interactive"),
        (["--interactive", "--profile", "x"], "--profile does nothing beside --interactive"),
        (["--prompt_file", "x", "--num_samples", "2"], "--num_samples does nothing beside --prompt_file"),
        (["--prompt_file", "x", "--prompt", "Hi"], "--prompt does nothing beside --prompt_file"),
        (["--chat", "--prompt", "7"], "--chat needs a text; --prompt 7 is a number of tokens"),
        (["--speculate_k", "2"], "--speculate_k needs --draft_checkpoint_path or --speculate"),
        (["--top_k", "-1"], "top_k is -1; accepted: 1 to 2147483647, or 0 for all"),
        *((["--temperature", bad], f"temperature is {bad}; accepted: 0 to 100") for bad in ("nan", "inf")),
        *(([f"--{flag}", "nan"], f"{flag} is nan; accepted") for flag in ("top_p", "min_p", "repetition_penalty")),
        (["--seed", str(-(2**64)), "--prompt", "3"], "the seed is -18446744073709551616; accepted: 64-bit"),
        (["--prompt", "9" * 5000], "--prompt a huge integer exceeds the model's context of 256"),
        (["--prompt", "1", "--batch_size", "999999999"], "999999999 rows of 201 tokens need .* GB of memory"),
        (["--max_seq_length", "9" * 30], "--max_seq_length 9+ exceeds the model's context of 256"),
        (["--prompt_file", "/dev/zero"], "--prompt_file /dev/zero is not a regular file"),
        (["--prompt_file", "/tmp"], "--prompt_file /tmp is not a regular file"),
        (["--prompt_file", "a\0b"], "cannot read --prompt_file"),
    ],
)
def test_flags_that_cannot_be(tiny, refuses, flags, words):
    refuses("generate.py", "--checkpoint_path", tiny[0] / "model.pth", "--device", "cpu", *flags, words=words)


@pytest.fixture
def prompts_of(tiny, tmp_path):
    """The texts that read_prompts finds in a file of these bytes."""
    tokenizer = load_tokenizer(tiny[0])

    def read(data: bytes | None) -> list[str]:
        if data is not None:
            (tmp_path / "prompts.txt").write_bytes(data)
        args = Namespace(prompt="", prompt_file=tmp_path / "prompts.txt", chat=False)
        return [tokenizer.decode(ids) for ids in read_prompts(args, tokenizer, None)]

    return read


def test_prompts_end_at_line_ends_alone(prompts_of):
    text = "\ufeffone\x0b\x0c1\r\ntwo\x1c\x1d\x1e\x852\rthree\u2028\u20293\n\n \t\n four \ufeff"
    expected = ["one\x0b\x0c1", "two\x1c\x1d\x1e\x852", "three\u2028\u20293", " four \ufeff"]
    assert prompts_of(text.encode()) == expected


def test_files_that_hold_no_prompts(prompts_of, tmp_path):
    for data, words in (
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\n \r\n", "holds no prompts; one a line"),
        (b"a\xff", "cannot read --prompt_file .*prompts.txt as UTF-8 text"),
        ("a".encode("utf-16"), "as UTF-8 text"),
    ):
        with pytest.raises(UserError, match=words):
            prompts_of(data)
    with (tmp_path / "prompts.txt").open("wb") as file:
        file.truncate(2**40)  # a hole, for which there is no room in memory
    with pytest.raises(UserError, match="has 1099511627776 bytes; texts of up to"):
        prompts_of(None)
    (tmp_path / "prompts.txt").unlink()
    os.mkfifo(tmp_path / "prompts.txt")
    with pytest.raises(UserError, match="is not a regular file"):
        prompts_of(None)


def test_copies_of_a_prompt_are_tokenized_once(tiny, monkeypatch, refuses):
    calls, encode = [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda *args, **options: calls.append(1) or encode(*args, **options))
    monkeypatch.setattr("ops.free_memory", lambda: 1e6)
    args = ("--checkpoint_path", tiny[0] / "model.pth", "--device", "cpu", "--batch_size", 1_000_000)
    refuses("generate.py", *args, words="1000000 rows of 217 tokens need 55.6 GB of memory .* 0.0 GB are free")
    assert len(calls) == 1


def test_compilation_without_a_compiler_is_a_user_error(tiny):
    torch._dynamo.reset()
    patch = torch._inductor.config.patch({"cpp.cxx": (None, "ccache absent"), "force_disable_caches": True})
    with patch, pytest.raises(UserError, match=r"no working C\+\+ compiler.*run without --compile") as error:
        tiny_engine(tiny, compile_prefill=True, precision="fp16")  # for which no kernels of ours serve
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rows", "-1"], "'-1' is not a positive integer"),
        (["--rows", "104"], "--rows 104 exceeds 103, half of"),
        (["--prompt_length", "100000"], "100200 tokens .* exceed 7B's 4096"),
        (["--max_new_tokens", "1"], "--max_new_tokens is 1; at least 2"),
        (["--runs", "0"], "'0' is not a positive integer"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top_k", "-1"], "top_k is -1"),
        (
            ["--checkpoint_path", "/absent/model.pth", "--models", "7B"],
            "--models does nothing beside --checkpoint_path",
        ),
    ],
)
def test_flags_of_the_benchmark(refuses, flags, words):
    refuses("scripts/bench.py", *flags, words=words)


# --- the real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(request):
    """On a device, with a row for each golden prompt."""
    options = {"sampler": GREEDY, "max_seq_length": 256, "batch_size": len(ORACLE["prompts"])}
    if request.param == "cpu":
        return LLM(*smollm2_parts("fp32"), **options)
    return load(SMOLLM2 / "model.pth", device=request.param, precision="fp32", **options)


on_devices = pytest.mark.parametrize("smollm2", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)


@on_devices
def test_golden_tokens(smollm2):
    cases, tokenizer = ORACLE["prompts"], smollm2.tokenizer
    assert [tokenizer.encode(case["prompt"]) for case in cases] == [case["prompt_ids"] for case in cases]
    assert [tokenizer.decode(case["greedy_ids"]) for case in cases] == [case["text"] for case in cases]
    done = [0] * len(cases)
    while left := max(len(case["greedy_ids"]) - n for case, n in zip(cases, done)):
        prompts = [case["prompt_ids"] + case["greedy_ids"][:n] for case, n in zip(cases, done)]
        rows = zip(*generate(smollm2, prompts, left, is_stop=never))
        for i, (case, row) in enumerate(zip(cases, rows)):
            pairs = enumerate(zip(row, case["greedy_ids"][done[i] :]))
            parted = next((done[i] + k for k, (a, b) in pairs if a != b), None)
            # A step whose margin is under 0.02 may differ: go on from the golden token.
            assert parted is None or case["margins"][parted] < 0.02, (i, parted, case["margins"][parted])
            done[i] = len(case["greedy_ids"]) if parted is None else parted + 1


@on_devices
@torch.inference_mode()
def test_golden_nll(smollm2):
    ids = torch.tensor([ORACLE["nll"]["token_ids"]], device=smollm2.device)
    zero = torch.zeros(1, dtype=torch.int64, device=smollm2.device)
    logits = smollm2.model(ids, zero, smollm2.model.cache(1, ids.shape[1]), all_logits=True)
    nll = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert nll == pytest.approx(ORACLE["nll"]["mean_nll"], abs=0.002)


def test_compiled_golden_tokens(smollm2_dir):
    """The command's own path: compiled, fp32, through the first golden prompt."""
    case = ORACLE["prompts"][5]
    llm = LLM(*smollm2_parts("fp32"), sampler=GREEDY, max_seq_length=160, compile=True)
    assert list(generate(llm, case["prompt_ids"], 30, is_stop=never)) == case["greedy_ids"][:30]
