"""Text to token ids and back: tokenizer.json, SentencePiece and tiktoken files behind one interface.

Three backends reduce three libraries to the same two things: text to ids, one id to bytes. The rest (BOS, stop ids,
decoding, streaming, chat templates) is written once, on top.

Decoding is defined on bytes: all tokens' bytes, joined, are read as UTF-8, with U+FFFD for what is not. On valid text
the libraries do the same; on invalid byte tokens they differ from each other, and some take back characters that were
already certain. Defined so, streaming is exact by construction.
"""

import base64
import codecs
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import sentencepiece
import tiktoken
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from errors import UserError

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

# How a family chats when its files bring no template.
CHATML_TEMPLATE = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3_TEMPLATE = """\
{% set header = '<|start_header_id|>%s<|end_header_id|>\n\n' %}{{ bos_token }}
{%- for m in messages %}{{ header % m['role'] + m['content'] | trim + '<|eot_id|>' }}{% endfor %}
{% if add_generation_prompt %}{{ header % 'assistant' }}{% endif %}"""
LLAMA2_TEMPLATE = """\
{% set system = '' %}
{% if messages[0]['role'] == 'system' %}
{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
{% set messages = messages[1:] %}
{% endif %}
{% for m in messages %}
{% if m['role'] != ('user', 'assistant')[loop.index0 % 2] %}
{{ raise_exception('roles must alternate user, assistant, user, ... after an optional system message') }}
{% elif m['role'] == 'user' %}
{{- bos_token + '[INST] ' + ((system if loop.first else '') + m['content']) | trim + ' [/INST]' -}}
{% else %}
{{- ' ' + m['content'] | trim + ' ' + eos_token -}}
{% endif %}
{% endfor %}"""


class Backend(Protocol):
    """What each tokenizer library is reduced to."""

    vocab_size: int
    added: Mapping[str, int]  # tokens matched whole before text is split: BOS, end of turn, ...
    special_ids: frozenset[int]  # those of them that are control, not text
    strips_space: bool  # encoding puts a space before the text, so decoding drops one
    adds_bos: bool
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str, special: bool) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...  # LookupError or OverflowError: no such token


