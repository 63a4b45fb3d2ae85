"""eval.py agrees with lm-eval's own `hf` backend on the same weights, on hellaswag, winogrande and wikitext in their
real formats (tests/data/eval) and on generated answers; its command line tells users what they got wrong."""

import dataclasses
import json
import math
import random
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import tokenizers
import torch
import transformers
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tiny import write_checkpoint
from torch._dynamo.utils import counters

import eval as evaluation
import generate
import ops
from checkpoint import load_model, read_config, torch_load
from errors import UserError
from eval import LanguageModel, evaluate, perplexity, rolling_windows
from formats import lm_eval_tasks
from process.command import run_cli
from quantize import gptq_checkpoint
from texts import load_tasks, read_text
from tokenizer import load_tokenizer

DATA = Path(__file__).parent / "data" / "eval"
TASKS = ["hellaswag", "winogrande", "wikitext", "answers"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Data sets are built in a directory of the test's own, without a look at the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def tasks(offline):
    """The local tasks, read once; evaluate may be called on them again and again."""
    return load_tasks(TASKS, DATA)


def hf_backend(model, tokenizer, **options):
    """lm-eval's own backend for transformers' models."""
    pytest.importorskip("accelerate", reason="lm-eval's hf backend needs accelerate")
    from lm_eval.models.huggingface import HFLM  # cannot be imported without accelerate

    return HFLM(pretrained=model, tokenizer=tokenizer, **options)


def make_tiny(directory: Path, *, adds_bos: bool) -> SimpleNamespace:
    """A random Llama and a byte-level BPE tokenizer of transformers, saved and converted."""
    torch.set_num_threads(1)
    ids = {"bos_token_id": 0 if adds_bos else None, "eos_token_id": 1, "pad_token_id": 1}
    model = write_checkpoint(directory, seed=5, vocab_size=400, **ids)
    (directory / "generation_config.json").unlink()  # of another tokenizer
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    specials = ["<|begin|>", "<|end|>", "<|user|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    lines = [line for file in sorted(DATA.glob("*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines()]
    tokenizer.train_from_iterator(lines, trainer)
    if adds_bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", 0)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>" if adds_bos else None,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=["<|user|>"],
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(directory)
    return SimpleNamespace(directory=directory, model=model, tokenizer=fast)


@pytest.fixture(scope="module")
def tiny_bos(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("bos"), adds_bos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("no-bos"), adds_bos=False)


def ours(directory: Path, **options) -> LanguageModel:
    model = load_model(directory / "model.pth", dtype=torch.float32)
    return LanguageModel(model, load_tokenizer(directory), **options)


def answers(results: dict, task: str) -> list:
    """What the model said, by document: log-likelihoods and whether each is greedy, or strings."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [value for sample in samples for value in flat(sample["resps"])]


def flat(value) -> list:
    return [x for part in value for x in flat(part)] if isinstance(value, (list, tuple)) else [value]


def assert_same(a: dict, b: dict) -> None:
    """Log-likelihoods within 1e-3, all else equal."""
    for task, expected in b["results"].items():
        for x, y in zip(answers(a, task), answers(b, task), strict=True):
            assert abs(x - y) < 1e-3 if isinstance(y, float) else x == y, (task, x, y)
        for metric in expected.keys() & {
            "acc,none",
            "acc_norm,none",
            "exact_match,none",
            "bits_per_byte,none",
            "word_perplexity,none",
        }:
            assert a["results"][task][metric] == pytest.approx(expected[metric], rel=1e-4), (task, metric)


# --- agreement with lm-eval's hf backend ---


@pytest.mark.parametrize("max_length", [256, 40], ids=["whole", "truncated"])
@pytest.mark.parametrize("name", ["tiny", "tiny_bos"])
def test_agrees_with_hf_backend(request, name, tasks, max_length):
    tiny = request.getfixturevalue(name)
    hf = hf_backend(tiny.model, tiny.tokenizer, batch_size=4, max_length=max_length)
    a = evaluate(ours(tiny.directory, batch_size=6, max_length=max_length), tasks)
    assert_same(a, evaluate(hf, tasks))
    assert len(set(answers(a, "answers"))) > 3  # or else equal strings would mean little


def test_agrees_with_hf_backend_in_a_chat(tiny, tasks):
    a = evaluate(ours(tiny.directory), tasks, chat=True)
    b = evaluate(hf_backend(tiny.model, tiny.tokenizer, batch_size=3), tasks, chat=True)
    assert_same(a, b)
    assert "<|user|>user: Question: " in str(a["samples"]["answers"][0]["arguments"])


@pytest.mark.parametrize("name", ["tiny", "tiny_bos"])
def test_empty_context_is_the_prefix_token(request, name):
    """As with hf: BOS where there is one, or else end of text, and no second BOS."""
    tiny = request.getfixturevalue(name)
    requests = [SimpleNamespace(args=("", text)) for text in ("A man", " pours flour.", "<|begin|>A man")]
    expected = hf_backend(tiny.model, tiny.tokenizer, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    result = ours(tiny.directory).loglikelihood(requests, disable_tqdm=True)
    assert flat(result) == pytest.approx(flat(expected), abs=1e-3)


def test_continued_message_is_left_open(tiny):
    history = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Well, "}]
    expected = tiny.tokenizer.apply_chat_template(history, tokenize=False, continue_final_message=True)
    assert ours(tiny.directory).apply_chat_template(history, add_generation_prompt=False) == expected.rstrip()


def to_transformers(directory: Path):
    """transformers' Llama of a model.pth: its fused rows parted, and its pairs (2i, 2i+1) moved to (i, i + D/2)."""
    config, state = read_config(directory), dict(torch_load(directory / "model.pth"))
    H, Hkv, D = config.n_head, config.n_local_heads, config.head_dim
    names = {"feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj"}
    names |= {"attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm"}
    names |= {"ffn_norm": "post_attention_layernorm"}
    weights = {"model.embed_tokens.weight": state["tok_embeddings.weight"], "model.norm.weight": state["norm.weight"]}
    weights["lm_head.weight"] = state.get("output.weight", state["tok_embeddings.weight"])
    for layer in range(config.n_layer):
        theirs, own = f"model.layers.{layer}", f"layers.{layer}"
        for a, b in names.items():
            weights[f"{theirs}.{b}.weight"] = state[f"{own}.{a}.weight"]
        parts = state[f"{own}.attention.wqkv.weight"].split((H * D, Hkv * D, Hkv * D))
        for name, part in zip("qkv", parts):
            if name != "v":
                part = part.view(-1, D // 2, 2, config.dim).transpose(1, 2).reshape(part.shape)
            weights[f"{theirs}.self_attn.{name}_proj.weight"] = part
    settings = json.loads((directory / "config.json").read_text())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model


def test_to_transformers_undoes_conversion(tiny):
    for name, weight in to_transformers(tiny.directory).state_dict().items():
        assert torch.equal(weight, tiny.model.state_dict()[name]), name


def test_agrees_with_hf_backend_on_smollm2(smollm2_dir, tasks):
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(smollm2_dir)
    # A softmax in fp32, hf's default, is off by 2e-5 a token with 49152 of them, which adds up over a page.
    hf = hf_backend(to_transformers(smollm2_dir), fast, batch_size=4, max_length=128, softmax_dtype="float64")
    a = evaluate(ours(smollm2_dir, batch_size=8, max_length=128), tasks, limit=3)
    assert_same(a, evaluate(hf, tasks, limit=3))
    assert a["results"]["hellaswag"]["acc_norm,none"] > 0.5


# --- log-likelihoods ---


def random_pairs(contexts=(1, 2, 9, 30), continuations=(1, 2, 5, 17)) -> list[tuple[list[int], list[int]]]:
    """Each continuation length after each context; four continuations share a context."""
    generator = torch.Generator().manual_seed(3)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, 400, (n,), generator=generator).tolist()

    return [(context, tokens(n)) for context in map(tokens, contexts) for n in continuations]


def reference(model, context: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    return logits.double().log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None]).sum().item()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_equal_transformers(tiny, batch_size):
    pairs = random_pairs()
    scores = ours(tiny.directory, batch_size=batch_size).score(pairs)
    assert [score for score, _ in scores] == pytest.approx([reference(tiny.model, *pair) for pair in pairs], abs=1e-4)


