"""How prompts are answered: settings that a command line can make without torch."""

from dataclasses import dataclass, field

from internvl_megatron.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """Scores are divided by it; 0 = always the most likely token."""
    top_k: int = 0
    """Draw from so many most likely tokens (and those that tie with the last of them); 0 = from all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that have this probability between them."""
    seed: int = 0
    """Of all draws."""
    repetition_penalty: float = 1.0
    """Scores of tokens that the prompt or the answer has already are divided by it, or multiplied if below 0; 1 = off."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: with a line for each that is out of its range.
        """
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature: must be 0 (the most likely token) or more, not {self.temperature}")
        if self.top_k < 0:
            problems.append(f"top_k: must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p: must be above 0 and at most 1 (all tokens), not {self.top_p}")
        if self.seed < 0:
            problems.append(f"seed: must be 0 or more, not {self.seed}")
        if not 0 < self.repetition_penalty < float("inf"):
            problems.append(f"repetition_penalty: must be above 0 (1 = off), not {self.repetition_penalty}")
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def seed_of(self, number: int, own_seed: int | None) -> tuple[int, ...]:
        """What a request's draws depend on, beside the step.

        Args:
            number: place of the request among those of the call.
            own_seed: the request's own seed, in place of its number; None = it has none.
        """
        return (self.seed, 0, number) if own_seed is None else (self.seed, 1, own_seed)


GREEDY = Sampling()
"""The most likely token at every step."""

DRAWN = Sampling(temperature=0.6, top_p=0.95)
"""How Best-of-N draws the answers after the first (VLMEvalKit, for InternVL3; VisualPRM's paper has temperature 0.7)."""


@dataclass(frozen=True)
class Generation:
    """When answers end, and how they are made."""

    max_new_tokens: int = 32
    """An answer ends after so many tokens if nothing ends it before."""
    v2pe_numerator: int = 256
    """Position step of image tokens in units of 1/256; 256 (delta = 1) gives ordinary positions."""
    sampling: Sampling = GREEDY
    stop_strings: tuple[str, ...] = ()
    """An answer ends before the first of these texts."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer as `<|im_end|>` does, and are no part of it either."""

    def __post_init__(self) -> None:
        """Check the values. Raises `ConfigError`."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: must be at least 1, not {self.max_new_tokens}")
        if not all(self.stop_strings):
            raise ConfigError("stop_strings: an empty text would end every answer; leave it out")


@dataclass(frozen=True)
class Limits:
    """How much is under way at a time, on each replica."""

    max_sequences: int = 32
    """Answers that grow together."""
    cache_tokens: int = 131_072
    """Tokens whose keys and values are kept: sequences times the longest of them."""
    max_positions: int = 32_768
    """The context: positions from here on are refused. InternVL3 was trained up to 32K (paper, sec. 2.5)."""

    def __post_init__(self) -> None:
        """Check the values. Raises `ConfigError`."""
        for name in ("max_sequences", "cache_tokens", "max_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Setup:
    """How a generator uses its ranks. Those beyond `tensor_size` x `pipeline_size` make more replicas, which share the prompts."""

    tensor_size: int = 1
    pipeline_size: int = 1
    limits: Limits = field(default_factory=Limits)
