"""What a model is evaluated on and how: settings that a command line can make without torch."""

from dataclasses import dataclass
from pathlib import Path

from internvl_megatron.errors import ConfigError
from internvl_megatron.evaluate.benchmarks.registry import chosen_options, find_benchmark


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is evaluated on, and how; a command line can make it without torch."""

    benchmarks: tuple[str, ...]
    """Their names."""
    data: Path
    """Folder with a folder of each benchmark's name."""
    output: Path
    """Folder of answers and results; the same on all ranks."""
    options: tuple[str, ...] = ()
    """Named options, "benchmark.option=value" each."""
    limit: int | None = None
    """Ask the first so many questions alone."""
    max_new_tokens: int | None = None
    """Longest answer; None = each benchmark's own."""
    v2pe_numerator: int = 256
    """Position step of image tokens / 256."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a benchmark, an option or a value is not known, or a number is out of its range.
        """
        if not self.benchmarks:
            raise ConfigError("benchmarks: name at least one")
        for name in self.benchmarks:
            chosen_options(find_benchmark(name), self.options)
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise ConfigError(f"benchmarks: each at most once, not {', '.join(self.benchmarks)}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit: must be at least 1, not {self.limit}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: must be at least 1, not {self.max_new_tokens}")
