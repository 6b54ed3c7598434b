"""What a benchmark is: how its questions are read and asked, and how the answers are scored. Each is a file beside this one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internvl_megatron.evaluate.sources.picture import Picture

MAX_TILES_OF_ALL_IMAGES = 64
"""That images of a question may have together, thumbnails not counted (VLMEvalKit `internvl_chat.py`)."""

MAX_NEW_TOKENS = 4096
"""VLMEvalKit's, for InternVL."""

SHORT = "Answer the question using a single word or phrase."

Options = Mapping[str, str]
"""Named options of a benchmark, each with the value in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A video of a question."""

    path: str
    version: str
    """Changes when the file may have changed."""
    num_frames: int
    seconds: tuple[float, float] | None = None
    """Start and end; None = all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question of a benchmark, ready to be asked."""

    id: str
    """Different from all others' of the benchmark."""
    where: str
    """`file:line`."""
    question: str
    """As the model gets it, with `<image>` where its pictures go, or none and they come first."""
    truth: Any
    """What the score needs to know of the right answer."""
    pictures: tuple[Picture, ...] = ()
    video: Clip | None = None
    system: str | None = None
    """System turn; None = the model's own."""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns: worked examples."""
    answer_start: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the scores are divided by."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with the model's answer."""

    item: Item
    answer: str


@dataclass(frozen=True, slots=True)
class Scores:
    """What a benchmark comes to."""

    main: float
    """What the paper gives, on its scale."""
    metric: str
    """What that is."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Other figures, and the same by label."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark."""

    name: str
    """On the command line, and of its folder of data."""
    title: str
    read: Callable[[Path, Options], list[Item]]
    """All questions of a folder. Raises `DataError` if anything in it is wrong that can be seen without decoding pictures."""
    score: Callable[[Sequence[Answered], Options], Scores]
    """Of all questions, in their order."""
    max_tiles: int = 6
    """Of an image, where there are few of them."""
    max_new_tokens: int = MAX_NEW_TOKENS
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Values that each named option may have, the default first."""

    def tiles_per_image(self, item: Item) -> int:
        """Most tiles of each of a question's pictures."""
        return max(1, min(self.max_tiles, MAX_TILES_OF_ALL_IMAGES // max(1, len(item.pictures))))
