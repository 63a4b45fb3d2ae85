"""Files that are read whole, and that appear whole or not at all."""

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from errors import UserError


def read_json(path: Path, missing: dict | None = None) -> dict:
    """The object in a JSON file; `missing`, if given, where there is no file. A UserError names file and fault."""
    if missing is not None and not path.exists():
        return missing
    if path.exists() and not path.is_file():  # a pipe, of which reading has no end
        raise UserError(f"{path} is not a regular file")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; an object is needed")
    return value


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file of this process alone, beside `path`, whose name it takes at the end; on any error nothing is left.

    It is locked while it is written: what a killed process left behind is not, and goes when `path` is written again.
    Raises UserError where the file cannot be made.
    """
    import fcntl  # Unix only; who only generates needs no Unix

    partial = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        try:
            if path.is_dir():
                raise IsADirectoryError(0, "it is a directory")
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                with suppress(OSError), left.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()
            while True:
                file = partial.open("xb")
                with suppress(OSError):  # file systems without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_nlink:  # else another writer took it for a left-over just before
                    break
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        with file:
            yield partial
            partial.replace(path)
    finally:
        with suppress(OSError):  # it is not there, having its name now or never made
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all. Raises UserError where that cannot be."""
    with replacing(path) as partial:
        try:
            partial.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
