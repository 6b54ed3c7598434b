"""What is asked and what is answered; imports nothing heavy, so that a command line can make prompts without torch."""

from dataclasses import dataclass
from typing import Literal

End = Literal["turn_end", "stop", "length"]
"""What ended an answer: `<|im_end|>`, one of the stop strings or ids, or the number of tokens."""

ENDS: tuple[End, ...] = ("turn_end", "stop", "length")


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
    video: str | None = None
    """Path of a video, or of a folder of frames, in place of images; `<video>` says where its frames go, without one they come
    first."""
    num_frames: int = 16
    """Of the video: the one in the middle of each of so many equal parts."""
    clip: tuple[float, float] | None = None
    """Start and end in seconds of what is seen of a video file; None = all of it."""
    max_tiles: int | None = None
    """Tiles of each image at most; None = the images share `data.max_tiles`, as in training."""
    where: str = ""
    """`file:line` of the record it was made from, for messages."""


@dataclass(frozen=True)
class Answer:
    """What the model answered."""

    text: str
    """Without what ended it and without `answer_start`; without surrounding white space, but where it goes on behind
    `answer_start` white space stays at the front."""
    token_ids: tuple[int, ...]
    """As they were generated, the last one included if it ended the answer."""
    end: End
