"""What stands around a command's `main`: streams, signals, and errors: one line on stderr and exit status 2, never a
traceback. And files that appear whole or not at all.
"""

import argparse
import glob
import importlib
import io
import json
import os
import re
import reprlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

LONGEST = 300  # characters of an error's line
ENDING = {signal.SIGINT: "interrupted"}  # what is said of a signal
ENDING |= {getattr(signal, n): f"error: ended by {n}" for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)}


class UserError(Exception):
    """Something the user can put right. The message is one line that names the value and what is accepted."""


class Ended(BaseException):
    """A signal, its only argument, ends the command."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.repr_int = lambda value, _: str(value) if value.bit_length() < 200 else "a huge integer"


def shown(value: object) -> str:
    """A value as messages show it: its repr, cut, whatever its size or depth."""
    return f"{_SHORT.repr(value):.100}"


def reason(error: BaseException) -> str:
    """What an error of other code says, without the places in that code that it names."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = re.sub(r".*WeightsUnpickler error: |\[enforce fail at .*?\](?: err == 0)?[ .]*", "", str(error), flags=re.S)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


class Parser(argparse.ArgumentParser):
    """Knows flags by their whole names. What is wrong with them is a UserError."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


# --- files ------------------------------------------------------------------------------------------------------------


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


# --- commands ---------------------------------------------------------------------------------------------------------


def command(name: str) -> NoReturn:
    """Run the `main` of a module that is a command's file, for good. Called before that file's own imports, which take
    seconds, so that a signal during them, too, is a line and not a traceback."""
    _open_streams()
    with _handled(_end_at_once):
        run_cli(lambda: _handled(_unwind)(importlib.import_module(name).main)())
        sys.exit()


def run_cli(main: Callable[[], None]) -> None:
    """Run a command-line `main`. A UserError, a fault of the system like a full disk or too little memory (status 2),
    a signal (128 + its number) or a reader that has left (141) ends it without a traceback.
    """
    try:
        main()
        sys.stdout.flush()
    except (KeyboardInterrupt, Ended) as error:
        number = error.args[0] if isinstance(error, Ended) else signal.SIGINT
        _end(ENDING[number], 128 + number)
    except BrokenPipeError:
        _end("", 141)
    except UserError as error:
        _end(f"error: {error}", 2)
    except (OSError, UnicodeError, ImportError) as error:
        _end(f"error: {reason(error)}", 2)
    except RecursionError:
        _end("error: something is nested too deeply", 2)
    except (MemoryError, RuntimeError) as error:  # the latter is PyTorch's only sign of too little memory on a CPU
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        _end(f"error: out of memory: {reason(error)}", 2)


def _end(text: str, status: int) -> NoReturn:
    """Print an error as one line, cut in its middle, and exit."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= LONGEST else f"{line[: LONGEST - 103]}...{line[-100:]}"
    with suppress(OSError):
        print(line, end="\n" if line else "", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # which Python's own flush, at its end, would repeat
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _open_streams() -> None:
    """Make each stream one that can be used: what it cannot show is replaced, and a closed one leads nowhere. (The next
    file to be opened would have its number, and get what C code prints.)"""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # has the lowest free number, which is this one
            stream = os.fdopen(number, "w" if number else "r", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def _handled(handler: Callable) -> Iterator[None]:
    """Let a function handle what ends a command, but for signals that are ignored, as under nohup."""
    before = {n: signal.signal(n, handler) for n in ENDING if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _end_at_once(number: int, _) -> NoReturn:
    """While nothing is half-written. (Imports swallow exceptions.)"""
    with suppress(OSError):
        os.write(2, f"{ENDING[number]}\n".encode())
    os._exit(128 + number)


def _unwind(number: int, _) -> NoReturn:
    """By an exception, so that what is half-written goes. A second signal, as of a closed terminal, must not cut that
    short; where other people's code swallows the exception, an alarm ends the process."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)
    signal.alarm(30)
    raise Ended(number)
