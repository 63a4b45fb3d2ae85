"""Texts to measure a model on or to calibrate it by: a file, a text that every Python brings, lm-eval's tasks."""

from collections.abc import Iterator
from pathlib import Path

from errors import UserError
from formats.lm_eval_tasks import load_tasks

BUILTIN_CHARACTERS = 100_000  # of the built-in text: some 25,000 tokens
MAX_BYTES = 2**28  # of a text file: more than anybody would wait for


def read_text(path: Path | None = None, what: str = "") -> str:
    """A UTF-8 text file, or what every Python brings: the start of its language reference. A byte-order mark is no
    text, and every line ends in a newline. what: the argument that named the file, for messages.
    """
    if path is None:
        from pydoc_data.topics import topics  # half a megabyte that nothing else needs

        return "\n\n".join(topics[name] for name in sorted(topics))[:BUILTIN_CHARACTERS]
    name = f"{what} {path}".strip()
    try:
        size = path.stat().st_size
        if path.exists() and not path.is_file():
            raise UserError(f"{name} is not a regular file; a text file is needed")
        if size > MAX_BYTES:
            raise UserError(f"{name} has {size} bytes; texts of up to {MAX_BYTES} are read")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {name} as UTF-8 text: {error}") from None
    if not text:
        raise UserError(f"{name} is empty; a text of at least one token is needed")
    return text


def task_documents(tasks: list[str], include_path: Path | None = None) -> Iterator[str]:
    """The text of each document of lm-eval tasks: what a model would read, and the answer it should give."""
    try:
        loaded = load_tasks(tasks, include_path)["tasks"].values()
    except UserError as error:
        raise UserError(f"{error}; any text serves as well, with --calibration_file") from None
    for task in loaded:
        split = next(s for s in ("training", "validation", "test") if getattr(task, f"has_{s}_docs")())
        for doc in getattr(task, f"{split}_docs")():
            prompt, target = task.doc_to_text(doc), task.doc_to_target(doc)
            if isinstance(prompt, int):  # the option that completes it, as in winogrande
                prompt = task.doc_to_choice(doc)[prompt]
            if isinstance(target, int):
                target = task.doc_to_choice(doc)[target]
            yield task.config.target_delimiter.join(t for t in (prompt, target) if isinstance(t, str) and t)