@dataclass(eq=False)
class Tokenizer:
    """One model's tokenizer; `load_tokenizer` makes it."""

    name: str  # for messages
    backend: Backend
    bos_id: int | None  # beginning of text
    add_bos: bool  # whether this model's prompts begin with it
    eos_ids: frozenset[int]  # ends that the checkpoint's configs name
    stop_ids: frozenset[int]  # where generation ends: eos_ids, and END_TOKENS that the vocabulary has
    chat_template: str | None  # Jinja source
    template_tokens: Mapping[str, str]  # bos_token, eos_token, ... for the template

    @property
    def vocab_size(self) -> int:
        """Number of tokens. A model's logits may be wider, padded."""
        return self.backend.vocab_size

    def encode(self, text: str, bos: bool = True, special: bool = True) -> list[int]:
        """Token ids of `text`.

        bos: begin with BOS if this model's own tokenizer would (SmolLM2's and Qwen's do not); never a second one.
        special: read `<|im_end|>` and its like as the tokens they name, as transformers and llama.cpp read a prompt.
        False spells them as ordinary text, for text from a stranger; added tokens that tokenizer.json itself declares
        not special (Qwen's `<tool_call>`) are text and match either way.
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
        names = {"tools": None, "documents": None, **self.template_tokens, **variables}
        source = self.chat_template or self._family_template()
        if source is None:
            raise UserError(f"{self.name} has no chat template in tokenizer_config.json or chat_template.jinja")
        try:
            template = _compile_template(source)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **names)
        except Exception as error:  # a template is the checkpoint's own code and can raise anything
            raise UserError(f"{self.name}: the chat template failed: {_one_line(error)}") from error

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Token ids of a chat. BOS is the template's business alone, as in transformers' apply_chat_template."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables), bos=False)

    def _family_template(self) -> str | None:
        added = self.backend.added
        if "<|im_start|>" in added:
            return CHATML_TEMPLATE
        if "<|start_header_id|>" in added:
            return LLAMA3_TEMPLATE
        if "</s>" in added and self.vocab_size in (32000, 32016):  # Llama 2's vocabulary, CodeLlama's
            return LLAMA2_TEMPLATE
        return None


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
        if token_id in self._backend.special_ids:
            return b"" if self._skip_special else self._backend.token_bytes(token_id)
        try:
            data = self._backend.token_bytes(token_id)
        except (LookupError, OverflowError):
            data = "\ufffd".encode()
        if data and self._at_start:
            self._at_start = False
            return data.removeprefix(b" ")
        return data


class StopStrings:
    """End a streamed text where the first of `strings` begins, however the text is cut into pieces.

    The text let through, joined, is `text[:i]` with i the lowest index at which any of them begins. Text that may yet
    turn out to begin a stop string is held back.
    """

    def __init__(self, strings: Iterable[str]):
        self._strings = tuple(strings)
        if "" in self._strings:
            raise UserError("a stop string is empty; give at least one character")
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self._stopped = False

    def put(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was met). After a stop, nothing comes."""
        if self._stopped:
            return "", True
        text = self._held + text
        match = self._find(text)
        # A longer string that began before the match and is not finished would cut earlier: wait until that is known.
        tails = range(max(0, len(text) - self._longest + 1), match)
        cut = next((i for i in tails if any(s.startswith(text[i:]) for s in self._strings)), match)
        self._stopped = cut == match < len(text)
        self._held = "" if self._stopped else text[cut:]
        return text[:cut], self._stopped

    def flush(self) -> str:
        """What was held back and may be shown now that no more text comes."""
        text, self._held = self._held, ""
        return text[: self._find(text)]

    def _find(self, text: str) -> int:
        return min((i for s in self._strings if (i := text.find(s)) >= 0), default=len(text))


