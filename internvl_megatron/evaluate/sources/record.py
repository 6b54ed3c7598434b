"""A record of a public data set, whatever file it is in: fields that are checked when they are asked for."""

import ast
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl_megatron.errors import DataError
from internvl_megatron.evaluate.sources.picture import Picture


@dataclass(frozen=True, slots=True)
class Record:
    """One question as its file has it."""

    fields: Mapping[str, Any]
    """By name; what is empty or null is None. Pictures are not among them."""
    where: str
    """`file:line` or `file:row`."""
    pictures: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    """By the name of their field."""

    def has(self, name: str) -> bool:
        """Whether a field is there and not empty; no number is nothing."""
        value = self.fields.get(name)
        return value is not None and not (isinstance(value, float) and math.isnan(value))

    def text(self, name: str) -> str:
        """A field that must be text or a number, as text. Raises `DataError`."""
        value = self._there(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(name, f"must be a text, not {_shown(value)}")
        return _encodable(str(value), self, name)

    def texts(self, name: str, at_least: int = 1) -> list[str]:
        """A field that must be a list of so many texts, or a list that is spelled in a text (JSON or Python). Raises `DataError`."""
        value = self._there(name)
        if isinstance(value, str):
            value = spelled_list(value)
        if not isinstance(value, list | tuple) or not all(isinstance(one, str | int | float) for one in value):
            raise self.error(name, f"must be a list of texts, not {_shown(self.fields[name])}")
        if len(value) < at_least:
            raise self.error(name, f"has {len(value)} entries; at least {at_least} must be there")
        return [_encodable(str(one), self, name) for one in value]

    def number(self, name: str) -> float:
        """A field that must be a number. Raises `DataError`."""
        value = self._there(name)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise self.error(name, f"must be a number, not {_shown(value)}") from error

    def integer(self, name: str) -> int:
        """A field that must be a whole number. Raises `DataError`."""
        value = self.number(name)
        if not value.is_integer():
            raise self.error(name, f"must be a whole number, not {value}")
        return int(value)

    def labels(self, *names: str) -> dict[str, str]:
        """Those of some fields that are there, as texts."""
        return {name: self.text(name) for name in names if self.has(name)}

    def images(self, name: str, needed: bool = True) -> tuple[Picture, ...]:
        """The pictures of a field. Raises `DataError` if there must be one and is none."""
        found = tuple(self.pictures.get(name, ()))
        if needed and not found:
            raise self.error(name, "has no picture; download the file again")
        return found

    def error(self, name: str, text: str) -> DataError:
        """What is wrong with a field."""
        return DataError(f"{self.where}: field {name!r}: {text}")

    def _there(self, name: str) -> Any:
        if not self.has(name):
            raise self.error(name, f"is not there; fields are {', '.join(map(str, [*self.fields, *self.pictures]))}")
        return self.fields[name]


def spelled_list(text: str) -> list[Any] | None:
    """The list that a text spells in JSON or as Python does; None if it spells none."""
    if not text.lstrip().startswith("["):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list):
            return value
    return None


def _encodable(text: str, record: Record, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise record.error(name, "has half a surrogate pair, which is not text") from None
    return text


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) < 80 else f"{shown[:77]}..."
