"""Files of tokenizers: tokenizer.json, SentencePiece's and tiktoken's tokenizer.model, and the JSON files around them.

Three libraries are reduced to the same two things: text to ids, and the bytes of each token. Only the one that a file
asks for is loaded. Specifications: https://huggingface.co/docs/tokenizers, sentencepiece_model.proto of
https://github.com/google/sentencepiece, llama/tokenizer.py of https://github.com/meta-llama/llama3.
"""

import base64
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errors import UserError
from formats import fields
from process.files import read_json

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

# A run of blanks so long that tiktoken's regular expressions, which remember each of them, may end in a panic. The
# classes are \s without line ends, and without what is no blank in Rust.
LONG_BLANKS = re.compile(r"(?<![^\S\r\n\x1c-\x1f])[^\S\r\n\x1c-\x1f]{100000,}")

TIKTOKEN_LINE = re.compile(rb"^([A-Za-z0-9+/]+={0,2}) (\d+)\r?$", re.MULTILINE)

# The bytes that GPT-2 spells with characters from U+0100 on, as they do not print.
STAND_INS = dict(enumerate([*range(0x21), *range(0x7F, 0xA1), 0xAD], 0x100))


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched whole, before text is split. The fields are those of the tokenizers library."""

    content: str
    special: bool = False  # control, not text
    lstrip: bool = False  # takes the blanks before it along,
    rstrip: bool = False  # and those behind it
    single_word: bool = False  # not within a word
    normalized: bool | None = None  # matched in normalized text; None: unless it is special


def _added_token(value: Any) -> AddedToken:
    value = value if isinstance(value, dict) else {"content": value}
    table = {key: fields.flag(default=None) for key in AddedToken.__dataclass_fields__} | {"content": fields.text()}
    try:
        read = fields.read("", table, value)
    except UserError:
        raise ValueError from None
    return AddedToken(**{key: value for key, value in read.items() if value is not None})


def _by_id(value: Any) -> dict[int, AddedToken]:
    if not isinstance(value, dict) or not all(key.isdecimal() and len(key) < 10 for key in value):
        raise ValueError
    return {int(key): _added_token(token) for key, token in value.items()}


def _by_name(value: Any) -> dict[str, AddedToken]:
    if not isinstance(value, dict):
        raise ValueError
    return {key: _added_token(token) for key, token in value.items()}


def _default_template(value: Any) -> str:
    if isinstance(value, list):
        value = next((v.get("template") for v in value if isinstance(v, dict) and v.get("name") == "default"), None)
    if not isinstance(value, str):
        raise ValueError
    return value


TOKEN = fields.Field("a text, or an object with a text as content", _added_token, default=None)
EXTRA = fields.either(fields.list_of(TOKEN), fields.Field("an object of such", _by_name), default=())
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SPECIAL_TOKENS = dict.fromkeys(ROLES, TOKEN) | {"additional_special_tokens": EXTRA, "extra_special_tokens": EXTRA}
TOKENIZER_CONFIG = SPECIAL_TOKENS | {
    "added_tokens_decoder": fields.Field("an object of tokens by id", _by_id, default=None),
    "add_bos_token": fields.flag(default=None),
    "chat_template": fields.Field("a text, or a list of named ones with one called 'default'", _default_template, None),
}
ID = fields.integer(0)
EOS_IDS = fields.either(ID, fields.list_of(ID), default=())


@dataclass
class TokenizerConfig:
    """What tokenizer_config.json and the older files beside it say."""

    roles: dict[str, AddedToken]  # bos_token, eos_token, ..., and what a model has of its own
    extra: list[AddedToken]  # special tokens without a role
    declared: dict[int, AddedToken]  # tokens by their ids
    overrides: bool  # whether these go before a tokenizer.json's own
    add_bos: bool | None
    chat_template: str | None

    def added(self, own: Mapping[int, str]) -> Iterator[tuple[int | None, AddedToken]]:
        """What to add, in order, to a tokenizer of `own` added tokens: ids, None where none is declared, and tokens."""
        roles, known = {token.content for token in self.roles.values()}, set(own.values())
        for i, token in sorted(self.declared.items()):
            if self.overrides or i not in own:
                known.add(token.content)
                yield i, replace(token, special=token.special or token.content in roles)
        for token in (*self.roles.values(), *self.extra):
            if token.content not in known:
                known.add(token.content)
                yield None, replace(token, special=True)


def read_config(folder: Path) -> TokenizerConfig:
    """The files that transformers reads, in its order: where tokenizer_config.json has no added_tokens_decoder,
    special_tokens_map.json goes before it, and added_tokens.json names the tokens. What is not there says nothing.
    """
    path = folder / "tokenizer_config.json"
    values = read_json(path, missing={})
    config = fields.read(path, TOKENIZER_CONFIG, values)
    legacy = config["added_tokens_decoder"] is None
    if legacy:
        path = folder / "special_tokens_map.json"
        older = read_json(path, missing={})
        values = values | older
        config |= {key: token for key, token in fields.read(path, SPECIAL_TOKENS, older).items() if token}
    roles = {key: config[key] for key in ROLES if config[key]}
    roles |= {k: AddedToken(v) for k, v in values.items() if k.endswith("_token") and k not in ROLES and type(v) is str}
    extra = config["extra_special_tokens"] or config["additional_special_tokens"]
    if isinstance(extra, dict):
        roles, extra = roles | extra, ()
    declared = config["added_tokens_decoder"] or {}
    if legacy:
        path = folder / "added_tokens.json"
        ids = {token: fields.read_one(path, token, ID, i) for token, i in read_json(path, missing={}).items()}
        special = {token.content for token in (*roles.values(), *extra)}
        declared = {i: AddedToken(token, special=token in special) for token, i in ids.items()}
    return TokenizerConfig(roles, list(extra), declared, not legacy, config["add_bos_token"], config["chat_template"])


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


def load_backend(folder: Path, config: TokenizerConfig) -> Backend:
    """The backend that the content of the tokenizer's file asks for, with the tokens that `config` adds."""
    path = next((p for p in (folder / "tokenizer.json", folder / "tokenizer.model") if p.is_file()), None)
    if path is None:
        accepted = "tokenizer.json, or tokenizer.model (SentencePiece, or Llama 3's tiktoken ranks)"
        raise UserError(f"no tokenizer in {folder}; expected {accepted}")
    data = path.read_bytes()
    with _panics_are_errors(path):
        if data.lstrip()[:1] == b"{":
            return _tokenizer_json(data, config)
        if TIKTOKEN_LINE.match(data):
            return _tiktoken(data, config, folder / "config.json")
        if data[:1] == b"\n":  # the tag of the protobuf's first field, its pieces
            return _sentencepiece(data, config)
    accepted = "a tokenizer.json of the tokenizers library, a SentencePiece model or tiktoken ranks"
    raise UserError(f"{path} is not a tokenizer: it begins with {data[:20]!r}; expected {accepted}")


