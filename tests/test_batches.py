"""Many prompts on a few rows: each gets what it gets alone, whatever its neighbours do."""

import pytest
import torch
from tiny import never, write_checkpoint

import engine
from batches import serve
from errors import UserError
from generate import generate, load
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


@pytest.mark.parametrize("draft", ["prompt_lookup", "model"])
@pytest.mark.parametrize("k", [3, "auto"])
def test_a_queue_speculates(tiny, draft, k):
    prompts, one = prompts_of(prefix=range(60, 70)), engine_of(tiny, 1)
    expected = [list(generate(one, prompt, 10, is_stop=never)) for prompt in prompts]
    llm = engine_of(tiny, 2, draft=tiny if draft == "model" else draft, speculate_k=k)
    assert answers(llm, prompts, 10, is_stop=never) == expected


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
    llm = engine_of(tiny, 2)
    llm.model.layers[1].feed_forward.w2.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        list(serve(llm, prompts_of((4, 5, 6)), 3))


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
