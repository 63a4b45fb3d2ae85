"""What the keys of other people's files may hold: tables of fields, all read in one way, with messages made from them.

A table maps a key to its Field. `read` gives the value of each of its keys: null means absent, an absent key has its
default, and what a field does not accept is a UserError that names file, key, value and what is accepted.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from errors import UserError, shown

NEEDED = object()  # the default of a key that has none
MOST = 2**31 - 1  # of any size


@dataclass(frozen=True)
class Field:
    what: str  # is accepted, as messages say it
    parse: Callable[[Any], Any]  # the value; a ValueError where it is not accepted
    default: Any = NEEDED


def integer(low: int = 1, high: int = MOST, default: Any = NEEDED) -> Field:
    def parse(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise ValueError
        return value

    return Field(f"an integer from {low} to {high}", parse, default)


def number(low: float, high: float, default: Any = NEEDED) -> Field:
    """Finite numbers of low..high; those that are integers become floats, too."""

    def parse(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:  # NaN is in no range
            raise ValueError
        return float(value)

    return Field(f"a number from {low:g} to {high:g}", parse, default)


def flag(default: Any = NEEDED) -> Field:
    return Field("true or false", lambda value: _of(bool, value), default)


def text(choices: Collection[str] | None = None, default: Any = NEEDED) -> Field:
    def parse(value: Any) -> str:
        if choices is not None and _of(str, value) not in choices:
            raise ValueError
        return _of(str, value)

    return Field("a text" if choices is None else " or ".join(sorted(choices)), parse, default)


def mapping(default: Any = NEEDED) -> Field:
    return Field("an object", lambda value: _of(dict, value), default)


def list_of(each: Field, most: int = MOST, default: Any = NEEDED) -> Field:
    def parse(value: Any) -> tuple:
        if len(_of(list, value)) > most:
            raise ValueError
        return tuple(each.parse(item) for item in value)

    return Field(f"a list, each {each.what}", parse, default)


def either(*fields: Field, default: Any = NEEDED) -> Field:
    """What any of the fields accepts, the first that does."""

    def parse(value: Any) -> Any:
        for field in fields:
            try:
                return field.parse(value)
            except ValueError:
                continue
        raise ValueError

    return Field(", or ".join(field.what for field in fields), parse, default)


def read(where: object, table: Mapping[str, Field], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a table's keys. where: the file, for messages."""
    return {key: read_one(where, key, field, values.get(key)) for key, field in table.items()}


def read_one(where: object, key: str, field: Field, value: Any) -> Any:
    """The value of one key, None if it is absent."""
    if value is None and field.default is not NEEDED:
        return field.default
    try:
        return field.parse(value)
    except (ValueError, OverflowError):
        found = "missing" if value is None else shown(value)
        raise UserError(f"{where}: {key} is {found}; accepted: {field.what}") from None


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError
    return value