@contextmanager
def _panics_are_errors(path: Path) -> Iterator[None]:
    """Around the libraries, which do not say what they raise for a bad file, and of which those in Rust panic now and
    then: that is no Exception, and has lines of its own on stderr.
    """
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{path} needs the library {error.name}: pip install {error.name}") from None
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"{path} is damaged or not supported: {reason}") from error
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _with_added(
    own: dict[int, AddedToken], config: TokenizerConfig, pieces: Mapping[str, int]
) -> dict[int, AddedToken]:
    """The added tokens by id of a library that has `own` ones, and these pieces: what has no id gets the next one."""
    found = dict(own)
    for i, token in config.added({i: token.content for i, token in own.items()}):
        following = max([len(pieces) - 1, *found]) + 1
        i = pieces.get(token.content, following) if i is None else i
        same = i in own and own[i].content == token.content  # what the library calls control stays control
        found[i] = replace(token, special=token.special or same)
    return found


def _splitter(tokens: Iterable[AddedToken]) -> Callable[[str], list[str]]:
    """Cuts text at added tokens: text, token, text, token, ..., text."""
    known = {token.content: token for token in tokens if token.content}
    names = sorted(known, key=len, reverse=True)  # the longer wins where one begins another
    patterns = (rf"(?<!\w){re.escape(n)}(?!\w)" if known[n].single_word else re.escape(n) for n in names)
    pattern = re.compile(f"({'|'.join(patterns)})" if names else r"(?!)")

    def split(text: str) -> list[str]:
        parts = pattern.split(text)
        for n in range(1, len(parts), 2):
            if known[parts[n]].lstrip:
                parts[n - 1] = parts[n - 1].rstrip()
            if known[parts[n]].rstrip:
                parts[n + 1] = parts[n + 1].lstrip()
        return parts

    return split


