"""What stands around a command's `main`: streams, signals, and errors: one line on stderr and exit status 2, never a
traceback.
"""

import argparse
import gc
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import NoReturn

from errors import UserError, reason

LONGEST = 500  # characters of an error's line
ENDING = {signal.SIGINT: "interrupted"}  # what is said of a signal
ENDING |= {getattr(signal, n): f"error: ended by {n}" for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)}


class Ended(BaseException):
    """A signal, its only argument, ends the command."""


class Parser(argparse.ArgumentParser):
    """Knows flags by their whole names. What is wrong with them is a UserError."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def command(name: str) -> NoReturn:
    """Run the `main` of a module that is a command's file, for good. Called before that file's own imports, which take
    seconds, so that a signal during them, too, is a line and not a traceback."""
    # PyTorch's threads spin for milliseconds after each parallel region, on the cores that ops/cpu.cpp's then wait for.
    # Microseconds bridge the gaps between regions as well.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    _open_streams()
    with _handled(_end_at_once):
        run_cli(lambda: _handled(_unwind)(_imported(name).main)())
        sys.exit()


def _imported(name: str) -> ModuleType:
    """A module, whose imports are not searched for garbage, now or later: that would be a fifth of their time."""
    gc.disable()
    module = importlib.import_module(name)
    gc.freeze()
    gc.enable()
    return module


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
