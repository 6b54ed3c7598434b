"""What all ranks of a run were doing when it got nowhere, as a text: the rank that stopped first ahead."""

import re
from dataclasses import dataclass
from datetime import datetime

MOST_RANKS_NAMED = 16


@dataclass(frozen=True)
class StuckRank:
    """What is known of a rank."""

    rank: int
    host: str
    state: str
    """What somebody on its machine has found: stopped, gone, ...; '' = it has found out itself that it is stuck."""
    place: str
    """What it said last that it was doing."""
    since: float
    """When it began to, in seconds since 1970."""
    stacks: tuple[str, ...]
    """Of its threads, the main one's ahead; empty = nobody could get them."""

    @property
    def answered(self) -> bool:
        """Whether it still runs."""
        return not self.state


def stall_report(ranks: list[StuckRank], now: float) -> str:
    """The text. Ranks that do not answer come first, then those that have waited longest; those with the same stack together.

    Whoever stops first has the others wait for it: they get on until they need it.
    """
    groups: dict[tuple[str, str, str], list[StuckRank]] = {}
    for rank in sorted(ranks, key=lambda rank: (rank.answered, rank.since, rank.rank)):
        stack = rank.stacks[0].partition("\n")[2] if rank.stacks else ""
        groups.setdefault((rank.state, rank.place, stack), []).append(rank)
    return "\n\n".join(_described(members, now) for members in groups.values())


def _described(members: list[StuckRank], now: float) -> str:
    first = members[0]
    numbers = ", ".join(str(rank.rank) for rank in sorted(members, key=lambda rank: rank.rank)[:MOST_RANKS_NAMED])
    more = f" and {len(members) - MOST_RANKS_NAMED} more" if len(members) > MOST_RANKS_NAMED else ""
    many = "s" if len(members) > 1 else ""
    hosts = ", ".join(sorted({rank.host for rank in members})[:MOST_RANKS_NAMED])
    state = f" {'are' if many else 'is'} {first.state};" if first.state else ""
    began = datetime.fromtimestamp(first.since).astimezone().strftime("%H:%M:%S")
    lines = [
        f"rank{many} {numbers}{more} on {hosts}:{state} in {first.place} since {began}, {now - first.since:.1f} s ago"
    ]
    for number, stack in enumerate(first.stacks):
        title = "main thread" if number == 0 else "another thread"
        lines += [f"  {title} (most recent call first):", *(f"  {line}" for line in _frames(stack))]
    if not first.stacks:
        lines.append("  no stack: nobody on its machine could ask it")
    return "\n".join(lines)


def _frames(stack: str) -> list[str]:
    return [re.sub(r'^(\s*)File "(?:.*/site-packages/)?', r'\1File "', line) for line in stack.splitlines()[1:]]