def _split_encoder(
    added: dict[int, AddedToken], encode: Callable[[str], list[int]]
) -> Callable[[str, bool], list[int]]:
    """Backend.encode of a library that encodes text alone: added tokens are found here."""
    ids = {token.content: i for i, token in added.items()}
    splits = {
        special: _splitter(token for token in added.values() if special or not token.special)
        for special in (True, False)
    }

    def whole(text: str, special: bool) -> list[int]:
        parts = enumerate(splits[special](text))
        return [i for n, part in parts for i in ([ids[part]] if n % 2 else encode(part))]

    return whole


def _tokenizer_json(data: bytes, config: TokenizerConfig) -> Backend:
    """tokenizer.json, through the `tokenizers` library."""
    import tokenizers

    library = tokenizers.Tokenizer.from_buffer(data)
    library.no_truncation()
    library.no_padding()
    decoder = repr(library.decoder)
    if "ByteLevel" not in decoder and "▁" not in decoder:
        raise ValueError(f"its decoder is {decoder}; supported are ByteLevel, and those that make '▁' a space")
    to_bytes = _byte_level if "ByteLevel" in decoder else _spelled
    own = {i: token.content for i, token in library.get_added_tokens_decoder().items()}
    for _, token in config.added(own):  # the library gives those that are new the next id
        normalized = not token.special if token.normalized is None else token.normalized
        library.add_tokens([tokenizers.AddedToken(**vars(token) | {"normalized": normalized})])
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


def _sentencepiece(data: bytes, config: TokenizerConfig) -> Backend:
    """SentencePiece's tokenizer.model. The library never reads control tokens in text; here the text is split at them.

    Each part gets its own leading space, as in Meta's reference code for Llama 2, which encodes each turn by itself.
    """
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = library.id_to_piece(list(range(library.get_piece_size())))
    own = {i: AddedToken(piece, special=True) for i, piece in enumerate(pieces) if library.is_control(i)}
    added = _with_added(own, config, {piece: i for i, piece in enumerate(pieces)})
    roles = {"bos_token": library.bos_id(), "eos_token": library.eos_id()}
    return Backend(
        library,
        _split_encoder(added, library.encode),
        tokens={i: _spelled(piece) for i, piece in enumerate(pieces)},
        added={token.content: i for i, token in added.items()},
        special_ids=frozenset(i for i, token in added.items() if token.special),
        roles={role: pieces[i] for role, i in roles.items() if i >= 0},
        strips_space=pieces[library.encode("a")[0]].startswith("▁"),
    )


def _tiktoken(data: bytes, config: TokenizerConfig, model: Path) -> Backend:
    """Llama 3's tokenizer.model: lines of `base64(bytes) rank`, then 256 special tokens that the file does not name."""
    import tiktoken

    ranks = {base64.b64decode(token): int(rank) for token, rank in TIKTOKEN_LINE.findall(data)}
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError(f"its {len(ranks)} lines of 'base64 rank' have gaps or lack some of the 256 bytes")
    own = {len(ranks) + i: AddedToken(token, special=True) for i, token in enumerate(LLAMA3_SPECIALS)}
    added = _with_added(own, config, {})
    names = {token.content: i for i, token in added.items()}
    library = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=names)
    vocab_size = fields.read_one(
        model, "vocab_size", fields.integer(default=0), read_json(model, missing={}).get("vocab_size")
    )
    if library.n_vocab < vocab_size:
        raise ValueError(f"it has {library.n_vocab} tokens, but the model {vocab_size}: it is cut short")

    def encode(text: str) -> list[int]:
        """As the library would. A long run of blanks that ends a text, or is followed by more than a line end, is one
        piece for LLAMA3_SPLIT, but for the last of them before other text.
        """
        ids, done = [], 0
        for run in LONG_BLANKS.finditer(text):
            if text[run.end() : run.end() + 1] not in ("\r", "\n"):
                end = run.end() - (run.end() < len(text))
                ids += library.encode_ordinary(text[done : run.start()])
                ids += library._encode_single_piece(text[run.start() : end])
                done = end
        return ids + library.encode_ordinary(text[done:])

    return Backend(
        library,
        _split_encoder(added, encode),
        tokens={rank: token for token, rank in ranks.items()},
        added=names,
        special_ids=frozenset(i for i, token in added.items() if token.special),
        roles={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    )


def _spelled(token: str) -> bytes:
    """A token's bytes, from SentencePiece's spelling."""
    return bytes.fromhex(token[3:5]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else token.replace("▁", " ").encode()


def _byte_level(token: str) -> bytes:
    """A token's bytes, from GPT-2's spelling: printable Latin-1 is itself, other bytes count up from U+0100."""
    return token.translate(STAND_INS).encode("latin-1", "replace")
