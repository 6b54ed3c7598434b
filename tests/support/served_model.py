"""A server in a process of its own, as people start it."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import Generation
from internvl_megatron.ranks import RankInfo

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Served:
    """A server that answers."""

    url: str
    process: "subprocess.Popen[str]"

    def gauge(self, name: str) -> float:
        """A figure of its `/metrics`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            text = response.read().decode()
        found = re.search(rf"^internvl_megatron_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, f"no {name} in {text}"
        return float(found[1])

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Until nothing is under way: every slot is free."""
        names = ("open_requests", "waiting_sequences", "active_sequences")
        deadline = time.monotonic() + seconds
        while left := {name: value for name in names if (value := self.gauge(name))}:
            assert time.monotonic() < deadline, f"still there after {seconds} s: {left}"
            time.sleep(0.05)

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)


def answers_alone(
    info: RankInfo, model: Path, prompts: Sequence[Prompt], settings: Sequence[Generation]
) -> list[list[str]]:
    """What `generate` answers to every prompt by itself, for each of the settings; the body of a rank."""
    from internvl_megatron.inference.run import open_generator

    with open_generator(info, model, "cpu") as generator:
        return [[generator.generate([prompt], own)[0].text for prompt in prompts] for own in settings]


@contextmanager
def serving(model: Path, *options: str, **environment: str) -> Iterator[Served]:
    """Serve a model at a free port of this machine. What the server writes besides its address goes to the standard error."""
    command = [
        sys.executable,
        "-m",
        "internvl_megatron",
        "serve",
        str(model),
        "--port",
        "0",
        "--device",
        "cpu",
        *options,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True
    )
    try:
        assert process.stdout is not None, "it is a pipe"
        line = process.stdout.readline()
        found = re.search(r" at (http://\S+)$", line)
        assert found is not None, f"the server said {line!r} and ended with {process.wait(timeout=60)}"
        yield Served(found[1], process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
