"""The engine in a process that another program owns: one rank by itself, as harnesses for evaluation want their models."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

from internvl_megatron.device import DeviceName
from internvl_megatron.errors import ConfigError
from internvl_megatron.inference.run import load_generator, open_place
from internvl_megatron.inference.settings import Limits, Setup
from internvl_megatron.ranks import RankInfo


class LoneEngine:
    """A generator that is open until `close`."""

    def __init__(self, folder: str, device: str | None = None, max_sequences: int | None = None) -> None:
        """Load a model (`load_generator`).

        Args:
            folder: of a run, a checkpoint, converted weights, or a Hugging Face checkpoint.
            device: "cpu", "cuda" or "auto"; None = auto.
            max_sequences: answers that grow together; None = `Limits`' own number.

        Raises:
            ConfigError: there are more ranks, the device is unknown, or the model is not to be had there.
            CheckpointError: there is no model.
        """
        world_size = os.environ.get("WORLD_SIZE", "1")
        if world_size != "1":
            raise ConfigError(
                f"WORLD_SIZE={world_size}: inside another harness the engine is one rank; start it without torchrun or "
                "accelerate, or use `internvl-megatron evaluate --nproc`, which divides questions and models over ranks"
            )
        chosen = next((name for name in get_args(DeviceName) if name == (device or "auto").split(":")[0]), None)
        if chosen is None:
            raise ConfigError(f"device: must be {', '.join(get_args(DeviceName))}, not {device!r}")
        setup = Setup(limits=Limits() if max_sequences is None else Limits(max_sequences=max_sequences))
        with ExitStack() as opening:
            store = Path(opening.enter_context(tempfile.TemporaryDirectory(prefix="internvl-rank-"))) / "store"
            place = opening.enter_context(open_place(RankInfo(0, 1, 0, 1, f"file://{store}"), chosen, setup))
            self.generator = load_generator(Path(folder), place)
            self._open = opening.pop_all()

    def close(self) -> None:
        """Give back what the process holds for it; nothing happens the second time."""
        self._open.close()
