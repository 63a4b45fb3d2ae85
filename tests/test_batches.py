"""Many prompts on a few rows: each gets what it gets alone, whatever its neighbours do."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from tiny import never, write_checkpoint

import engine
import generate as generation
from batches import serve
from checkpoint import load_model
from engine import Engine
from errors import UserError
from generate import generate, load
from process.command import run_cli
from sampling import Sampler

GREEDY = Sampler(temperature=0.0)
LENGTHS = (25, 3, 12, 1, 40, 7, 9)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory)
    return directory / "model.pth"


def engine_of(tiny, rows, **options):
    options = {"precision": "fp32", "sampler": GREEDY, "max_seq_length": 60, **options}
    return load(tiny, device="cpu", batch_size=rows, **options)


def prompts_of(lengths=LENGTHS, prefix=()):
    generator = torch.Generator().manual_seed(4)
    return [[*prefix, *torch.randint(3, 250, (n,), generator=generator).tolist()] for n in lengths]


def answers(llm, prompts, n, **options):
    """What serve yields, by prompt; each ends with the token that is said to be its last."""
    found = [[] for _ in prompts]
    ended = set()
    for index, token, last in serve(llm, prompts, n, **options):
        assert index not in ended
        found[index].append(token)
        if last:
            ended.add(index)
    assert len(ended) == len(prompts)
    return found


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("rows", [2, 9])
def test_a_queue_gets_what_single_prompts_get(tiny, rows, quantize):
    prompts, one = prompts_of(), engine_of(tiny, 1, quantize=quantize)
    expected = [list(generate(one, prompt, 10, is_stop=never)) for prompt in prompts]
    assert answers(engine_of(tiny, rows, quantize=quantize), prompts, 10, is_stop=never) == expected


def test_a_queue_in_bf16(tiny):
    """Up to near ties, where rows that are read apart or together may part."""
    prompts, one = prompts_of(), engine_of(tiny, 1, precision="bf16")
    for prompt, found in zip(prompts, answers(engine_of(tiny, 3, precision="bf16"), prompts, 10, is_stop=never)):
        expected = list(generate(one, prompt, 10, is_stop=never))
        if (same := next((i for i, pair in enumerate(zip(found, expected)) if len({*pair}) > 1), None)) is not None:
            llm = Engine(one.model, sampler=Sampler(temperature=0.0, top_k=None), max_seq_length=60)
            llm.prefill([prompt + expected[:same]])
            x = llm.model(torch.tensor([prompt + expected[:same]]), torch.zeros(1, dtype=torch.int64), llm.state.cache)
            assert (x[0, 0, expected[same]] - x[0, 0, found[same]]).abs() < 0.02 * x.abs().max()


@pytest.mark.parametrize(
    ("draft", "k", "quantize"),
    [
        *itertools.product(("prompt_lookup", "model"), (3, "auto"), (None,)),
        *(("prompt_lookup", 3, kind) for kind in ("int8", "fp8", "int4")),
        ("model", 3, "int4"),
    ],
)
def test_a_queue_speculates(tiny, draft, k, quantize):
    prefix = () if quantize is None else range(60, 70)  # without one, rows that have no prompt wait at the beginning
    prompts, one = prompts_of(prefix=prefix), engine_of(tiny, 1, quantize=quantize)
    expected = [list(generate(one, prompt, 10, is_stop=never)) for prompt in prompts]
    draft = load_model(tiny, dtype=torch.float32, quantize=quantize) if draft == "model" else draft
    llm = engine_of(tiny, 2, draft=draft, speculate_k=k, quantize=quantize)
    assert answers(llm, prompts, 10, is_stop=never) == expected
    assert answers(llm, prompts[:1], 10, is_stop=never) == expected[:1]  # the other row never has a prompt


def test_rows_end_at_stops_at_the_budget_and_where_the_cache_does(tiny):
    prompts, one = prompts_of((60, 59, 5, 6, 7)), engine_of(tiny, 1)
    plain = [list(generate(one, prompt, 8, is_stop=never)) for prompt in prompts]
    assert [len(tokens) for tokens in plain] == [1, 2, 8, 8, 8]
    stop = {2: plain[2][0], 3: plain[3][3]}  # one ends at once
    found = answers(engine_of(tiny, 2), prompts, 8, is_stop=lambda index, token: token == stop.get(index))
    cut = {index: plain[index].index(token) + 1 for index, token in stop.items()}
    assert found == [tokens[: cut.get(index)] for index, tokens in enumerate(plain)]


def test_a_common_beginning_is_read_once(tiny):
    prefix = list(range(100, 130))
    prompts, one = prompts_of((3, 1, 6, 2), prefix), engine_of(tiny, 1)
    expected = [list(generate(one, prompt, 6, is_stop=never)) for prompt in prompts]
    llm = engine_of(tiny, 2)
    read = []
    prefill = llm.reader.prefill
    llm.reader.prefill = lambda prompts, start=0: (read.append((len(prompts[0]), start)), prefill(prompts, start))
    assert answers(llm, prompts, 6, is_stop=never) == expected
    assert read == [(30, 0), (33, 30), (31, 30), (36, 30), (32, 30)]


@pytest.mark.parametrize("limit", [89, 90])
def test_copies_of_a_prompt_are_read_once_where_that_saves_enough(tiny, limit, monkeypatch):
    monkeypatch.setattr(engine, "SHARED", limit)
    prompts, one = prompts_of((3, 1, 6, 2), range(100, 130)), engine_of(tiny, 1)
    llm = engine_of(tiny, 4)
    shared = []
    share = llm.share
    llm.share = lambda prefix: (shared.append(prefix), share(prefix))
    rows = list(zip(*generate(llm, prompts, 6, is_stop=never)))
    assert [list(row) for row in rows] == [list(generate(one, prompt, 6, is_stop=never)) for prompt in prompts]
    assert shared == ([list(range(100, 130))] if limit < 90 else [])


@pytest.mark.parametrize("draft", [None, "prompt_lookup"])
def test_copies_of_a_prompt_are_fed_once(tiny, draft, monkeypatch):
    """--batch_size and a queue of samples: all but the last token of one copy, and that of each row."""
    prompt, fed = list(range(3, 203)), []
    llm = load(tiny, device="cpu", precision="fp32", batch_size=4, max_seq_length=210, draft=draft)
    hidden = llm.model.hidden
    monkeypatch.setattr(llm.model, "hidden", lambda x, *rest: fed.append(x[..., 0].numel()) or hidden(x, *rest))
    llm.prefill([prompt] * 4)
    assert sum(fed) == 199 + 4
    fed.clear()
    assert all(map(len, answers(llm, [prompt] * 9, 1)))
    rounds = sum(fed) - 199 - 9  # each of which decodes for all rows, before the host looks at their first tokens
    assert rounds % 4 == 0 and rounds <= 3 * 4 * (8 if draft else 1)


def test_shared_prefix():
    assert engine.shared_prefix([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == 1
    assert engine.shared_prefix([[1, 2, 3], [1, 2, 3]]) == 2
    assert engine.shared_prefix([[1], [2]]) == 0


def test_what_does_not_fit_is_an_error(tiny):
    with pytest.raises(UserError, match="61 tokens"):
        list(serve(engine_of(tiny, 2), prompts_of((4, 61)), 3))
    with pytest.raises(UserError, match="outside the vocabulary"):
        list(serve(engine_of(tiny, 2), [[5], [9999]], 3))


def test_logits_that_are_not_finite_end_a_queue(tiny):
    llm = engine_of(tiny, 2, precision="bf16")  # whose weights are copies, not the file's, which others use
    llm.model.layers[1].feed_forward.w2.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        list(serve(llm, prompts_of((4, 5, 6)), 3))


def queue_args(tiny, tmp_path, texts, *flags):
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    args = ["--checkpoint_path", tiny, "--device", "cpu", "--precision", "fp32", "--temperature", 0]
    return [*args, "--prompt_file", tmp_path / "prompts.txt", *flags]


def test_a_prompt_of_a_file_that_does_not_fit_is_one_line(tiny, tmp_path, refuses):
    args = queue_args(tiny, tmp_path, ("short", "x" * 40), "--max_seq_length", 30)
    refuses("generate.py", *args, words=r"has 40 tokens.*30 tokens")


@pytest.mark.parametrize("as_json", [True, False])
def test_what_has_ended_before_an_interruption_is_printed(tiny, tmp_path, capsys, monkeypatch, as_json):
    """In the file's order, though the first prompt has not."""
    texts = ("abc", *("x" * 57 + c for c in "yzwuv"))  # beside the first, which has room for 58, each has room for 3
    args = queue_args(tiny, tmp_path, texts, "--max_seq_length", 60, "--batch_size", 2, *["--json"][:as_json])
    ended, load_tokenizer = [], generation.load_tokenizer

    def endless(folder):
        return replace(load_tokenizer(folder), stop_ids=frozenset())

    def interrupted(*rest, **options):
        for index, token, last in serve(*rest, **options):
            ended.extend([index] * last)
            yield index, token, last
            if len(ended) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(generation, "load_tokenizer", endless)
    monkeypatch.setattr(generation, "serve", interrupted)
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        run_cli(generation.main)
    out, err = capsys.readouterr()
    assert (end.value.code, err.splitlines()[-1]) == (130, "interrupted")
    assert ended == [1, 2, 3]
    if as_json:
        results = [json.loads(line) for line in out.splitlines()]
        assert [(r["index"], r["prompt"], r["new_tokens"]) for r in results] == [(i, texts[i], 3) for i in ended]
    else:
        assert [text in out for text in texts] == [False, True, True, True, False, False]


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_a_queue_on_cuda(tiny, compile, quantize):
    prompts = prompts_of((*LENGTHS, 30, 31, 32, 33))
    options = {"device": "cuda", "precision": "bf16", "quantize": quantize, "compile": compile}
    one = load(tiny, sampler=GREEDY, max_seq_length=60, **options)
    expected = [list(generate(one, prompt, 10, is_stop=never)) for prompt in prompts]
    llm = load(tiny, sampler=GREEDY, max_seq_length=60, batch_size=4, **options)
    same = [a == b for a, b in zip(answers(llm, prompts, 10, is_stop=never), expected)]
    assert sum(same) >= len(same) - 2  # ties of random weights in 16 bits
