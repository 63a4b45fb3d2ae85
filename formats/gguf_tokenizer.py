"""The tokenizer inside a GGUF, rebuilt as the files of a Hugging Face directory.

Specification: the keys tokenizer.ggml.* in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what their values
mean is told by llama.cpp's src/llama-vocab.cpp.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errors import UserError, shown
from formats.fields import flag, integer, list_of, number, read, text
from formats.tokenizer_files import LLAMA3_SPLIT


@dataclass(frozen=True)
class _PreTokenizer:
    """How text is split before byte-level BPE."""

    pattern: str | None = None  # None is GPT-2's
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False  # a word that is in the vocabulary is one token, merges or not
    adds_bos: bool = False  # unless the file says


_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"  # split where case rises
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
_TEKKEN_SPLIT = "|".join([_WORD % ("*", "+"), _WORD % ("+", "*"), r"\p{N}"]) + _REST
_O200K_SPLIT = _CONTRACTION.join([_WORD % ("*", "+"), _WORD % ("+", "*"), r"\p{N}{1,3}"]) + _REST

# llama.cpp's names (tokenizer.ggml.pre) for the pre-tokenizers of Llama-like models.
GGUF_PRE_TOKENIZERS = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt"), _PreTokenizer()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _PreTokenizer(single_digits=True)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3"), _PreTokenizer(LLAMA3_SPLIT, ignore_merges=True, adds_bos=True)
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _PreTokenizer(LLAMA3_SPLIT)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _PreTokenizer(LLAMA3_SPLIT.replace("{1,3}", ""), nfc=True)),
    "tekken": _PreTokenizer(_TEKKEN_SPLIT, ignore_merges=True, adds_bos=True),
    "gpt-4o": _PreTokenizer(_O200K_SPLIT),
}
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ENDS = ("eos", "eot", "eom")
KEYS = {
    "model": text(default=None),
    "pre": text(default=""),
    "tokens": list_of(text(), default=None),
    "token_type": list_of(integer(0, 100), default=None),
    "merges": list_of(text(), default=None),
    "scores": list_of(number(-1e38, 1e38), default=None),
    "add_bos_token": flag(default=None),
    "add_space_prefix": flag(default=True),
    **dict.fromkeys((f"{role}_token_id" for role in (*_ROLES.values(), *_ENDS)), integer(0, default=None)),
}
_TEMPLATE = {"tokenizer.chat_template": text(default=None)}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type


def gguf_tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and generation_config.json (name -> content) for the tokenizer in a GGUF.

    metadata: the GGUF's key/values as plain Python values. Supported are byte-level BPE (tokenizer.ggml.model "gpt2")
    and SentencePiece BPE ("llama"). Raises UserError for others, for an unknown pre-tokenizer and for missing keys.
    """
    values = read("the GGUF", {f"tokenizer.ggml.{key}": field for key, field in KEYS.items()}, metadata)
    given = dict(zip(KEYS, values.values()))
    kind, pre = given["model"], given["pre"] or "default"
    needed = {"gpt2": ("tokens", "token_type", "merges"), "llama": ("tokens", "token_type", "scores")}
    if kind not in needed:
        raise UserError(f"the GGUF's tokenizer.ggml.model is {shown(kind)}; supported are 'gpt2' and 'llama'")
    if missing := [f"tokenizer.ggml.{key}" for key in needed[kind] if given[key] is None]:
        raise UserError(f"the GGUF has no {', '.join(missing)}; its tokenizer cannot be rebuilt")
    if kind == "gpt2" and pre not in GGUF_PRE_TOKENIZERS:
        known = ", ".join(GGUF_PRE_TOKENIZERS)
        raise UserError(f"the GGUF's tokenizer.ggml.pre is {shown(pre)}; supported are {known}")
    tokens, types = given["tokens"], given["token_type"]
    if len(types) != len(tokens) or (kind == "llama" and len(given["scores"]) != len(tokens)):
        raise UserError("the GGUF's tokenizer.ggml.tokens, token_type and scores differ in length")
    told = {key: given[f"{key}_token_id"] for key in (*_ROLES.values(), *_ENDS)}
    if wrong := {key: i for key, i in told.items() if i is not None and i >= len(tokens)}:
        raise UserError(f"the GGUF's token ids {shown(wrong)} are outside its {len(tokens)} tokens")
    ids = {role: told[key] for role, key in _ROLES.items() if told[key] is not None}

    if kind == "gpt2":
        pipeline = _byte_level_bpe(tokens, given["merges"], GGUF_PRE_TOKENIZERS[pre])
    else:
        pipeline = _sentencepiece_bpe(tokens, types, given["scores"], given["add_space_prefix"])
    adds_bos = given["add_bos_token"]
    adds_bos = (kind == "llama" or GGUF_PRE_TOKENIZERS[pre].adds_bos) if adds_bos is None else adds_bos
    adds_bos = adds_bos and "bos_token" in ids
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": t != _USER_DEFINED}
        for i, (token, t) in enumerate(zip(tokens, types))
        if t in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    names = {role: tokens[i] for role, i in ids.items()}
    post = _bos_post_processor(names["bos_token"], ids["bos_token"]) if adds_bos else None
    shape = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": post}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": adds_bos, **names}
    if template := read("the GGUF", _TEMPLATE, metadata)["tokenizer.chat_template"]:
        config["chat_template"] = template
    generation = {"eos_token_id": sorted({told[key] for key in _ENDS if told[key] is not None})}
    if "bos_token" in ids:
        generation["bos_token_id"] = ids["bos_token"]
    files = {"tokenizer": shape | pipeline, "tokenizer_config": config, "generation_config": generation}
    return {f"{name}.json": json.dumps(value, ensure_ascii=False, indent=1) + "\n" for name, value in files.items()}


