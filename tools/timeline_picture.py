"""A picture of what ranks do when: a line for each rank, a colour for each kind of work."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Bar(NamedTuple):
    """Some work of a rank."""

    kind: str
    start: float
    end: float
    opacity: float = 1.0


class Line(NamedTuple):
    """A message from one rank to another."""

    sender: int
    start: float
    receiver: int
    end: float


def draw_timeline(
    ranks: Sequence[Sequence[Bar]],
    colours: Mapping[str, str],
    file: Path,
    title: str,
    unit: str,
    rank_name: str,
    messages: Sequence[Line] = (),
) -> None:
    """Draw it.

    Args:
        ranks: what each did.
        colours: of every kind, by matplotlib's names; the legend's order.
        file: picture to write.
        title: above it.
        unit: of the times.
        rank_name: what the ranks are called.
        messages: between them.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(10, 1.2 + 0.4 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    for rank, bars in enumerate(ranks):
        for kind, start, end, opacity in bars:
            look: Any = {"color": colours[kind], "alpha": opacity, "edgecolor": "white", "linewidth": 0.3}
            axes.barh(rank, end - start, left=start, **look)
    for sender, start, receiver, end in messages:
        # From the lower or upper edge of one rank's bars to that of the other's, over them.
        edge = 0.4 if receiver > sender else -0.4
        axes.plot((start, end), (sender + edge, receiver - edge), color="black", linewidth=0.4)
    axes.set(xlabel=unit, ylabel=rank_name, yticks=range(len(ranks)), title=title)
    axes.invert_yaxis()
    place: Any = "outside right"  # newer than matplotlib's types
    figure.legend(handles=[Patch(color=colour, label=kind) for kind, colour in colours.items()], loc=place)
    figure.savefig(file, dpi=110)
