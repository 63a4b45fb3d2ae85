"""The tokenizer module against the libraries it wraps, against transformers, and against what it promises."""

import base64
import functools
import io
import json
import os
import random
import re
import resource
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from errors import UserError
from formats.gguf_tokenizer import gguf_tokenizer_files
from formats.tokenizer_files import LLAMA3_SPLIT, LONG_BLANKS, _byte_level
from tokenizer import StopStrings, StreamDecoder, load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind it in the least.",
    "Once upon a time there was a little girl named Lily. She loved to play outside in the sunshine.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Zażółć gęślą jaźń. Füchse jagen über die Straße; l'été, c'est déjà fini. Привет, мир! Как дела?",
    "你好，世界。今天天气很好。こんにちは世界。안녕하세요 세계 مرحبا بالعالم שלום",
    "In 1984 there were 365 days, 12 months and 52 weeks; 3.14159 is not 22/7. I'll say it's DON'T.",
]
# Code points that tokenizers stumble over: joined emoji, combining marks, controls, spaces, SentencePiece's own mark.
TRICKY = "aé 1Ω你👩‍👩‍👧🇫🇷\u0301\u0000\n\r\t\u00a0\u3000\u200d\ufeff▁ĠÂ½²<|s>\U0010ffff\ufffd"
WORDS = [*" ".join(CORPUS).split(" "), " ", "  ", "\n"]
texts = (
    st.text(max_size=40)
    | st.text(alphabet=TRICKY, max_size=40)
    | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
)


def write(folder: Path, **files) -> Path:
    """A checkpoint directory: name_with_underscore_for_dot=content (bytes, text, or an object for JSON)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, end = name.rpartition("_")
        content = json.dumps(content) if isinstance(content, dict | list) else content
        (folder / f"{stem}.{end}").write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def sentencepiece_model(kind: str) -> bytes:
    """A small model with Llama 2's options."""
    out = io.BytesIO()
    options = {
        "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity", "num_threads": 1,
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "minloglevel": 2, "vocab_size": 480,
        "hard_vocab_limit": False, "character_coverage": 0.98, "model_type": kind,
    }  # fmt: skip
    lines = [line for text in CORPUS * 3 for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **options)
    return out.getvalue()


@pytest.fixture(scope="session")
def llama2_model() -> bytes:
    return sentencepiece_model("bpe")


@pytest.fixture(scope="session")
def byte_level_json() -> str:
    """Byte-level BPE with Llama 3's pre-tokenizer and BOS, the shape of Llama 3's own tokenizer.json."""
    tok = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tok.add_special_tokens(names)
    tok.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    bos = (names[0], tok.token_to_id(names[0]))
    bos_first = processors.TemplateProcessing(single=f"{names[0]} $A", special_tokens=[bos])
    tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos_first])
    return tok.to_str()


@pytest.fixture(scope="session")
def tiktoken_ranks(byte_level_json) -> bytes:
    """The ranks file of the same BPE as `byte_level_json`."""
    vocab = json.loads(byte_level_json)["model"]["vocab"]
    return b"".join(base64.b64encode(_byte_level(token)) + b" %d\n" % rank for token, rank in vocab.items())


@pytest.fixture(scope="session")
def every(tmp_path_factory, llama2_model, byte_level_json, tiktoken_ranks):
    """One tokenizer of every kind, by name."""
    metaspace = tokenizers.Tokenizer(models.Unigram())
    metaspace.normalizer = normalizers.NFKC()
    metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"unk_token": "<unk>", "special_tokens": ["<unk>", "<eos>"], "show_progress": False}
    metaspace.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=300, **options))
    files = {
        "sentencepiece-bpe": {"tokenizer_model": llama2_model},
        "sentencepiece-unigram": {"tokenizer_model": sentencepiece_model("unigram")},
        "llama2-json": {
            "tokenizer_json": gguf_tokenizer_files(sentencepiece_metadata(llama2_model))["tokenizer.json"],
            "tokenizer_config_json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}},
        },
        "byte-level-json": {"tokenizer_json": byte_level_json},
        "tiktoken": {"tokenizer_model": tiktoken_ranks},
        "metaspace-json": {"tokenizer_json": metaspace.to_str()},
    }
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: load_tokenizer(write(root / kind, **content)) for kind, content in files.items()}


LLAMA_KINDS = ("sentencepiece-bpe", "llama2-json", "byte-level-json", "tiktoken")
BYTE_KINDS = (*LLAMA_KINDS, "sentencepiece-unigram")
KINDS = (*BYTE_KINDS, "metaspace-json")  # the last cannot spell every text


def over(kinds):
    """The test for each of `kinds`, with texts or other data of Hypothesis."""
    return lambda test: pytest.mark.parametrize("kind", kinds)(settings(max_examples=40, deadline=None)(test))


# --- against the libraries --------------------------------------------------------------------------------------------


@over(["sentencepiece-bpe", "sentencepiece-unigram"])
@given(text=texts)
def test_sentencepiece_agrees_with_the_library(kind, every, text):
    tok, library = every[kind], every[kind].backend.library
    ids = library.encode(text)
    assert tok.encode(text, special=False) == [library.bos_id(), *ids]
    assert tok.decode(ids) == library.decode(ids)


