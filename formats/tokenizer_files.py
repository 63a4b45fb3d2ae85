"""Files of tokenizers: tokenizer.json, SentencePiece's and tiktoken's tokenizer.model.

Three libraries are reduced to the same two things: text to ids, and the bytes of each token. Only the one that a file
asks for is loaded. Specifications: https://huggingface.co/docs/tokenizers, sentencepiece_model.proto of
https://github.com/google/sentencepiece, llama/tokenizer.py of https://github.com/meta-llama/llama3.
"""

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError, read_json

# The split pattern of Llama 3's reference tokenizer. Qwen 2 differs only in taking one digit at a time.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The 256 tokens after Llama 3's ranks, by their names since 3.1. In 3.0 only reserved ones were called differently.
LLAMA3_SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)

TIKTOKEN_LINE = re.compile(rb"^([A-Za-z0-9+/]+={0,2}) (\d+)\r?$", re.MULTILINE)

# The bytes that GPT-2 spells with characters from U+0100 on, as they do not print.
STAND_INS = dict(enumerate([*range(0x21), *range(0x7F, 0xA1), 0xAD], 0x100))


@dataclass
class Backend:
    """What each tokenizer library is reduced to."""

    library: Any
    encode: Callable[[str, bool], list[int]]  # text and `special`, as in Tokenizer.encode; without BOS
    tokens: dict[int, bytes]  # each token inside a text
    added: dict[str, int]  # those matched whole before text is split: BOS, end of turn, ...
    special_ids: frozenset[int]  # and those of them that are control, not text
    roles: dict[str, str]  # bos_token, eos_token, as far as the tokenizer's file tells
    strips_space: bool = False  # encoding puts a space before the text, so decoding drops one
    adds_bos: bool | None = None  # None: the config decides

    def __post_init__(self):
        self.tokens |= {i: name.encode() for name, i in self.added.items()}


def load_backend(folder: Path, config: Mapping[str, Any]) -> Backend:
    """The backend that the content of the tokenizer's file asks for. config: that of tokenizer_config.json."""
    path = next((p for p in (folder / "tokenizer.json", folder / "tokenizer.model") if p.is_file()), None)
    if path is None:
        accepted = "tokenizer.json, or tokenizer.model (SentencePiece, or Llama 3's tiktoken ranks)"
        raise UserError(f"no tokenizer in {folder}; expected {accepted}")
    data = path.read_bytes()
    extra, model = (read_json(folder / name, missing={}) for name in ("added_tokens.json", "config.json"))
    try:
        if data.lstrip()[:1] == b"{":
            return _tokenizer_json(data)
        if TIKTOKEN_LINE.match(data):
            return _tiktoken(data, model.get("vocab_size", 0))
        if data[:1] == b"\n":  # the tag of the protobuf's first field, its pieces
            added = config.get("added_tokens_decoder") or {}
            return _sentencepiece(data, {token_text(token): int(i) for i, token in added.items()} | extra)
    except Exception as error:  # the libraries do not say what they raise for a bad file
        raise UserError(f"{path} is damaged or not supported: {error!r}") from error
    accepted = "a tokenizer.json of the tokenizers library, a SentencePiece model or tiktoken ranks"
    raise UserError(f"{path} is not a tokenizer: it begins with {data[:20]!r}; expected {accepted}")


def token_text(value: object) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _tokenizer_json(data: bytes) -> Backend:
    """tokenizer.json, through the `tokenizers` library."""
    import tokenizers

    library = tokenizers.Tokenizer.from_buffer(data)
    library.no_truncation()
    library.no_padding()
    decoder = repr(library.decoder)
    if "ByteLevel" not in decoder and "▁" not in decoder:
        raise ValueError(f"its decoder is {decoder}; supported are ByteLevel, and those that make '▁' a space")
    to_bytes = _byte_level if "ByteLevel" in decoder else _spelled
    added = library.get_added_tokens_decoder()
    whole, body = (library.encode("a", add_special_tokens=flag).tokens for flag in (True, False))
    adds_bos = whole[:1] != body[:1]

    def encode(text: str, special: bool) -> list[int]:
        library.encode_special_tokens = not special
        return library.encode(text, add_special_tokens=False).ids

    return Backend(
        library,
        encode,
        tokens={i: to_bytes(token) for token, i in library.get_vocab().items()},
        added={token.content: i for i, token in added.items()},
        special_ids=frozenset(i for i, token in added.items() if token.special),
        roles={"bos_token": whole[0]} if adds_bos else {},
        strips_space=body[0].startswith("▁"),
        adds_bos=adds_bos,
    )


def _sentencepiece(data: bytes, extra: Mapping[str, int]) -> Backend:
    """SentencePiece's tokenizer.model. The library never reads control tokens in text; here the text is split at them.

    Each part gets its own leading space, as in Meta's reference code for Llama 2, which encodes each turn by itself.
    """
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = library.id_to_piece(list(range(library.get_piece_size())))
    added = {piece: i for i, piece in enumerate(pieces) if library.is_control(i)} | extra
    names = sorted(added, key=len, reverse=True)  # the longer wins where one begins another
    split = re.compile(f"({'|'.join(map(re.escape, names))})" if names else r"(?!)")
    roles = {"bos_token": library.bos_id(), "eos_token": library.eos_id()}

    def encode(text: str, special: bool) -> list[int]:
        parts = enumerate(split.split(text) if special else [text])  # text, token, text, token, ..., text
        return [i for n, part in parts for i in ([added[part]] if n % 2 else library.encode(part))]

    return Backend(
        library,
        encode,
        tokens={i: _spelled(piece) for i, piece in enumerate(pieces)},
        added=added,
        special_ids=frozenset(added.values()),
        roles={role: pieces[i] for role, i in roles.items() if i >= 0},
        strips_space=pieces[library.encode("a")[0]].startswith("▁"),
    )


def _tiktoken(data: bytes, vocab_size: int) -> Backend:
    """Llama 3's tokenizer.model: lines of `base64(bytes) rank`, then 256 special tokens that the file does not name."""
    import tiktoken

    ranks = {base64.b64decode(token): int(rank) for token, rank in TIKTOKEN_LINE.findall(data)}
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError(f"its {len(ranks)} lines of 'base64 rank' have gaps or lack some of the 256 bytes")
    added = {token: len(ranks) + i for i, token in enumerate(LLAMA3_SPECIALS)}
    library = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=added)
    if library.n_vocab < vocab_size:
        raise ValueError(f"it has {library.n_vocab} tokens, but the model {vocab_size}: it is cut short")

    def encode(text: str, special: bool) -> list[int]:
        return library.encode(text, allowed_special="all") if special else library.encode_ordinary(text)

    return Backend(
        library,
        encode,
        tokens={rank: token for token, rank in ranks.items()},
        added=added,
        special_ids=frozenset(added.values()),
        roles={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    )


def _spelled(token: str) -> bytes:
    """A token's bytes, from SentencePiece's spelling."""
    return bytes.fromhex(token[3:5]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else token.replace("▁", " ").encode()


def _byte_level(token: str) -> bytes:
    """A token's bytes, from GPT-2's spelling: printable Latin-1 is itself, other bytes count up from U+0100."""
    return token.translate(STAND_INS).encode("latin-1", "replace")
