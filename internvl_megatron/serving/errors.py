"""Errors of requests, as OpenAI's interface words them."""

from typing import Any

from internvl_megatron.errors import UserError

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(UserError):
    """A request is not answered. The message names the field and the way out."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """Make it.

        Args:
            status: of HTTP.
            message: for people.
            param: field of the request.
            code: for programs.
        """
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets, as JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        # A client may have named half a surrogate pair, which no response can hold.
        message, param = (
            None if text is None else text.encode(errors="replace").decode() for text in (str(self), self.param)
        )
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def bad_field(param: str, problem: str) -> ApiError:
    """A field of a request has a value it cannot have."""
    return ApiError(400, f"{param}: {problem}", param, "invalid_value")