@over(["llama2-json", "byte-level-json", "metaspace-json"])
@given(text=texts)
def test_tokenizer_json_agrees_with_the_library(kind, every, text):
    tok, library = every[kind], every[kind].backend.library
    body = tok.encode(text, bos=False)
    assert body == library.encode(text, add_special_tokens=False).ids
    assert tok.decode(body, skip_special=True) == library.decode(body, skip_special_tokens=True)
    assert tok.encode(text) == library.encode(text).ids


@over([("tiktoken", "byte-level-json"), ("llama2-json", "sentencepiece-bpe")])
@given(text=texts)
def test_two_libraries_agree_on_the_same_merges(kind, every, text):
    one, other = every[kind[0]], every[kind[1]]
    text = re.sub("<(tool|/?s|unk)>", "", text)
    ids = one.encode(text, bos=False, special=False)
    assert ids == other.encode(text, bos=False, special=False)
    assert one.decode(ids) == one.backend.library.decode(ids) == other.backend.library.decode(ids)


def test_lone_surrogates_become_replacement_characters(every):
    for tok in every.values():  # Python's reading of invalid UTF-8 on a command line
        assert tok.encode("a\udc80b") == tok.encode("a\ufffdb")
        assert tok.encode("\ud83d\ude00") == tok.encode("\U0001f600")  # a pair is its character


# --- decoding and streaming -------------------------------------------------------------------------------------------


@over(KINDS)
@given(data=st.data(), skip=st.booleans())
def test_streamed_pieces_join_to_decode(kind, every, data, skip):
    tok = every[kind]
    ids = data.draw(st.lists(st.integers(-1, len(tok.backend.tokens)), max_size=30))
    one_by_one, at_once = StreamDecoder(tok, skip_special=skip), StreamDecoder(tok, skip_special=skip)
    assert "".join(map(one_by_one.put, ids)) + one_by_one.flush() == tok.decode(ids, skip_special=skip)
    assert at_once.put(ids) + at_once.flush() == tok.decode(ids, skip_special=skip)
    assert tok.decode([len(tok.backend.tokens), -1]) == "\ufffd\ufffd"  # ids without a token are visible


@over(BYTE_KINDS)
@given(text=texts)
def test_round_trip_and_streaming_never_guesses(kind, every, text):
    tok = every[kind]
    text = text.replace("▁", "_")  # SentencePiece cannot tell its own mark from a space
    ids = tok.encode(text, bos=False, special=False)
    assert tok.decode(ids) == text
    stream, shown = StreamDecoder(tok), ""
    for i in ids:
        shown += stream.put(i)
        assert text.startswith(shown)
    assert shown == text and stream.flush() == ""


def test_a_character_split_over_tokens_comes_whole(every):
    for tok in map(every.get, LLAMA_KINDS):
        ids = tok.encode("🦜", bos=False)
        assert len(ids) >= 4  # not in the corpus: four byte tokens
        stream = StreamDecoder(tok)
        assert [stream.put(i) for i in ids][-5:] == [""] * (len(ids) - 1) + ["🦜"]
        stream = StreamDecoder(tok, prompt=ids[:-1])
        assert stream.put(ids[-1]) == "🦜"  # even where the prompt ends inside it
        stream = StreamDecoder(tok, prompt=ids[:-1])
        assert stream.flush() == "\ufffd"


@over(LLAMA_KINDS)
@given(data=st.binary(max_size=12) | st.lists(st.sampled_from(b"a\xe4\xbd\xa0\xf0\x9f\xed\xff")).map(bytes))
def test_invalid_byte_tokens_decode_as_python_does(kind, every, data):
    tok = every[kind]
    by_bytes = {token: i for i, token in tok.backend.tokens.items() if len(token) == 1}
    ids = [by_bytes[bytes([byte])] for byte in b"x" + data]
    assert tok.decode(ids) == (b"x" + data).decode("utf-8", "replace")
    if kind in ("byte-level-json", "tiktoken"):  # these libraries define it the same way
        assert tok.decode(ids) == tok.backend.library.decode(ids)


def test_leading_space_depends_on_what_came_before(every):
    for kind in ("sentencepiece-bpe", "llama2-json"):
        tok = every[kind]
        prompt, whole = tok.encode("The quick"), tok.encode("The quick brown fox")
        assert whole[: len(prompt)] == prompt
        answer = whole[len(prompt) :]
        assert tok.decode(answer) == "brown fox"
        assert StreamDecoder(tok, prompt).put(answer) == " brown fox"
        assert tok.decode(whole) == "<s>The quick brown fox"
        assert tok.decode(whole, skip_special=True) == "The quick brown fox"
        assert tok.decode(tok.encode("  two spaces", bos=False)) == "  two spaces"


# --- BOS, special tokens, stops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sentencepiece-bpe", "byte-level-json", "tiktoken"])
def test_bos_comes_once(kind, every):
    tok = every[kind]
    ids = tok.encode("The dog")
    assert ids[0] == tok.bos_id and ids.count(tok.bos_id) == 1
    assert tok.encode(f"{tok.template_tokens['bos_token']}The dog") == ids
    assert tok.encode("The dog", bos=False) == ids[1:]
    assert tok.encode("") == [tok.bos_id] and tok.encode("", bos=False) == []


