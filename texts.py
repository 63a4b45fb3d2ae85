"""Texts to measure a model on or to calibrate it by: a file, a text that every Python brings, lm-eval's tasks."""

import difflib
import functools
import random
from collections.abc import Iterator
from pathlib import Path

from errors import UserError

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


def load_tasks(names: list[str], include_path: Path | None = None) -> dict:
    """lm-eval's tasks of these names (tasks, groups, tags, patterns), as lm_eval.evaluate takes them.

    include_path: a directory of YAML files, whose tasks hide lm-eval's own of the same name. Data files that they name
    are looked for beside them, and then, as lm-eval does, in the working directory.
    Raises UserError for an unknown name, and for data that cannot be read or downloaded.
    """
    try:
        from lm_eval.tasks import TaskManager  # brings datasets and pandas, for which other texts need not wait
    except ImportError:
        raise UserError("--tasks needs lm-eval: pip install 'lm-eval>=0.4.13'; --perplexity does without") from None
    if include_path and not include_path.is_dir():
        raise UserError(f"--include_path {include_path} is not a directory")
    if include_path:
        _check_yaml(include_path)
    # Indexing lm-eval's own 15,000 tasks takes a quarter of a minute, so only where one of them is wanted.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            close = ", ".join(difflib.get_close_matches(name, manager.all_tasks, n=5)) or "none"
            raise UserError(f"lm-eval has no task {name!r}; close names: {close}")
    import numpy as np

    random.seed(0)  # lm-eval's own seeds, for tasks that shuffle what they load
    np.random.seed(1234)  # noqa: NPY002
    _probe_hub()
    try:
        if include_path:
            _anchor_data_files(manager, include_path.resolve())
        return manager.load(manager.match_tasks(names))
    except Exception as error:  # a task is YAML, code and data of others, and can raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot load lm-eval's {', '.join(names)}: {reason}") from error


def _check_yaml(root: Path) -> None:
    """lm-eval passes over files that it cannot read, and would take its own task of the same name."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(root.glob("**/*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # YAML's, and those of files that it includes
            raise UserError(f"{path} is no task: {' '.join(str(error).split())[:200]}") from None


@functools.cache
def _probe_hub() -> None:
    """Where the hub does not answer, the libraries would try for a minute before they look at what they have."""
    import datasets
    import huggingface_hub

    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # of a library that has changed
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _anchor_data_files(manager, root: Path) -> None:
    """In the manager's index, make data files absolute that lie beside the YAML which names them."""
    from lm_eval.tasks._yaml_loader import load_yaml  # the index holds functions unresolved
    from torch.utils._pytree import tree_map

    for entry in manager.task_index.values():
        options = (entry.cfg or {}).get("dataset_kwargs") or {}
        if "data_files" in options and entry.yaml_path and root in entry.yaml_path.resolve().parents:
            folder = entry.yaml_path.resolve().parent
            beside = lambda file, folder=folder: str(folder / file) if (folder / file).exists() else file  # noqa: E731
            data_files = tree_map(beside, options["data_files"])  # a name, a list, or such for each split
            entry.cfg = {**load_yaml(entry.yaml_path), "dataset_kwargs": {**options, "data_files": data_files}}
            entry.yaml_path = None  # so that the config in the index counts
