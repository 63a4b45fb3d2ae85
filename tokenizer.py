"""Text to token ids and back, over streams too, and chat templates.

formats/tokenizer_files.py reduces the libraries to two things: text to ids, and the bytes of each token. The rest (BOS,
stop ids, decoding, streaming, chat templates) is written here once, on top.

Decoding is defined on bytes: all tokens' bytes, joined, are read as UTF-8, with U+FFFD for what is not. On valid text
the libraries do the same; on invalid byte tokens they differ, and some take back characters that were already certain.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from formats import chat_template, fields
from formats.tokenizer_files import EOS_IDS, Backend, load_backend, read_config
from process.files import read_json

# Tokens that end a turn or a text in some family. Generation stops at those that a vocabulary has as added tokens,
# whatever the configs say: many fine-tunes list only their base model's end of text.
END_TOKENS = (
    *("</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>"),
    *("<end_of_turn>", "<|end_of_turn|>", "<end_of_utterance>", "<|return|>"),
)


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
        names = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        try:
            return chat_template.render(self.chat_template, **names | self.template_tokens | variables)
        except Exception as error:  # a template is the checkpoint's own code and can raise anything
            raise UserError(f"{self.name}: the chat template failed: {error!r:.200}") from error

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
    config = read_config(folder)
    backend = load_backend(folder, config)
    roles = {"bos_token": "", "eos_token": ""} | backend.roles
    roles |= {role: token.content for role, token in config.roles.items()}
    eos_ids = {backend.added[roles["eos_token"]]} if roles["eos_token"] in backend.added else set()
    for path in (folder / "generation_config.json", folder / "config.json"):
        ids = fields.read_one(path, "eos_token_id", EOS_IDS, read_json(path, missing={}).get("eos_token_id"))
        eos_ids.update(ids if isinstance(ids, tuple) else [ids])
    roles["eos_token"] = roles["eos_token"] or backend.tokens.get(min(eos_ids, default=None), b"").decode(
        errors="replace"
    )
    bos_id = backend.added.get(roles["bos_token"])
    # The post-processor in a tokenizer.json decides about BOS, whatever add_bos_token says: so does transformers 5.
    add_bos = config.add_bos is not False if backend.adds_bos is None else backend.adds_bos
    return Tokenizer(
        name=str(folder),
        backend=backend,
        bos_id=bos_id,
        add_bos=add_bos and bos_id is not None,
        eos_ids=frozenset(eos_ids),
        stop_ids=frozenset(eos_ids | {backend.added[token] for token in END_TOKENS if token in backend.added}),
        chat_template=chat_template.find(folder, config.chat_template, backend.added),
        template_tokens=roles,
    )
