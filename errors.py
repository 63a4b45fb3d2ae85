"""User errors: one clear line on stderr and exit status 2, never a traceback. And JSON files, read with them."""

import json
import os
import reprlib
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """Something the user can put right. The message is one line that names the value and what is accepted."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.repr_int = lambda value, _: str(value) if value.bit_length() < 200 else "a huge integer"


def shown(value: object) -> str:
    """A value as messages show it: its repr, cut, whatever its size or depth."""
    return f"{_SHORT.repr(value):.100}"


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


def run_cli(main: Callable[[], None]) -> None:
    """Run a command-line `main`; a UserError, a fault of the system like a full disk or too little memory (status 2),
    Ctrl-C (130) or a reader that has left (141) ends it without a traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes at its end
        sys.exit(141)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:  # PyTorch's only sign of it on a CPU
        if not any(text in str(error) for text in ("out of memory", "can't allocate memory")):
            raise
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
