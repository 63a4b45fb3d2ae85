"""lm-eval's tasks: YAML files, its own and a user's, and the data that they name."""

import difflib
import functools
import random
from pathlib import Path

from errors import UserError


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