@pytest.mark.parametrize("add", [True, False, None])
def test_who_decides_about_bos(tmp_path, llama2_model, byte_level_json, add):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "add_bos_token": add}
    for post_processor in (True, False):  # of a tokenizer.json, as in transformers
        spec = json.loads(byte_level_json) | ({} if post_processor else {"post_processor": None})
        tok = load_tokenizer(write(tmp_path, tokenizer_json=spec, tokenizer_config_json=config))
        assert tok.encode("Lily") == AutoTokenizer.from_pretrained(tmp_path)("Lily").input_ids
        assert tok.add_bos is post_processor and tok.bos_id == tok.backend.added["<|begin_of_text|>"]

    config = {} if add is None else {"add_bos_token": add}  # of a SentencePiece model
    tok = load_tokenizer(write(tmp_path / "sp", tokenizer_model=llama2_model, tokenizer_config_json=config))
    assert (tok.encode("dog")[0] == 1) is (add is not False)


@over(LLAMA_KINDS)
@given(data=st.data())
def test_special_tokens_in_text(kind, every, data):
    tok = every[kind]
    pieces = st.sampled_from([*tok.backend.added, " ", "a", "<", "\n", "你"])
    text = "".join(data.draw(st.lists(pieces, max_size=8)))
    assert not tok.backend.special_ids & set(tok.encode(text, bos=False, special=False))
    name, i = data.draw(st.sampled_from(sorted(tok.backend.added.items())))
    ids = tok.encode(f"dog{name}fox", bos=False)
    assert ids.count(i) == 1 and tok.decode(ids) in (f"dog{name}fox", f"dog{name} fox")


def token(content: str, **flags) -> dict:
    keys = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return {"content": content, **dict.fromkeys(keys, False), **flags}


@pytest.mark.parametrize("declared_in", ["decoder", "added_tokens"])
def test_sentencepiece_added_tokens_beyond_the_model(tmp_path, llama2_model, every, declared_in):
    size = len(every["sentencepiece-bpe"].backend.tokens)
    ids = {"<s>": 1, "<|im_start|>": size, "<|im_end|>": size + 1, "<s>!": size + 2}
    config = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    if declared_in == "decoder":
        config["added_tokens_decoder"] = {str(i): token(name, special=name[1] == "|") for name, i in ids.items()}
        files = {"added_tokens_json": {"ignored": size + 7}}  # as transformers does beside the other
    else:
        files = {"added_tokens_json": ids}
    tok = load_tokenizer(write(tmp_path, tokenizer_model=llama2_model, tokenizer_config_json=config, **files))
    assert len(tok.backend.tokens) == size + 3 and tok.encode("<s>!", bos=False) == [size + 2]  # the longer name
    assert tok.backend.special_ids == {1, 2, size, size + 1}
    assert tok.encode("<s>!", bos=False, special=False) == [size + 2]  # not special, and so text
    assert tok.eos_ids == {size + 1} and tok.stop_ids == {size + 1, 2}
    ids = tok.encode_chat([{"role": "user", "content": "The dog"}])
    assert ids.count(size) == 2 and ids.count(size + 1) == 1
    assert tok.decode([size, size + 1]) == "<|im_start|><|im_end|>"


ROLE_TAGS = {  # files beside a tokenizer.json of N tokens: what transformers makes of them is right
    "decoder": {"config": {"added_tokens_decoder": {"N": token("<|user|>", special=True), "M": token("<think>")}}},
    "added tokens": {"added_tokens_json": {"<|user|>": "N", "<think>": "M"}},
    "out of order": {"added_tokens_json": {"<think>": "M", "<|user|>": "N"}},
    "both": {"config": {"added_tokens_decoder": {"N": token("<|user|>")}}, "added_tokens_json": {"<think>": "N"}},
    "special by a list": {
        "config": {"additional_special_tokens": ["<|user|>"]},
        "added_tokens_json": {"<|user|>": "N", "<think>": "M"},
    },
    "named in a list alone": {"config": {"extra_special_tokens": ["<|user|>", "<think>"]}},
    "named by keys": {"config": {"extra_special_tokens": {"user_token": "<|user|>"}, "image_token": "<think>"}},
    "roles": {"config": {"pad_token": "<|user|>", "eos_token": {"__type": "AddedToken", **token("<|eot_id|>")}}},
    "special tokens map": {
        "config": {"eos_token": "<|eot_id|>", "pad_token": "<think>"},
        "special_tokens_map_json": {"eos_token": token("<|end_of_text|>"), "unk_token": "<|user|>"},
    },
    "map beside a decoder": {
        "config": {"eos_token": "<|eot_id|>", "added_tokens_decoder": {"N": token("<|user|>")}},
        "special_tokens_map_json": {"eos_token": "<|end_of_text|>", "unk_token": "<think>"},
    },
    "part of the vocabulary": {"config": {"unk_token": "the"}, "added_tokens_json": {"and": "N"}},
    "flags": {
        "config": {
            "added_tokens_decoder": {
                "N": token("<|user|>", lstrip=True, special=True),
                "M": token("<think>", rstrip=True, normalized=True),
                "9999": token("fox", single_word=True),
            }
        }
    },
    "flags of known ones": {"config": {"added_tokens_decoder": {"3": token("<tool>", special=True, rstrip=True)}}},
    "a taken id": {"added_tokens_json": {"<|user|>": 3}},
    "null is absent": {"config": {"eos_token": None, "extra_special_tokens": None, "chat_template": None}},
}


