"""How a model is served: settings that a command line can make without torch."""

from dataclasses import dataclass

from internvl_megatron.errors import ConfigError

API_KEY_VARIABLE = "INTERNVL_MEGATRON_API_KEY"
"""Environment variable with the key that requests must bring; unset or empty = none is asked for."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Serving:
    """Of one server."""

    name: str
    """What requests call the model."""
    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 8000
    """0 = any that is free."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that requests may call this server by, besides its address: a page whose own name leads here gets nothing. Where the
    address is not of this machine alone, none = any."""
    default_new_tokens: int = 512
    """Longest answer to requests that do not say; memory is kept for all of it."""
    max_requests: int = 128
    """Requests that are read, wait or are answered at a time; further ones are sent away with 429."""
    max_body_bytes: int = 32 << 20
    """Largest request, its images counted as they are sent (base64 takes 4 bytes for 3)."""
    v2pe_numerator: int = 256
    """Position step of image tokens in units of 1/256."""
    request_seconds: float = 600
    """A request that has not been answered by then is given up."""
    drain_seconds: float = 30
    """How long a server that is to stop goes on answering what it has begun."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: with a line for each that is out of its range.
        """
        problems = [
            f"{name}: must be above 0, not {getattr(self, name)}"
            for name in ("default_new_tokens", "max_requests", "max_body_bytes", "request_seconds")
            if not getattr(self, name) > 0
        ]
        if not 0 <= self.port < 1 << 16:
            problems.append(f"port: must be 0 (any that is free) to 65535, not {self.port}")
        if not 1 <= self.v2pe_numerator <= 256:
            problems.append(f"v2pe_numerator: must be 1 to 256 (delta 1/256 to 1), not {self.v2pe_numerator}")
        if not self.drain_seconds >= 0:
            problems.append(f"drain_seconds: must be 0 or more, not {self.drain_seconds}")
        if not self.name:
            problems.append("name: the model needs one; requests name it")
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def host_names(self) -> list[str]:
        """What the `Host` of a request may be, as Starlette takes it."""
        if self.host in LOOPBACK:
            return ["127.0.0.1", "localhost", "[::1]", *self.allowed_hosts]
        return list(self.allowed_hosts) or ["*"]