def test_long_continuations_are_scored_in_slices(tiny, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_LOGITS", 3 * 400 * 5)
    monkeypatch.setattr(ops, "chunk_tokens", lambda device, rows: 7)
    monkeypatch.setattr(evaluation, "MAX_BATCH_TOKENS", 160)
    pairs = random_pairs()
    scores = ours(tiny.directory).score(pairs)
    assert [score for score, _ in scores] == pytest.approx([reference(tiny.model, *pair) for pair in pairs], abs=1e-4)


def test_greedy_is_told_from_likely(tiny):
    context = [10, 20, 30]
    answer = tiny.model.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    answer = answer[0, len(context) :].tolist()
    other = [*answer[:-1], (answer[-1] + 1) % 400]
    assert [greedy for _, greedy in ours(tiny.directory).score([(context, answer), (context, other)])] == [True, False]


def test_nothing_to_predict_is_certain(tiny):
    assert ours(tiny.directory).score([([5, 6], [])]) == [(0.0, True)]
    assert ours(tiny.directory).score([]) == []


def test_continuation_longer_than_the_context_is_refused(tiny):
    with pytest.raises(UserError, match="17 tokens, more than --max_seq_length 16"):
        ours(tiny.directory, max_length=16).score([([1], [2] * 17)])


def test_shared_context_is_read_once(tiny):
    lm = ours(tiny.directory)
    fed, hidden = [], lm.hidden
    lm.hidden = lambda x, *rest: fed.append(tuple(x.shape[:2])) or hidden(x, *rest)
    lm.score(random_pairs(contexts=[50], continuations=[20, 20, 20, 20]))
    assert fed == [(1, 49), (4, 20)]


def test_compiles_once_for_all_lengths(tiny):
    pairs = random_pairs(contexts=(1, 2, 3, 8, 16, 17, 40), continuations=(1, 2, 8, 23, 37))
    lm = ours(tiny.directory, batch_size=5, compile=True)
    expected = ours(tiny.directory).score(pairs)
    torch._dynamo.reset()
    counters.clear()
    for batch_size in (5, 4, 1, 3):
        lm.batch_size = batch_size
        assert [s for s, _ in lm.score(pairs)] == pytest.approx([s for s, _ in expected], abs=1e-4)
    assert counters["stats"]["unique_graphs"] == 2  # a single row, and several


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_quantised_layers_share_prefills(tiny, kind):
    """A batch's scores are those of one request at a time, whatever the linear layers are."""
    model = load_model(tiny.directory / "model.pth", dtype=torch.float32, quantize=kind)
    lm = LanguageModel(model, load_tokenizer(tiny.directory))
    pairs = random_pairs(contexts=(2, 9), continuations=(1, 5))
    assert [s for s, _ in lm.score(pairs)] == pytest.approx([lm.score([pair])[0][0] for pair in pairs], abs=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_equals_cpu(tiny, compile):
    model = load_model(tiny.directory / "model.pth", dtype=torch.float32, device="cuda")
    lm = LanguageModel(model, load_tokenizer(tiny.directory), compile=compile)
    pairs = random_pairs()
    assert [s for s, _ in lm.score(pairs)] == pytest.approx([reference(tiny.model, *pair) for pair in pairs], abs=1e-2)


# --- generation ---


def generated(lm, *prompts: str, **options) -> list[str]:
    return lm.generate_until([SimpleNamespace(args=(prompt, options)) for prompt in prompts], disable_tqdm=True)


def test_generation_options(tiny):
    lm = ours(tiny.directory, batch_size=2)
    prompts = "A man", "Two old friends sit down", "A", "The cup did not fit"
    greedy = generated(lm, *prompts, max_gen_toks=12)
    assert generated(lm, *prompts, max_gen_toks=12, do_sample=False) == greedy
    assert generated(lm, *prompts, max_gen_toks=12, temperature=0.9, top_k=1, do_sample=True) == greedy
    assert generated(lm, *prompts, max_gen_toks=12, temperature=5.0) != greedy
    stop = greedy[0][3]
    assert generated(lm, prompts[0], max_gen_toks=12, until=[stop]) == [greedy[0].split(stop)[0]]


def test_generation_ends_where_a_stop_is_met(tiny, monkeypatch):
    lm, tokens = ours(tiny.directory), []
    serve = generate.serve
    monkeypatch.setattr(generate, "serve", lambda *args, **kw: (tokens.append(t) or t for t in serve(*args, **kw)))
    own = tiny.model.generate(**tiny.tokenizer("A man", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    first, end = int(own[0, -20]), int(own[0, -10])
    lm.text_tokenizer = dataclasses.replace(lm.text_tokenizer, eos_ids=frozenset({end}))
    generated(lm, "A man", max_gen_toks=20)
    assert tokens[-1] == (0, end, True)
    assert len(tokens) <= 11
    tokens.clear()
    generated(lm, "A man", max_gen_toks=20, until=[lm.text_tokenizer.decode([first])])
    assert tokens == [(0, first, True)]


def test_generation_refills_rows(tiny):
    """Five prompts on two rows get what each gets alone, and in the order of the requests."""
    prompts = ["A man", "Two old friends sit down", "A", "The cup did not fit", "A woman tunes a guitar slowly"]
    one, two = ours(tiny.directory, batch_size=1), ours(tiny.directory, batch_size=2)
    assert generated(two, *prompts, max_gen_toks=9) == [generated(one, text, max_gen_toks=9)[0] for text in prompts]


def test_generation_options_that_are_not_supported(tiny):
    lm = ours(tiny.directory)
    with pytest.raises(UserError, match="num_beams are not supported"):
        generated(lm, "A man", num_beams=4)
    with pytest.raises(UserError, match="max_gen_toks is 300; accepted: 1 to 255"):
        generated(lm, "A man", max_gen_toks=300)


# --- texts ---


@pytest.mark.parametrize("n", [1, 4, 5, 8, 9, 13])
def test_rolling_windows_are_lm_evals(n):
    tokens = list(range(100, 100 + n))
    theirs = get_rolling_token_windows(tokens, prefix_token=7, max_seq_len=4, context_len=1)
    assert rolling_windows(tokens, 7, 4) == list(map(make_disjoint_window, theirs))


def test_perplexity(tiny):
    text = "A woman tunes a guitar — slowly. " * 9
    result = perplexity(ours(tiny.directory), text, window=32)
    tokens = tiny.tokenizer.encode(text, add_special_tokens=False)
    nll = -sum(reference(tiny.model, *pair) for pair in rolling_windows(tokens, tiny.tokenizer.eos_token_id, 32))
    assert result["tokens"] == len(tokens)
    assert result["bytes"] == len(text.encode())
    assert result["nll"] == pytest.approx(nll, abs=1e-3)
    assert result["perplexity"] == pytest.approx(math.exp(nll / len(tokens)), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nll / math.log(2) / len(text.encode()), rel=1e-5)


def test_tokens_that_the_model_does_not_have_are_named(tiny, tmp_path):
    with pytest.raises(UserError, match="token id 9999 is outside the vocabulary"):
        ours(tiny.directory)._padded([(1, 9999)])
    with pytest.raises(UserError, match="token id 9999 is outside the vocabulary"):
        gptq_checkpoint(
            tiny.directory / "model.pth",
            tmp_path / "x.pth",
            "int4:32",
            [torch.tensor([[1, 9999]])],
            torch.device("cpu"),
        )
    assert not list(tmp_path.iterdir())


def test_limit_of_a_text_counts_tokens_and_their_bytes(tiny):
    text = "A woman tunes a guitar slowly."
    tokens = tiny.tokenizer.encode(text, add_special_tokens=False)
    result = perplexity(ours(tiny.directory), text, max_tokens=5)
    assert (result["tokens"], result["bytes"]) == (5, len(tiny.tokenizer.decode(tokens[:5])))


def test_builtin_text_is_long_and_the_same_each_time():
    assert len(read_text()) == 100_000 and read_text() == read_text()


def test_builtin_text_has_20000_tokens(smollm2_dir):
    assert len(load_tokenizer(smollm2_dir).encode(read_text())) >= 20_000


# --- tasks and the command line ---


def test_tasks_that_run_a_models_code_are_refused(tiny, tmp_path):
    task = (DATA / "answers.yaml").read_text().replace("answers.jsonl", str(DATA / "answers.jsonl"))
    (tmp_path / "unsafe.yaml").write_text(task.replace("task: answers", "task: unsafe\nunsafe_code: true"))
    with pytest.raises(UserError, match="lm-eval's unsafe runs the code"):
        evaluate(ours(tiny.directory), load_tasks(["unsafe"], tmp_path))


def test_data_files_lie_beside_their_yaml(tmp_path, monkeypatch):
    """In subdirectories, in lists, under an include path that is relative itself, and inside a group."""
    folder = tmp_path / "mine" / "sub"
    folder.mkdir(parents=True)
    (folder / "one.jsonl").write_text('{"text": "One."}\n')
    (folder / "two.jsonl").write_text('{"text": "Two."}\n{"text": "Three."}\n')
    (folder / "task.yaml").write_text(
        "task: local_text\ndataset_path: json\ndataset_kwargs: {data_files: {test: [one.jsonl, two.jsonl]}}\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    )
    (folder / "group.yaml").write_text("group: local_group\ntask: [local_text]\n")
    monkeypatch.chdir(tmp_path)
    loaded = load_tasks(["local_text"], Path("mine"))
    assert loaded["tasks"]["local_text"].dataset["test"]["text"] == ["One.", "Two.", "Three."]


def test_tasks_that_shuffle_do_it_as_under_lm_eval(tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(30)))
    (tmp_path / "own.py").write_text("import random\nmix = lambda docs: docs.select(random.sample(range(30), 30))\n")
    (tmp_path / "task.yaml").write_text(
        f"task: mixed\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        "process_docs: !function own.mix\noutput_type: loglikelihood_rolling\ntest_split: test\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    )
    random.seed(0)  # as lm_eval.simple_evaluate does
    theirs = TaskManager(include_path=tmp_path, include_defaults=False).load(["mixed"])
    random.seed(9)
    found = load_tasks(["mixed"], tmp_path)["tasks"]["mixed"].task_docs["text"]
    assert found == theirs["tasks"]["mixed"].task_docs["text"] != [str(i) for i in range(30)]


def run(capsys, monkeypatch, *args) -> tuple[int, str, str]:
    """eval.py's command line in this process: (status, stdout, stderr)."""
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, args)])
    status = 0
    try:
        run_cli(evaluation.main)
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def test_command_line(tiny, cli, tmp_path):
    """The real thing in a process of its own: tasks and a text, JSON last."""
    (tmp_path / "text.txt").write_text("Some text of mine, not long. " * 4)
    result = cli(
        *("eval.py", "--checkpoint_path", tiny.directory / "model.pth", "--tasks", "winogrande", "answers"),
        *("--include_path", DATA, "--limit", 3, "--perplexity", tmp_path / "text.txt", "--batch_size", 2),
        *("--max_seq_length", 200, "--precision", "fp32", "--quantize", "int8", "--device", "cpu", "--json"),
        *("--compile", "--chat", "--num_fewshot", 1),
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert result.status == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["perplexity"]["tokens"] == 3
    assert report["n-samples"]["winogrande"]["effective"] == 3
    assert re.search(r"\|winogrande\|[^|]*\|[^|]*\| *1\|", result.stdout)  # version, filter, n-shot
    assert 0 <= report["results"]["winogrande"]["acc,none"] <= 1
    assert "|winogrande|" in result.stdout
    assert "bits per byte: " in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--limit", "0"], "argument --limit: '0' is not a positive integer"),
        (["--batch_size", "-1"], "argument --batch_size: '-1' is not a positive integer"),
        (["--num_fewshot", "-1"], "argument --num_fewshot: '-1' is not a natural number"),
        (["--precision", "int3"], "argument --precision: invalid choice: 'int3'"),
        (["--device", "abacus"], "device 'abacus' is not known"),
        (["--perplexity", "nowhere.txt"], "cannot read nowhere.txt as UTF-8 text"),
        (["--perplexity", "{dir}/model.pth"], "model.pth as UTF-8 text"),
        (["--perplexity", "{dir}/empty.txt"], "empty.txt is empty; a text of at least one token is needed"),
        (["--perplexity", "--checkpoint_path", "{dir}/absent.pth"], "absent.pth does not exist"),
        (["--perplexity", "--max_seq_length", "999"], "--max_seq_length 999 exceeds the model's context of 256 tokens"),
        (["--perplexity", "--quantize", "int5"], "cannot quantise to 'int5'"),
        (["--tasks", "answers", "--include_path", "nowhere"], "--include_path nowhere is not a directory"),
        (["--tasks", "winogrande", "--include_path", "{dir}/bad"], "bad/winogrande.yaml is no task: while parsing"),
        (
            ["--tasks", "winogrande", "--include_path", "{dir}/text"],
            "text/winogrande.yaml is no task: Expected",
        ),
        (["--perplexity", "--chat"], "--chat needs --tasks"),
        (["--perplexity", "--num_fewshot", "1"], "--num_fewshot needs --tasks"),
        (["--perplexity", "/dev/zero"], "/dev/zero is not a regular file"),
        (
            ["--tasks", "answers", "--include_path", str(DATA), "--num_fewshot", "9" * 20],
            "--num_fewshot 99999999999999999999 is too many; answers has",
        ),
        (["--tasks", "broken", "--include_path", "{dir}/broken"], "cannot load lm-eval's broken: Unable to find"),
    ],
)
def test_bad_input_is_one_line(tiny, tmp_path, capsys, monkeypatch, args, message):
    (tiny.directory / "empty.txt").touch()
    (tiny.directory / "broken").mkdir(exist_ok=True)
    (tiny.directory / "broken" / "broken.yaml").write_text(
        (DATA / "answers.yaml").read_text().replace("task: answers", "task: broken")
    )
    for name, content in (("bad", "task: [winogrande"), ("text", "task winogrande")):
        (tiny.directory / name).mkdir(exist_ok=True)
        (tiny.directory / name / "winogrande.yaml").write_text(content)
    monkeypatch.chdir(tmp_path)
    args = [arg.format(dir=tiny.directory) for arg in args]
    status, out, err = run(capsys, monkeypatch, "--checkpoint_path", tiny.directory / "model.pth", *args)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_unknown_task_lists_close_names(capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(DATA / "manager.py"))  # reading all takes 15 s
    status, _, err = run(capsys, monkeypatch, "--tasks", "helaswag")
    assert status == 2
    assert "lm-eval has no task 'helaswag'; close names: hellaswag" in err.splitlines()[-1]


def test_an_unreachable_hub_is_one_line(tmp_path, capfd, monkeypatch):
    """At once, and not after five retries, of which each has two lines of its own."""
    keys = {"task": "far", "dataset_path": "nobody/nothing", "output_type": "loglikelihood", "test_split": "test"}
    keys |= {"doc_to_text": "{{a}}", "doc_to_target": "{{b}}"}
    (tmp_path / "far.yaml").write_text(json.dumps(keys))
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    lm_eval_tasks._probe_hub.cache_clear()
    start = time.monotonic()
    status, out, err = run(capfd, monkeypatch, "--tasks", "far", "--include_path", tmp_path)
    lm_eval_tasks._probe_hub.cache_clear()
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: cannot load lm-eval's far: Couldn't reach 'nobody/nothing' on the Hub")
    assert time.monotonic() - start < 20


def test_without_lm_eval(tiny, capsys, monkeypatch):
    """Perplexity does without lm-eval; tasks say that it is missing."""
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    status, _, err = run(capsys, monkeypatch, "--tasks", "hellaswag")
    assert status == 2
    assert err == "error: --tasks needs lm-eval: pip install 'lm-eval>=0.4.13'; --perplexity does without\n"
