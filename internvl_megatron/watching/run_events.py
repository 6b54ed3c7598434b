"""What happened to a run besides its steps: bad steps, rewinds, saves that failed. `events.jsonl` in its folder, which only grows."""

import json
import time
from pathlib import Path

EVENTS_FILE = "events.jsonl"


class RunEvents:
    """Writes events; rank 0 of a run has one."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVENTS_FILE

    def write(self, step: int, event: str, text: str) -> None:
        """Add a line: {"time": seconds since 1970, "step": steps taken, "event": its kind, "text": for people}."""
        line = {"time": round(time.time(), 3), "step": step, "event": event, "text": text}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
