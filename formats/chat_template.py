"""Chat templates: where a checkpoint's comes from, and rendering it within bounds, as it is code of others."""

import functools
import json
import re
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from texts import read_text

MAX_CHARACTERS = 10_000_000  # of a chat
MAX_SECONDS = 10  # to render it,
MAX_MEMORY = 2**28  # and bytes

# How a family, told by one of its tokens, chats when its files bring no template: ChatML, Llama 3, Gemma, Llama 2.
FAMILY_TEMPLATES = {
    "<|im_start|>": """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "<|start_header_id|>": """\
{% set header = '<|start_header_id|>%s<|end_header_id|>\n\n' %}{{ bos_token }}
{%- for m in messages %}{{ header % m['role'] + m['content'] | trim + '<|eot_id|>' }}{% endfor %}
{% if add_generation_prompt %}{{ header % 'assistant' }}{% endif %}""",
    "<start_of_turn>": """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
{% set system, messages = messages[0]['content'] + '\n\n', messages[1:] %}
{% endif %}
{% for m in messages %}
{% if m['role'] != ('user', 'assistant')[loop.index0 % 2] %}
{{ raise_exception('roles must alternate user, assistant, user, ... after an optional system message') }}
{% endif %}
{{- '<start_of_turn>' + ('user', 'model')[loop.index0 % 2] + '\n' + (loop.first and system or '') -}}
{{- m['content'] | trim + '<end_of_turn>\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
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


def find(folder: Path, configured: str | None, tokens: Collection[str]) -> str | None:
    """The template's source: its own file before the config, as in transformers, before the family's."""
    if (path := folder / "chat_template.jinja").exists():
        return read_text(path)
    return configured or next((template for token, template in FAMILY_TEMPLATES.items() if token in tokens), None)


def render(source: str, **names: Any) -> str:
    """The template's text. Raises what the template raises; beyond bounds ValueError, TimeoutError, MemoryError."""
    pieces, size = [], 0
    with _bounds():
        for piece in _compile(source).generate(**names):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_CHARACTERS:
                raise ValueError(f"its text has more than {MAX_CHARACTERS} characters")
    return "".join(pieces)


@contextmanager
def _bounds() -> Iterator[None]:
    """Bound time and memory: no hook of Jinja's sees every loop, nor every text that doubles. A process has one timer
    and one limit, so other threads than the main one do without.
    """
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    except (ImportError, OSError):  # Windows, macOS
        pages = 0
    if not pages or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(f"it takes more than {MAX_SECONDS} seconds")

    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MAX_MEMORY
    handler = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS, 1)  # again each second: Jinja may drop an exception
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most if limit == resource.RLIM_INFINITY else min(limit, most), hard))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@functools.cache
def _compile(source: str) -> Any:
    """Compile in a sandbox, with the settings and names that transformers provides."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    # Jinja's own filter escapes HTML, which the models were not trained on.
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # {% generation %} marks the answers in training data; a comment treats the space around it alike.
    return env.from_string(re.sub(r"{%([-+]?)\s*(?:end)?generation\s*([-+]?)%}", r"{#\1 \2#}", source))