@pytest.mark.parametrize("name", ROLE_TAGS)
def test_added_tokens_beside_a_tokenizer_json_as_in_transformers(tmp_path, byte_level_json, name):
    size = tokenizers.Tokenizer.from_str(byte_level_json).get_vocab_size()
    files = json.dumps(ROLE_TAGS[name]).replace('"M"', str(size + 1)).replace('"N"', str(size))
    files = json.loads(re.sub(r"(\d+): ", r'"\1": ', files))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **files.pop("config", {})}
    tok = load_tokenizer(write(tmp_path, tokenizer_json=byte_level_json, tokenizer_config_json=config, **files))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    tokens = reference.added_tokens_decoder
    assert tok.backend.added == {token.content: i for i, token in tokens.items()}
    assert tok.backend.special_ids == {i for i, token in tokens.items() if token.special}
    assert tok.eos_ids == ({reference.eos_token_id} if reference.eos_token else set())
    for text in (
        "a<|user|>b",
        "a  <|user|> <think>  b",
        " <think>\n\nx",
        "foxes fox, the end and",
        "<tool>  a",
        *CORPUS,
    ):
        assert tok.encode(text) == reference(text).input_ids
        assert tok.encode(text, special=False) == reference(text, split_special_tokens=True).input_ids


def test_sentencepiece_flags_of_added_tokens(tmp_path, llama2_model, every):
    base, size = every["sentencepiece-bpe"], len(every["sentencepiece-bpe"].backend.tokens)
    flags = ({"lstrip": True}, {"rstrip": True}, {"single_word": True}, {})
    decoder = {str(size + i): token(f"<{i}>", special=True, **flag) for i, flag in enumerate(flags)}
    config = {"added_tokens_decoder": decoder}
    tok = load_tokenizer(write(tmp_path, tokenizer_model=llama2_model, tokenizer_config_json=config))
    a, b = base.encode("a", bos=False), base.encode("b", bos=False)
    assert tok.encode("a \n<0>b", bos=False) == [*a, size, *b]
    assert tok.encode("a<1> \nb", bos=False) == [*a, size + 1, *b]
    assert tok.encode("a<2> b", bos=False).count(size + 2) == 0
    assert tok.encode("a <2>", bos=False)[-1] == size + 2
    assert tok.encode("a<3>b", bos=False) == [*a, size + 3, *b]


def test_names_of_tiktokens_special_tokens_come_from_the_config(tmp_path, tiktoken_ranks):
    n = tiktoken_ranks.count(b"\n")
    config = {"added_tokens_decoder": {str(n + 5): token("<|user|>", special=True), str(n + 6): token("<think>")}}
    tok = load_tokenizer(write(tmp_path, tokenizer_model=tiktoken_ranks, tokenizer_config_json=config))
    assert tok.encode("<|user|>", bos=False) == [n + 5] and tok.decode([n + 5]) == "<|user|>"
    assert tok.encode("<think>", bos=False, special=False) == [n + 6]
    assert (
        n + 5 not in tok.encode("<|user|>", special=False) and "<|reserved_special_token_2|>" not in tok.backend.added
    )
    assert tok.backend.added["<|eot_id|>"] == n + 9


def test_stop_ids_are_the_union(tmp_path, byte_level_json):
    files = {"special_tokens_map_json": {"eos_token": {"content": "<|end_of_text|>"}}}
    files |= {"generation_config_json": {"eos_token_id": [7, 8]}, "config_json": {"eos_token_id": 9}}
    tok = load_tokenizer(write(tmp_path, tokenizer_json=byte_level_json, tokenizer_config_json={}, **files))
    assert tok.eos_ids == {7, 8, 9, tok.backend.added["<|end_of_text|>"]}
    assert tok.stop_ids == tok.eos_ids | {tok.backend.added["<|eot_id|>"]}


def test_llama3_names_of_special_tokens(every):
    tok = every["tiktoken"]
    shift = 128256 - len(tok.backend.tokens)
    at = {name: i + shift for name, i in tok.backend.added.items()}
    assert len(at) == 256 and {i + shift for i in tok.stop_ids} == {128001, 128008, 128009}
    names = ("begin_of_text", "end_of_text", "start_header_id", "eom_id", "eot_id", "python_tag")
    assert [at[f"<|{name}|>"] for name in names] == [128000, 128001, 128006, 128008, 128009, 128010]
    assert at["<|reserved_special_token_247|>"] == 128255


@pytest.mark.parametrize("before", ["", "a", "!", "!\n", "\n \n", "1", "é"])
def test_tiktoken_reads_long_runs_of_blanks_as_its_pattern_does(monkeypatch, every, before):
    tok = every["tiktoken"]
    monkeypatch.setattr("formats.tokenizer_files.LONG_BLANKS", re.compile(LONG_BLANKS.pattern.replace("100000", "3")))
    for after in ("", "a", "!", "1", "\n", "\nx", "\r\n  y", "<|eot_id|>", "\x1c", "<|eot_id|> b"):
        for blanks in ("   ", "    ", " \t\u3000\x85 ", "\t" * 9, "   \n    ", "\x1c   "):
            text = before + blanks + after + before + blanks
            assert tok.encode(text, bos=False) == tok.backend.library.encode(text, allowed_special="all")
            assert tok.encode(text, bos=False, special=False) == tok.backend.library.encode_ordinary(text)


