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
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns, (question, answer) each. Images replace the `<image>` of all questions in order; without any they come
    first in the first one."""
    answer_start: str = ""
    """Text the answer begins with; what is returned goes on behind it."""
    seed: int | None = None
    """Where tokens are drawn: what this prompt's draws depend on, in place of its number among the prompts."""