class _TokenizerJson:
    """tokenizer.json, through the `tokenizers` library."""

    eos_id = None  # only the config files know

    def __init__(self, text: str, named: Iterable[str]):
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # As transformers does: a token to which the config gives a role is special, even if tokenizer.json forgot.
        self._tokenizer.add_special_tokens([t for t in named if self._tokenizer.token_to_id(t) is not None])
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.added = {token.content: i for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        whole, body = (self._tokenizer.encode("a", add_special_tokens=flag).ids for flag in (True, False))
        self.adds_bos = whole[:1] != body[:1]
        self.bos_id = whole[0] if self.adds_bos else None

        # The decoder's steps, read as rules for one token. A component's pickled state is its JSON, defaults filled in.
        decoder = self._tokenizer.decoder
        spec = json.loads(decoder.__getstate__()) if decoder else {"type": None}
        self._byte_level = self._byte_fallback = self.strips_space = False
        self._replacements: list[tuple[str, str]] = []
        for step in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
            match step:
                case {"type": "ByteLevel"}:
                    self._byte_level = True
                case {"type": "ByteFallback"}:
                    self._byte_fallback = True
                case {"type": "Fuse"}:
                    pass  # joins tokens, as decoding does anyway
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    self._replacements.append((old, new))
                case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                    self.strips_space = True
                case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
                    self._replacements.append((mark, " "))
                    self.strips_space = scheme != "never"
                case _:
                    known = "ByteLevel, ByteFallback, Fuse, Metaspace, Replace (string), Strip (one leading space)"
                    raise ValueError(f"its decoder has the step {json.dumps(step)}; supported are {known}")
        verbatim = self.added.values() if self._byte_level else self.special_ids
        self._verbatim = {i: added[i].content.encode() for i in verbatim}

    def encode(self, text: str, special: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._verbatim:
            return self._verbatim[token_id]
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            raise LookupError(token_id)
        if self._byte_level:
            table = _byte_of_char()
            return bytes([table[c] for c in token]) if all(c in table for c in token) else token.encode()
        if self._byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes.fromhex(token[3:5])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()


class _SentencePiece:
    """SentencePiece's tokenizer.model. The library never reads control tokens in text; here the text is split at them.

    Each part gets its own leading space, as in Meta's reference code for Llama 2, which encodes each turn by itself.
    """

    adds_bos = True  # if the model has one

    def __init__(self, data: bytes, extra: Mapping[str, int]):
        self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        size = self._model.get_piece_size()
        self.added = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
        # The library does not tell user-defined pieces from ordinary ones. Those that delimit turns matter.
        known = {token: self._model.piece_to_id(token) for token in (*END_TOKENS, "<|im_start|>", "<start_of_turn>")}
        self.added |= {token: i for token, i in known.items() if i != self._model.unk_id()} | extra
        self.special_ids = frozenset(self.added.values())
        self._beyond = {i: token.encode() for token, i in extra.items() if i >= size}
        self.vocab_size = size + len(self._beyond)
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id()))
        self.strips_space = self._model.encode("a", out_type=str)[0].startswith("▁")
        names = sorted(self.added, key=len, reverse=True)  # the longer wins where one begins another
        self._split = re.compile(f"({'|'.join(map(re.escape, names))})" if names else r"(?!)")

    def encode(self, text: str, special: bool) -> list[int]:
        if special:  # split at the tokens: text, token, text, token, ..., text
            parts = enumerate(self._split.split(text))
            ids = ([self.added[part]] if n % 2 else self._model.encode(part) for n, part in parts if part)
        else:  # user-defined pieces match in any text
            ids = (self._spell(i) if i in self.special_ids else [i] for i in self._model.encode(text))
        return [i for part in ids for i in part]

    def _spell(self, token_id: int) -> list[int]:
        """A token's name in byte tokens."""
        return [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in self._model.id_to_piece(token_id).encode()]

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._beyond:
            return self._beyond[token_id]
        piece = self._model.id_to_piece(token_id)  # IndexError is a LookupError
        if self._model.is_byte(token_id):
            return bytes.fromhex(piece[3:5])
        if self._model.is_unknown(token_id):
            return self._model.decode([token_id]).encode()
        return (piece if token_id in self.special_ids else piece.replace("▁", " ")).encode()


class _Tiktoken:
    """Llama 3's tokenizer.model: lines of `base64(bytes) rank`, then 256 special tokens that the file does not name."""

    strips_space = False
    adds_bos = True

    def __init__(self, data: bytes):
        ranks = {}
        for number, line in enumerate(data.splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(f"line {number} is {line[:40]!r}, not 'base64 rank'") from None
        if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError(f"its {len(ranks)} ranks have gaps or lack some of the 256 bytes")
        self.added = {token: len(ranks) + i for i, token in enumerate(LLAMA3_SPECIALS)}
        self.special_ids = frozenset(self.added.values())
        self.bos_id, self.eos_id = self.added["<|begin_of_text|>"], self.added["<|end_of_text|>"]
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=self.added
        )
        self.vocab_size = self._encoding.n_vocab

    def encode(self, text: str, special: bool) -> list[int]:
        return self._encoding.encode(text, allowed_special="all") if special else self._encoding.encode_ordinary(text)

    def token_bytes(self, token_id: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token_id)