def test_a_million_blanks(every):
    text = "a" + " " * 1_200_000 + "b"  # of which tiktoken's own pattern would die
    assert every["tiktoken"].decode(every["tiktoken"].encode(text, bos=False)) == text


def test_tokenizer_json_is_preferred_and_content_decides(tmp_path, llama2_model, byte_level_json, tiktoken_ranks):
    both = write(tmp_path / "both", tokenizer_json=byte_level_json, tokenizer_model=llama2_model)
    assert isinstance(load_tokenizer(both).backend.library, tokenizers.Tokenizer)
    renamed = write(tmp_path / "renamed", tokenizer_model=byte_level_json)
    assert isinstance(load_tokenizer(renamed).backend.library, tokenizers.Tokenizer)
    windows = write(tmp_path / "windows", tokenizer_model=tiktoken_ranks.replace(b"\n", b"\r\n"))
    assert isinstance(load_tokenizer(windows).backend.library, tiktoken.Encoding)


# --- stop strings -----------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    chunks=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=3),
)
@example(chunks=["ab"], stops=["abc", "b"])
def test_stop_strings_cut_at_the_first_however_the_text_is_chunked(chunks, stops):
    text = "".join(chunks)
    expected = text[: min((text.find(s) for s in stops if s in text), default=len(text))]
    stop, shown, stopped = StopStrings(stops), "", False
    for chunk in chunks:
        more, stopped = stop.put(chunk)
        shown += more
        assert expected.startswith(shown)  # nothing is shown that must be taken back
        if stopped:
            break
    assert shown + stop.flush() == expected
    assert not stopped or any(s in text for s in stops)


def test_stop_strings_hold_back_no_more_than_needed():
    stop = StopStrings(["\nUser:", "END"])
    assert stop.put("Hello") == ("Hello", False)
    assert stop.put(" E") == (" ", False)
    assert stop.put("veN") == ("EveN", False)
    assert stop.put("\nUs") == ("", False)
    assert stop.put("er: hi") == ("", True)
    assert stop.put("more") == ("", True) and stop.flush() == ""
    with pytest.raises(UserError, match="stop string is empty"):
        StopStrings(["a", ""])


# --- chat -------------------------------------------------------------------------------------------------------------

