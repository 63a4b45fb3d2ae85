"""User errors, and how messages show what they are about."""

import re
import reprlib


class UserError(Exception):
    """Something the user can put right. The message is one line that names the value and what is accepted."""


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
