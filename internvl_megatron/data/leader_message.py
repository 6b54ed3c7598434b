"""What a leader has to say of a step: the data, or the error that takes their place. As bytes, to be sent."""

from dataclasses import dataclass

from internvl_megatron.errors import DataError

_DATA, _USER_ERROR, _INTERNAL_ERROR = b"D", b"U", b"I"
"""First byte of a message; the data or the error's text follow."""


@dataclass(frozen=True)
class Failure:
    """An error that a leader met, as others hear of it."""

    text: str
    is_user_error: bool
    """The data are bad; otherwise the program is."""

    def error(self) -> DataError | RuntimeError:
        """For ranks that did not meet the error themselves; an internal one is not passed off as the user's."""
        return DataError(self.text) if self.is_user_error else RuntimeError(self.text)


def failure_of(error: BaseException, who: str) -> Failure:
    """The failure of a leader; `who` says which."""
    is_user_error = isinstance(error, DataError)
    return Failure(f"{who} failed: {error if is_user_error else repr(error)}", is_user_error)


def to_message(content: bytes | Failure) -> bytes:
    """Data or a failure as bytes."""
    if isinstance(content, Failure):
        return (_USER_ERROR if content.is_user_error else _INTERNAL_ERROR) + content.text.encode(errors="replace")
    return _DATA + content


def from_message(message: bytes) -> bytes | Failure:
    """What `to_message` was given."""
    kind, content = message[:1], message[1:]
    return content if kind == _DATA else Failure(content.decode(), kind == _USER_ERROR)