def load_tokenizer(checkpoint_dir: Path) -> Tokenizer:
    """The tokenizer in a checkpoint directory, and what its config files say about BOS, stops and chat template.

    Reads tokenizer.json, or else tokenizer.model; the format is told from the content. tokenizer.json comes first as it
    holds the whole pipeline, added tokens included. A damaged one is an error even beside a good tokenizer.model: to
    go on in silence would hide a broken download. Raises UserError that names the file and what is accepted.
    """
    folder = Path(checkpoint_dir)
    path = next((p for p in (folder / "tokenizer.json", folder / "tokenizer.model") if p.is_file()), None)
    if path is None:
        accepted = "tokenizer.json, or tokenizer.model (SentencePiece, or Llama 3's tiktoken ranks)"
        raise UserError(f"no tokenizer in {folder}; expected {accepted}")
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    named = {key: text for key, value in config.items() if key.endswith("_token") and (text := _token_text(value))}
    extra = {_token_text(token): int(i) for i, token in (config.get("added_tokens_decoder") or {}).items()}
    backend = _load_backend(path, named.values(), {**extra, **_read_json(folder / "added_tokens.json")})

    size = _read_json(folder / "config.json").get("vocab_size")
    if isinstance(backend, _Tiktoken) and isinstance(size, int) and backend.vocab_size < size:
        raise UserError(f"{path} has {backend.vocab_size} tokens, but the model {size}: it is cut short")
    eos_ids = {backend.added[named["eos_token"]]} if named.get("eos_token") in backend.added else set()
    for config_path in (folder / "generation_config.json", folder / "config.json"):
        value = _read_json(config_path).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise UserError(f"{config_path}: eos_token_id is {value!r}; expected a token id or a list of them")
        eos_ids.update(ids)
    if not eos_ids and backend.eos_id is not None:
        eos_ids = {backend.eos_id}
    bos_id = backend.added.get(named.get("bos_token"), backend.bos_id)
    # The post-processor in a tokenizer.json decides about BOS, whatever add_bos_token says: so does transformers 5.
    add_bos = backend.adds_bos
    if not isinstance(backend, _TokenizerJson) and isinstance(config.get("add_bos_token"), bool):
        add_bos = config["add_bos_token"]
    texts = {i: token for token, i in backend.added.items()}
    defaults = {"bos_token": texts.get(bos_id, ""), "eos_token": texts.get(min(eos_ids, default=None), "")}
    return Tokenizer(
        name=str(folder),
        backend=backend,
        bos_id=bos_id,
        add_bos=add_bos and bos_id is not None,
        eos_ids=frozenset(eos_ids),
        stop_ids=frozenset(eos_ids | {i for token, i in backend.added.items() if token in END_TOKENS}),
        chat_template=_read_chat_template(folder, config),
        template_tokens={**defaults, **named},
    )


def _load_backend(path: Path, named: Iterable[str], extra: Mapping[str, int]) -> Backend:
    """The backend for the file's content. named: tokens with a role; extra: added tokens and ids, from the configs."""
    data = path.read_bytes()
    try:
        if data.lstrip()[:1] == b"{":
            return _TokenizerJson(data.decode(), named)
        if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data):
            return _Tiktoken(data)
        if data[:1] == b"\n":  # the tag of the protobuf's first field, its pieces
            return _SentencePiece(data, extra)
    except Exception as error:  # the libraries do not say what they raise for a bad file
        raise UserError(f"{path} is damaged or not supported: {_one_line(error)}") from error
    accepted = "a tokenizer.json of the tokenizers library, a SentencePiece model or tiktoken ranks"
    raise UserError(f"{path} is not a tokenizer: it begins with {data[:20]!r}; expected {accepted}")


def _read_json(path: Path) -> dict:
    """The object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template's source: a file of its own before tokenizer_config.json, as in transformers; None where none is."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    template = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    match template:
        case None | str():
            return template
        case [{"template": str(only)}]:
            return only
        case [*entries]:
            for entry in entries:
                match entry:
                    case {"name": "default", "template": str(default)}:
                        return default
    raise UserError(f"{folder}: chat_template must be a text, or a list of named ones with one called 'default'")


def _token_text(value: object) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the answers in training data; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.cache
def _compile_template(source: str) -> jinja2.Template:
    """Compile in a sandbox (templates come with downloads), with the settings and names that transformers provides."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter escapes HTML, which the models were not trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [jinja2.ext.loopcontrols, _GenerationBlock]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's stand-ins for the 256 bytes: printable Latin-1 is itself, the rest counts up from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(rest)}