TEMPLATES = {
    "llama2": """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if loop.index0 == 0 and system != false %}
{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "llama3": """\
{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +
message['role'] + '<|end_header_id|>

'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}
{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}""",
    "features": """{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for message in messages %}
    {%- if message.role == "system" %}{%- continue %}{% endif %}
    {% generation %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endgeneration -%}
{%- endfor %}
    {%- generation %} a {% endgeneration %}
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{{ {"é": "<&>'"} | tojson }}
""",
}
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": ' Why <b>? & "é"\n'}],
    [{"role": role, "content": text} for role, text in (("user", "One"), ("assistant", " Two "), ("user", "Three"))],
]
ROLES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS, ids=["one", "system", "turns"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_render_as_in_transformers(tmp_path, byte_level_json, name, chat, generation_prompt):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **ROLES, "chat_template": TEMPLATES[name]}
    tok = load_tokenizer(write(tmp_path, tokenizer_json=byte_level_json, tokenizer_config_json=config))
    reference = functools.partial(AutoTokenizer.from_pretrained(tmp_path).apply_chat_template, chat)
    expected = reference(tokenize=False, add_generation_prompt=generation_prompt)
    assert tok.render_chat(chat, generation_prompt) == expected
    ids = reference(add_generation_prompt=generation_prompt, return_dict=False)
    assert tok.encode_chat(chat, generation_prompt) == ids
    if name == "llama3":
        assert tok.encode(expected) == ids and ids.count(tok.bos_id) == 1
    if name == "features":
        extra = {"enable_thinking": False, "tools": [{"name": "f"}]}
        assert tok.render_chat(chat, **extra) == reference(tokenize=False, add_generation_prompt=True, **extra)


@pytest.mark.parametrize("chat", CHATS, ids=["one", "system", "turns"])
def test_family_templates(tmp_path, every, byte_level_json, chat):
    def expected(name: str, **names) -> str:
        options = {"chat_template": TEMPLATES[name], "add_generation_prompt": True}
        return render_jinja_template([chat], **options, **names)[0][0]

    for kind in ("sentencepiece-bpe", "llama2-json"):
        assert every[kind].render_chat(chat) == expected("llama2", bos_token="<s>", eos_token="</s>")
    for kind in ("tiktoken", "byte-level-json"):
        assert every[kind].render_chat(chat) == expected("llama3", bos_token="<|begin_of_text|>")

    chatml = tokenizers.Tokenizer.from_str(byte_level_json)
    chatml.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tok = load_tokenizer(write(tmp_path / "chatml", tokenizer_json=chatml.to_str()))
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
    assert tok.render_chat(chat) == turns + "<|im_start|>assistant\n"
    assert tok.render_chat(chat, add_generation_prompt=False) == turns


def test_llama2_chat_is_encoded_by_turns_as_in_metas_reference(every):
    tok = every["sentencepiece-bpe"]
    sp = tok.backend.library
    turns = ["[INST] <<SYS>>\nS\n<</SYS>>\n\nOne [/INST] Two ", "[INST] Three [/INST]"]
    chat = [{"role": "system", "content": "S"}, *CHATS[2]]
    assert tok.encode_chat(chat) == [1, *sp.encode(turns[0]), 2, 1, *sp.encode(turns[1])]
    with pytest.raises(UserError, match="roles must alternate"):
        tok.render_chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_where_the_chat_template_comes_from(tmp_path, byte_level_json, every):
    def render(name, template, **files):
        files |= {"tokenizer_json": byte_level_json, "tokenizer_config_json": {"chat_template": template}}
        return load_tokenizer(write(tmp_path / name, **files)).render_chat([])

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert render("string", "text") == "text"
    assert render("named", named) == "plain"
    assert render("jinja", "text", chat_template_jinja="own file") == "own file"
    for n, wrong in enumerate([[named[0], named[0]], 7, [{"name": "default"}], {"default": "x"}]):
        with pytest.raises(UserError, match=r"tokenizer_config\.json: chat_template is .* called 'default'"):
            render(f"wrong{n}", wrong)
    with pytest.raises(UserError, match="has no chat template"):
        every["metaspace-json"].render_chat(CHATS[0])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__.__base__.__subclasses__}'.format(1)() }}",
        "{{ range(10**9) | list }}",
        "{% if %}",
        "{{ raise_exception('not\nthis') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ nothing.at.all }}",
        "{% include 'file' %}",
    ],
)
def test_bad_and_hostile_templates_end_in_one_line(tmp_path, byte_level_json, template):
    folder = write(tmp_path, tokenizer_json=byte_level_json, tokenizer_config_json={"chat_template": template})
    with pytest.raises(UserError, match=r"chat template failed: .+") as error:
        load_tokenizer(folder).render_chat(CHATS[0])
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "has more than 10000000 characters"),
        ("{{ 'a' * 10**9 }}", "more than 10000000 characters|MemoryError"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}", "MemoryError"),
        ("{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}", "more than 0.3 seconds"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 10 ** (10 ** 9) }}", "more than 0.3 seconds|MemoryError"),
        ("{{ " + "(" * 500 + "}}", "failed"),
    ],
)
def test_templates_have_bounds(tmp_path, monkeypatch, byte_level_json, template, words):
    monkeypatch.setattr("formats.chat_template.MAX_SECONDS", 0.3 if "0.3" in words else 10)
    files = {"tokenizer_json": byte_level_json, "tokenizer_config_json": {"chat_template": template}}
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    start = time.monotonic()
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(write(tmp_path, **files)).render_chat(CHATS[0])
    assert time.monotonic() - start < 10 and len(str(error.value)) < 300 + len(str(tmp_path))
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert before == (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS))


def test_templates_render_in_other_threads(every):
    with ThreadPoolExecutor() as pool:
        assert pool.submit(every["tiktoken"].render_chat, CHATS[0]).result() == every["tiktoken"].render_chat(CHATS[0])


def test_a_templates_file_is_text(tmp_path, byte_level_json):
    folder = write(tmp_path, tokenizer_json=byte_level_json, chat_template_jinja=b"\xef\xbb\xbfA\r\nB")
    assert load_tokenizer(folder).render_chat([]) == "A\nB"
    write(tmp_path, chat_template_jinja=b"\xff")
    with pytest.raises(UserError, match=r"cannot read .*chat_template\.jinja as UTF-8 text"):
        load_tokenizer(folder)
    (tmp_path / "chat_template.jinja").unlink()
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not a regular file"):
        load_tokenizer(folder)


# --- bad files --------------------------------------------------------------------------------------------------------


BAD = [
    ("nothing_txt", b"", "no tokenizer in"),
    ("tokenizer_model", b"", "is not a tokenizer"),
    ("tokenizer_model", b"version https://git-lfs.github.com/spec/v1\n", "begins with b'version"),
    ("tokenizer_json", b"<!DOCTYPE html>", "is not a tokenizer"),
    ("tokenizer_json", b'{"model": 1}', "damaged or not supported"),
    ("tokenizer_json", b'{"version": "1.0", "added', "damaged or not supported"),
    ("tokenizer_json", b'{"version": "\xff"}', "damaged or not supported"),
    ("tokenizer_model", b"\n\x05garbage", "damaged or not supported"),
    ("tokenizer_model", b"AA== 0\nAQ==\n", "1 lines of 'base64 rank'"),
    ("tokenizer_model", b"AA== 0\nA*== 1\n", "1 lines of 'base64 rank'"),
    ("tokenizer_model", b"AA== 0\nAQ== 7\n", "have gaps"),
    ("tokenizer_config_json", b"{", "is not valid JSON"),
    ("tokenizer_config_json", b"[]", "holds a list"),
    ("config_json", b"\xff\xfe", "is not valid JSON"),
    ("config_json", {"eos_token_id": [1, None]}, "eos_token_id is [1, None]"),
    ("generation_config_json", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ("generation_config_json", {"eos_token_id": [-1]}, "eos_token_id is [-1]"),
    ("generation_config_json", {"eos_token_id": 10**30}, "eos_token_id is 1000"),
    ("tokenizer_config_json", {"eos_token": 7}, "eos_token is 7; accepted: a text, or an object"),
    ("tokenizer_config_json", {"bos_token": {"content": None}}, "bos_token is {'content': None}"),
    ("tokenizer_config_json", {"bos_token": {"content": "a", "lstrip": 1}}, "bos_token is {"),
    ("tokenizer_config_json", {"add_bos_token": "yes"}, "add_bos_token is 'yes'; accepted: true or false"),
    ("tokenizer_config_json", {"added_tokens_decoder": []}, "added_tokens_decoder is []"),
    ("tokenizer_config_json", {"added_tokens_decoder": {"-1": "a"}}, "added_tokens_decoder is {'-1': 'a'}"),
    ("tokenizer_config_json", {"added_tokens_decoder": {"1": None}}, "added_tokens_decoder is {'1': None}"),
    ("tokenizer_config_json", {"extra_special_tokens": "<a>"}, "extra_special_tokens is '<a>'"),
    ("tokenizer_config_json", {"chat_template": {"a": "x" * 10**5}}, "chat_template is {'a': 'xxx"),
    ("special_tokens_map_json", {"eos_token": ["</s>"]}, "eos_token is ['</s>']"),
    ("added_tokens_json", {"<a>": "1"}, "<a> is '1'; accepted: an integer"),
    ("added_tokens_json", {"<a>": -1}, "<a> is -1"),
    ("added_tokens_json", {"<a>": True}, "<a> is True"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files(tmp_path, byte_level_json, name, content, message):
    good = {} if name in ("nothing_txt", "tokenizer_model", "tokenizer_json") else {"tokenizer_json": byte_level_json}
    with pytest.raises(UserError) as error:
        load_tokenizer(write(tmp_path, **good, **{name: content}))
    path = tmp_path if name == "nothing_txt" else tmp_path / ".".join(name.rsplit("_", 1))
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(path))


def test_files_cut_short(tmp_path, llama2_model, byte_level_json, tiktoken_ranks):
    for n, data in enumerate((llama2_model, byte_level_json.encode(), tiktoken_ranks)):
        with pytest.raises(UserError, match=r"tokenizer\.model is damaged"):
            load_tokenizer(write(tmp_path / str(n), tokenizer_model=data[: len(data) // 2]))
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):  # even beside a good file
        load_tokenizer(write(tmp_path / "both", tokenizer_json='{"version"', tokenizer_model=llama2_model))

    size = tiktoken_ranks.count(b"\n") + 256
    lines = write(tmp_path / "lines", tokenizer_model=tiktoken_ranks, config_json={"vocab_size": size})
    assert len(load_tokenizer(lines).backend.tokens) == size
    write(lines, tokenizer_model=b"".join(tiktoken_ranks.splitlines(keepends=True)[:-3]))
    with pytest.raises(UserError, match=f"has {size - 3} tokens, but the model {size}: it is cut short"):
        load_tokenizer(lines)


@pytest.mark.parametrize("library", ["tokenizers", "sentencepiece", "tiktoken"])
def test_a_missing_library_is_called_missing(
    tmp_path, monkeypatch, llama2_model, byte_level_json, tiktoken_ranks, library
):
    data = {"tokenizers": byte_level_json, "sentencepiece": llama2_model, "tiktoken": tiktoken_ranks}[library]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"tokenizer\.model needs .*: pip install {library}$"):
        load_tokenizer(write(tmp_path, tokenizer_model=data))


def test_a_panic_of_a_library_is_one_line(tmp_path, monkeypatch, capfd, byte_level_json):
    class PanicException(BaseException):
        """As Rust's, which is no Exception."""

    def panic(*_):
        os.write(2, b"thread panicked at src/lib.rs\nnote: run with RUST_BACKTRACE=1\n")
        raise PanicException("range end index 14 out of range")

    monkeypatch.setattr("formats.tokenizer_files._tokenizer_json", panic)
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged .*PanicException: range end index 14"):
        load_tokenizer(write(tmp_path, tokenizer_json=byte_level_json))
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_unsupported_decoder(tmp_path, byte_level_json):
    spec = json.loads(byte_level_json) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    with pytest.raises(UserError, match=r"WordPiece.*supported are ByteLevel"):
        load_tokenizer(write(tmp_path, tokenizer_json=spec))


# --- GGUF -------------------------------------------------------------------------------------------------------------


def sentencepiece_metadata(model: bytes, **extra) -> dict:
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = list(range(sp.get_piece_size()))
    types = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in ids]
    lists = {"tokens": sp.id_to_piece(ids), "scores": sp.get_score(ids), "token_type": types}
    roles = {"bos_token_id": sp.bos_id(), "eos_token_id": sp.eos_id(), "unknown_token_id": sp.unk_id()}
    return {f"tokenizer.ggml.{key}": value for key, value in {"model": "llama", **lists, **roles, **extra}.items()}


def byte_level_metadata(byte_level_json: str, **extra) -> dict:
    spec = json.loads(byte_level_json)
    added = {token["id"]: token for token in spec["added_tokens"]}
    names = {i: t for t, i in spec["model"]["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    bos, eos, _, _, eot, _ = sorted(added)
    keys = {"model": "gpt2", "pre": "llama-bpe", "bos_token_id": bos, "eos_token_id": eos, "eot_token_id": eot}
    keys["tokens"] = [names[i] for i in sorted(names)]
    keys["token_type"] = [1 if i not in added else 3 if added[i]["special"] else 4 for i in sorted(names)]
    keys["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (keys | extra).items() if value is not None}
    return metadata | {"tokenizer.chat_template": "{{ bos_token }}T"}


def from_gguf(folder: Path, metadata: dict):
    files = gguf_tokenizer_files(metadata).items()
    return load_tokenizer(write(folder, **{name.replace(".", "_"): content for name, content in files}))


def test_gguf_byte_level(tmp_path, every, byte_level_json):
    rebuilt, original = from_gguf(tmp_path, byte_level_metadata(byte_level_json)), every["byte-level-json"]
    added = rebuilt.backend.added
    assert added == original.backend.added and rebuilt.backend.special_ids == original.backend.special_ids
    assert rebuilt.eos_ids == {added["<|end_of_text|>"], added["<|eot_id|>"]}
    assert rebuilt.render_chat([]) == "<|begin_of_text|>T"

    for text in (*CORPUS, TRICKY, "".join(added)):
        for special in (True, False):
            assert rebuilt.encode(text, special=special) == original.encode(text, special=special)


def test_gguf_files_serve_transformers_too(tmp_path, byte_level_json, llama2_model):
    for n, metadata in enumerate((byte_level_metadata(byte_level_json), sentencepiece_metadata(llama2_model))):
        tok = from_gguf(tmp_path / str(n), metadata)
        reference = AutoTokenizer.from_pretrained(tmp_path / str(n))
        for text in (*CORPUS, "", " a", "🦜 <s"):
            assert tok.encode(text) == reference(text).input_ids
            assert tok.decode(tok.encode(text), skip_special=True) == text
        assert tok.encode("a")[0] == tok.bos_id == reference.bos_token_id


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I've 1234 ab", ["I", "'ve", "Ġ1234", "Ġab"]),
        ("smollm", "I've 1234 ab", ["I", "'ve", "Ġ", "1", "2", "3", "4", "Ġab"]),
        ("starcoder", "x = 12", ["x", "Ġ=", "Ġ", "1", "2"]),
        ("llama-bpe", "I'VE 1234\n\nab", ["I", "'VE", "Ġ", "123", "4", "ĊĊ", "ab"]),
        ("qwen2", "I'VE 1234\n\nab", ["I", "'VE", "Ġ", "1", "2", "3", "4", "ĊĊ", "ab"]),
        ("tekken", "fooBar 12's", ["foo", "Bar", "Ġ", "1", "2", "'s"]),
        ("gpt-4o", "fooBar's 1234", ["foo", "Bar's", "Ġ", "123", "4"]),
    ],
)
def test_gguf_pre_tokenizers(byte_level_json, pre, text, words):
    files = gguf_tokenizer_files(byte_level_metadata(byte_level_json, pre=pre))
    split = tokenizers.Tokenizer.from_str(files["tokenizer.json"]).pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in split] == words


def test_gguf_bos(tmp_path, byte_level_json):
    for pre, add, expected in (("llama-bpe", None, 1), ("qwen2", None, 0), ("qwen2", True, 1), ("llama-bpe", False, 0)):
        tok = from_gguf(tmp_path, byte_level_metadata(byte_level_json, pre=pre, add_bos_token=add))
        assert tok.encode("dog").count(tok.bos_id) == expected


def test_gguf_sentencepiece_without_space_prefix(tmp_path, llama2_model, every):
    tok = from_gguf(tmp_path, sentencepiece_metadata(llama2_model, add_space_prefix=False))
    assert tok.decode(tok.encode(" the dog", bos=False)) == " the dog"
    assert tok.encode(" the") == every["sentencepiece-bpe"].encode("the")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "martian"}, "'martian'; supported are default, gpt-2"),
        ({"model": "t5"}, "'t5'; supported are 'gpt2' and 'llama'"),
        ({"model": None}, "None; supported are"),
        ({"tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"merges": None}, "has no tokenizer.ggml.merges"),
        ({"model": "llama"}, "has no tokenizer.ggml.scores"),
        ({"token_type": [1]}, "differ in length"),
        ({"bos_token_id": 10**6}, "outside its"),
    ],
)
def test_gguf_errors(byte_level_json, change, message):
    with pytest.raises(UserError) as error:
        gguf_tokenizer_files(byte_level_metadata(byte_level_json, **change))
    assert message in str(error.value)


