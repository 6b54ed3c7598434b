"""What is asked; imports nothing heavy, so that a command line can make prompts without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One question to the model."""

    question: str
    """Text of the human turn; `<image>` says where an image goes, without any they come first."""
    images: tuple[str, ...] = ()
    """Paths."""
    system: str | None = None
    """System turn; None = the run's own (`data.system_prompt`), '' = no system turn."""
