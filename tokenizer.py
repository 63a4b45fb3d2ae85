"""Text to token ids and back: tokenizer.json, SentencePiece and tiktoken files behind one interface.

Three libraries are reduced to the same two things: text to ids, and the bytes of each token. The rest (BOS, stop ids,
decoding, streaming, chat templates) is written once, on top.

Decoding is defined on bytes: all tokens' bytes, joined, are read as UTF-8, with U+FFFD for what is not. On valid text
the libraries do the same; on invalid byte tokens they differ, and some take back characters that were already certain.
"""

import base64
import codecs
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import sentencepiece
import tiktoken
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from errors import UserError, read_json

# Tokens that end a turn or a text in some family. Generation stops at those that a vocabulary has as added tokens,
# whatever the configs say: many fine-tunes list only their base model's end of text.
END_TOKENS = (
    *("</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>"),
    *("<end_of_turn>", "<|end_of_turn|>", "<end_of_utterance>", "<|return|>"),
)

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

# How a family, told by one of its tokens, chats when its files bring no template: ChatML, Llama 3, Llama 2.
FAMILY_TEMPLATES = {
    "<|im_start|>": """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "<|start_header_id|>": """\
{% set header = '<|start_header_id|>%s<|end_header_id|>\n\n' %}{{ bos_token }}
{%- for m in messages %}{{ header % m['role'] + m['content'] | trim + '<|eot_id|>' }}{% endfor %}
{% if add_generation_prompt %}{{ header % 'assistant' }}{% endif %}""",
    "</s>": """\
{% if messages[0]['role'] == 'system' %}
{% set system, messages = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n', messages[1:] %}
{% endif %}
{% for m in messages %}
{% if m['role'] != ('user', 'assistant')[loop.index0 % 2] %}
{{ raise_exception('roles must alternate user, assistant, user, ... after an optional system message') }}
{% elif m['role'] == 'user' %}
{{- bos_token + '[INST] ' + ((loop.first and system or '') + m['content']) | trim + ' [/INST]' -}}
{% else %}
{{- ' ' + m['content'] | trim + ' ' + eos_token -}}
{% endif %}
{% endfor %}""",
}


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


def _tokenizer_json(data: bytes) -> Backend:
    """tokenizer.json, through the `tokenizers` library."""
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


@dataclass(eq=False)
class Tokenizer:
    """One model's tokenizer; `load_tokenizer` makes it."""

    name: str  # for messages
    backend: Backend
    bos_id: int | None  # beginning of text
    add_bos: bool  # whether this model's prompts begin with it
    eos_ids: frozenset[int]  # ends that the checkpoint's configs name
    stop_ids: frozenset[int]  # where generation ends: eos_ids, and END_TOKENS that the vocabulary has
    chat_template: str | None  # Jinja source, the model's own or its family's
    template_tokens: Mapping[str, str]  # bos_token, eos_token, ... for the template

    def encode(self, text: str, bos: bool = True, special: bool = True) -> list[int]:
        """Token ids of `text`.

        bos: begin with BOS if this model's own tokenizer would (SmolLM2's and Qwen's do not); never a second one.
        special: read `<|im_end|>` and its like as the tokens they name, as transformers and llama.cpp read a prompt.
        False spells them as ordinary text, for text from a stranger; added tokens that tokenizer.json itself declares
        not special (Qwen's `<tool_call>`), and SentencePiece's user-defined pieces, are text and match either way.
        """
        # The libraries refuse lone surrogates, and that is what Python makes of invalid UTF-8 on a command line.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self.backend.encode(text, special)
        return [self.bos_id, *ids] if bos and self.add_bos and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`. Special tokens appear under their names, or not at all with `skip_special`.

        Where encoding puts a space before the text (SentencePiece), one is dropped. An id without a token is U+FFFD.
        """
        stream = StreamDecoder(self, skip_special=skip_special)
        return stream.put(ids) + stream.flush()

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a chat by the model's template, or its family's.

        messages: {"role": "system" | "user" | "assistant", "content": text}, in order. variables: what else the
        template reads, such as Qwen3's `enable_thinking`. Raises UserError where there is no template, or it fails.
        """
        if self.chat_template is None:
            raise UserError(f"{self.name} has no chat template in tokenizer_config.json or chat_template.jinja")
        names = {"tools": None, "documents": None, **self.template_tokens, **variables}
        try:
            template = _compile_template(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **names)
        except Exception as error:  # a template is the checkpoint's own code and can raise anything
            raise UserError(f"{self.name}: the chat template failed: {error!r}") from error

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Token ids of a chat. BOS is the template's business alone, as in transformers' apply_chat_template."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables), bos=False)


class StreamDecoder:
    """Decode ids as they come; the pieces, joined, are `decode` of all the ids. Constant work per token.

    prompt: the ids before. With them, the pieces continue the prompt's text, and a leading space stays; without them
    they are a text of their own, like an answer in a chat.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), skip_special: bool = False):
        self._backend = tokenizer.backend
        self._skip_special = skip_special
        self._at_start = tokenizer.backend.strips_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.put(prompt[-8:])  # enough: the last character spans at most four tokens

    def put(self, ids: int | Iterable[int]) -> str:
        """The text that `ids` make certain: a character comes once all its bytes have."""
        return "".join([self._utf8.decode(self._bytes(i)) for i in ([ids] if isinstance(ids, int) else ids)])

    def flush(self) -> str:
        """The end: U+FFFD if the text breaks off inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        data = self._backend.tokens.get(token_id, "\ufffd".encode())
        if token_id in self._backend.special_ids:
            return b"" if self._skip_special else data
        at_start, self._at_start = self._at_start, False
        return data.removeprefix(b" ") if at_start else data


class StopStrings:
    """End a streamed text where the first of `strings` begins, however the text is cut into pieces.

    The text let through, joined, is `text[:i]` with i the lowest index at which any of them begins. Text that may yet
    turn out to begin a stop string is held back.
    """

    def __init__(self, strings: Iterable[str]):
        self._strings = tuple(strings)
        if "" in self._strings:
            raise UserError("a stop string is empty; give at least one character")
        self._held = ""
        self._stopped = False

    def put(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was met). After a stop, nothing comes."""
        if self._stopped:
            return "", True
        text = self._held + text
        begins = (i for i in range(len(text)) if any(s.startswith(text[i : i + len(s)]) for s in self._strings))
        cut = next(begins, len(text))  # where a stop string begins, or may
        self._stopped = any(text.startswith(s, cut) for s in self._strings)
        self._held = "" if self._stopped else text[cut:]
        return text[:cut], self._stopped

    def flush(self) -> str:
        """What was held back and may be shown now that no more text comes."""
        text, self._held = self._held, ""
        return text[: min((i for s in self._strings if (i := text.find(s)) >= 0), default=len(text))]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a checkpoint directory, and what its config files say about BOS, stops and chat template.

    Reads tokenizer.json, or else tokenizer.model; the format is told from the content. tokenizer.json comes first as it
    holds the whole pipeline, added tokens included. A damaged one is an error even beside a good tokenizer.model: to
    go on in silence would hide a broken download. Raises UserError that names the file and what is accepted.
    """
    names = ("special_tokens_map.json", "tokenizer_config.json")
    config = {key: value for name in names for key, value in read_json(folder / name, missing={}).items()}
    backend = _load_backend(folder, config)
    roles = {"bos_token": "", "eos_token": ""} | backend.roles
    roles |= {key: token for key, value in config.items() if key.endswith("_token") and (token := _token_text(value))}
    eos_ids = {backend.added[roles["eos_token"]]} if roles["eos_token"] in backend.added else set()
    for path in (folder / "generation_config.json", folder / "config.json"):
        value = read_json(path, missing={}).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise UserError(f"{path}: eos_token_id is {value!r}; expected a token id or a list of them")
        eos_ids.update(ids)
    roles["eos_token"] = roles["eos_token"] or backend.tokens.get(min(eos_ids, default=None), b"").decode()
    bos_id = backend.added.get(roles["bos_token"])
    # The post-processor in a tokenizer.json decides about BOS, whatever add_bos_token says: so does transformers 5.
    add_bos = config.get("add_bos_token") is not False if backend.adds_bos is None else backend.adds_bos
    return Tokenizer(
        name=str(folder),
        backend=backend,
        bos_id=bos_id,
        add_bos=add_bos and bos_id is not None,
        eos_ids=frozenset(eos_ids),
        stop_ids=frozenset(eos_ids | {backend.added[token] for token in END_TOKENS if token in backend.added}),
        chat_template=_read_chat_template(folder, config, backend),
        template_tokens=roles,
    )


def _load_backend(folder: Path, config: Mapping[str, Any]) -> Backend:
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
            return _sentencepiece(data, {_token_text(token): int(i) for i, token in added.items()} | extra)
    except Exception as error:  # the libraries do not say what they raise for a bad file
        raise UserError(f"{path} is damaged or not supported: {error!r}") from error
    accepted = "a tokenizer.json of the tokenizers library, a SentencePiece model or tiktoken ranks"
    raise UserError(f"{path} is not a tokenizer: it begins with {data[:20]!r}; expected {accepted}")


def _read_chat_template(folder: Path, config: Mapping[str, Any], backend: Backend) -> str | None:
    """The template's source: its own file before the config, as in transformers, before the family's."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    template = config.get("chat_template")
    if template is None:
        return next((template for token, template in FAMILY_TEMPLATES.items() if token in backend.added), None)
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str):
        raise UserError(f"{folder}: chat_template must be a text, or a list of named ones with one called 'default'")
    return template


def _token_text(value: object) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


@functools.cache
def _compile_template(source: str) -> jinja2.Template:
    """Compile in a sandbox (templates come with downloads), with the settings and names that transformers provides."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    # Jinja's own filter escapes HTML, which the models were not trained on.
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # {% generation %} marks the answers in training data; a comment treats the space around it alike.
    return env.from_string(re.sub(r"{%([-+]?)\s*(?:end)?generation\s*([-+]?)%}", r"{#\1 \2#}", source))