# --- the real model ---------------------------------------------------------------------------------------------------


def test_smollm2_reproduces_the_oracle(smollm2_dir):
    tok = load_tokenizer(smollm2_dir)
    oracle = json.loads((Path(__file__).parent / "data" / "smollm2_135m_instruct.json").read_text())
    for case in oracle["prompts"]:
        assert tok.encode(case["prompt"]) == case["prompt_ids"]
        assert tok.decode(case["greedy_ids"]) == case["text"]
        stream = StreamDecoder(tok, case["prompt_ids"])
        assert "".join(map(stream.put, case["greedy_ids"])) + stream.flush() == case["text"]
        assert not tok.stop_ids & set(case["greedy_ids"][:-1])
    assert len(tok.backend.tokens) == 49152 and tok.eos_ids == {2} and not tok.add_bos


def test_smollm2_agrees_with_transformers(smollm2_dir):
    tok, reference = load_tokenizer(smollm2_dir), AutoTokenizer.from_pretrained(smollm2_dir)
    rng = random.Random(0)
    for text in (*CORPUS, *("".join(rng.choices(TRICKY + CORPUS[4], k=30)) for _ in range(200))):
        assert tok.encode(text) == reference(text).input_ids
        assert tok.decode(tok.encode(text)) == text
    for chat in CHATS:
        assert tok.render_chat(chat) == reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