def _byte_level_bpe(tokens: list[str], merges: Sequence[str], pre: _PreTokenizer) -> dict:
    """GPT-2's tokenizer in tokenizer.json's terms."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not pre.pattern}
    steps = [byte_level]
    if pre.single_digits:
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    if pre.pattern:
        steps.insert(0, {"type": "Split", "pattern": {"Regex": pre.pattern}, "behavior": "Isolated", "invert": False})
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := [merge for merge, pair in zip(merges, pairs) if len(pair) != 2]:
        raise UserError(f"the GGUF's tokenizer.ggml.merges holds {shown(wrong[0])}; two parts with a space are needed")
    # To llama.cpp one that makes no token is of no effect, to the tokenizers library an error.
    known = [pair for pair in pairs if {*pair, "".join(pair)} <= vocab.keys()]
    return {
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": known, "ignore_merges": pre.ignore_merges},
    }


def _sentencepiece_bpe(tokens: list[str], types: list[int], scores: Sequence[float], space_prefix: bool) -> dict:
    """SentencePiece's BPE in tokenizer.json's terms.

    SentencePiece joins the two neighbours whose joined piece scores best. So each split of a piece into two pieces is a
    merge, and the score of the whole ranks it.
    """
    normal = {token for token, t in zip(tokens, types) if t == _NORMAL}
    by_score = sorted((i for i, t in enumerate(types) if t == _NORMAL), key=lambda i: -scores[i])
    splits = ((tokens[i][:k], tokens[i][k:]) for i in by_score for k in range(1, len(tokens[i])))
    to_mark = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    to_text = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if space_prefix:
        to_mark.insert(0, {"type": "Prepend", "prepend": "▁"})
        to_text.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    bpe = {
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [(left, right) for left, right in splits if left in normal and right in normal],
        "unk_token": next((token for token, t in zip(tokens, types) if t == _UNKNOWN), None),
    }
    return {
        "normalizer": {"type": "Sequence", "normalizers": to_mark},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": to_text},
        "model": {"type": "BPE", **bpe, "fuse_unk": True, "byte_fallback": True},
    }


def _bos_post_processor(token: str, token_id: int) -> dict:
    """Put BOS before a text, and before each of a pair."""
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokens = {"special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}}}
    return {"type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, bos, second], **tokens}
