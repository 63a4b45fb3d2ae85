"""eval.py agrees with lm-eval's own `hf` backend on the same weights, on hellaswag, winogrande and wikitext in their real
formats (tests/data/eval) and on generated answers; and its command line tells users what they got wrong."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import eval as evaluation
from checkpoint import convert, load_model, read_config, torch_load
from errors import UserError
from eval import LanguageModel, evaluate, load_tasks, perplexity, read_text, rolling_windows
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
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def tasks(offline):
    return lambda *names: load_tasks(list(names), DATA)


def save_tiny(directory: Path, *, adds_bos: bool):
    """A random Llama of transformers and a byte-level BPE tokenizer, saved and converted; returns both of transformers."""
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
    config = transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0 if adds_bos else None,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)  # far from uniform, so that an error shows
    model.save_pretrained(directory)
    convert(directory, torch.float32)
    return model, fast


@pytest.fixture(scope="module", params=[False, True], ids=["no-bos", "bos"])
def tiny(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    torch.set_num_threads(1)
    model, fast = save_tiny(directory, adds_bos=request.param)
    return SimpleNamespace(directory=directory, model=model, tokenizer=fast)


def ours(directory: Path, **options) -> LanguageModel:
    model = load_model(directory / "model.pth", dtype=torch.float32)
    return LanguageModel(model, load_tokenizer(directory), **options)


def responses(results: dict, task: str) -> list:
    """What the model answered, in the documents' order: (log-likelihood, greedy) pairs, log-likelihoods or strings."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for answer in sample["resps"]]


def flat(values) -> list:
    return [x for value in values for x in (flat(value) if isinstance(value, (list, tuple)) else [value])]


def assert_same(a: dict, b: dict, names: list[str], tolerance: float) -> None:
    for name in names:
        for x, y in zip(flat(responses(a, name)), flat(responses(b, name)), strict=True):
            if isinstance(x, float):
                assert abs(x - y) < tolerance, (name, x, y)
            else:
                assert x == y, name
        for metric, value in b["results"][name].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert math.isclose(a["results"][name][metric], value, rel_tol=1e-4), (name, metric)


@pytest.mark.parametrize("max_length", [256, 40], ids=["whole", "truncated"])
def test_agrees_with_hf_backend(tiny, tasks, max_length):
    hf = HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=4, max_length=max_length)
    a = evaluate(ours(tiny.directory, batch_size=6, max_length=max_length), tasks(*TASKS))
    b = evaluate(hf, tasks(*TASKS))
    assert_same(a, b, TASKS, 1e-3)
    assert len(set(flat(responses(a, "answers")))) > 3
