"""Fields of a JSON object that nobody has checked, read one by one with errors that name them."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from internvl_megatron.serving.errors import ApiError, bad_field


class Fields:
    """Of one object. A field that is null is one that is not there."""

    def __init__(self, raw: Any, where: str = "") -> None:
        """Take an object; `where` is what the path of its fields begins with. Raises `ApiError` if it is none."""
        if not isinstance(raw, dict):
            raise bad_field(where or "body", f"must be an object, not {_kind(raw)}")
        self._raw: Mapping[str, Any] = raw
        self._where = f"{where}." if where else ""

    def path(self, name: str) -> str:
        """What errors call a field."""
        return f"{self._where}{name}"

    def get(self, name: str) -> Any:
        """Its value as it is; None where it is not there."""
        return self._raw.get(name)

    def text(self, name: str, default: str | None = None) -> str:
        """A text. Without a default it must be there."""
        value = self._needed(name, default)
        if not isinstance(value, str):
            raise bad_field(self.path(name), f"must be a text, not {_kind(value)}")
        return checked_text(value, self.path(name))

    def number(self, name: str, default: float, lowest: float, highest: float) -> float:
        """A number from a range."""
        value = self._needed(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad_field(self.path(name), f"must be a number, not {_kind(value)}")
        if not lowest <= value <= highest:
            raise bad_field(self.path(name), f"must be {lowest:g} to {highest:g}, not {value}")
        return value

    def integer(self, name: str, default: int, lowest: int, highest: int) -> int:
        """A whole number from a range."""
        value = self.number(name, default, lowest, highest)
        if not isinstance(value, int):
            raise bad_field(self.path(name), f"must be a whole number, not {value}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false where it is not there."""
        value = self._needed(name, False)
        if not isinstance(value, bool):
            raise bad_field(self.path(name), f"must be true or false, not {_kind(value)}")
        return value

    def refuse_others(self, known: Collection[str], neutral: Mapping[str, Any]) -> None:
        """Refuse fields that mean nothing here.

        Args:
            known: those that are read, or make no difference.
            neutral: fields that would, by the one value that asks for nothing.
        """
        for name, value in self._raw.items():
            if value is None or name in known or (name in neutral and value == neutral[name]):
                continue
            if name in neutral:
                raise ApiError(
                    400, f"{self.path(name)}: is not supported; leave it out", self.path(name), "unsupported_parameter"
                )
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"fields are {', '.join(sorted(known))}"
            raise ApiError(
                400, f"{self.path(name)[:200]}: unknown field; {hint}", self.path(name)[:200], "unknown_parameter"
            )

    def _needed(self, name: str, default: Any) -> Any:
        value = self._raw.get(name)
        if value is not None:
            return value
        if default is None:
            raise ApiError(
                400, f"{self.path(name)}: is missing; it must be given", self.path(name), "missing_required_parameter"
            )
        return default


def checked_text(text: str, path: str) -> str:
    """A text that can be written as UTF-8. Raises `ApiError`: it has half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad_field(path, "has half a surrogate pair, which is no character; mend the escape") from error
    return text


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    kinds = {str: "a text", bool: "true or false", dict: "an object", list: "a list", type(None): "null"}
    return kinds.get(type(value), "a number")
