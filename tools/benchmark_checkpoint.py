"""How long training waits for a checkpoint, written while it goes on and not, as one JSON record.

    python -m tools.benchmark checkpoint [--megabytes N] [--folder DIR] [--repeats N] [--output FILE]

One rank trains a narrow model on synthetic rows; in turn it saves and waits for the disk, and saves while it trains. Both write the same
bytes to the same disk, flushed. The demo's model is saved too.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.config.schema import CheckpointConfig, RunConfig
from internvl_megatron.launcher import launch
from internvl_megatron.ranks import RankInfo
from tools.machine_record import machine_record

if TYPE_CHECKING:
    from internvl_megatron.device import Device

BYTES_PER_PARAMETER = 16
"""In fp32: the weight, and AdamW's copy of it and two moments."""
TILES_PER_IMAGE = 1


def config_of_size(num_bytes: float) -> RunConfig:
    """The demo's recipe on one rank, with a language model wide enough for so many bytes of state."""
    base = demo_digits()
    parallel = replace(base.parallel, tensor_size=1, pipeline_size=1)
    hidden = 64 * round((num_bytes / BYTES_PER_PARAMETER / 4 / 11.5) ** 0.5 / 64)
    language = replace(base.model.language, hidden_size=hidden, ffn_hidden_size=3 * hidden, head_size=hidden // 4)
    data = replace(base.data, tokens_per_row=192, tiles_per_row=32)
    return replace(base, model=replace(base.model, language=language), parallel=parallel, data=data)


class TrainedSaves:
    """A run of one rank on made-up pictures that can be saved at any step."""

    def __init__(self, config: RunConfig, device: "Device", root: Path) -> None:
        """Build it; its checkpoints go to `root`."""
        from internvl_megatron.checkpoint.saver import Saver
        from internvl_megatron.model.build import build_model
        from internvl_megatron.parallel.groups import make_groups
        from internvl_megatron.parallel.layout import Layout
        from internvl_megatron.train.step import Step
        from tools.benchmark import SyntheticStep

        self.config = config
        self.groups = make_groups(Layout(1, 1, 1), device, 600)
        self.model = build_model(config, self.groups, device)
        self.step = Step(config, self.model, self.groups, device)
        self.saver = Saver(root, CheckpointConfig(keep_last=1), self.groups)
        self._batch: Any = SyntheticStep(config.model, 1, config.data.tokens_per_row, TILES_PER_IMAGE, seed=0)
        self._number = 0

    def train(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.step.run(self._batch, self._number)
        self._number += 1
        return time.perf_counter() - start

    def start_save(self) -> None:
        """Begin a save, which goes on beside training."""
        from internvl_megatron.checkpoint import folders, save_load
        from internvl_megatron.checkpoint.optimizer_layout import optimizer_layout

        layout = optimizer_layout(self.config, self.groups)
        info = folders.CheckpointInfo(self._number, 0, 0, "benchmark", optimizer_state=True, optimizer_layout=layout)
        state = save_load.state_to_save(info, self.model, self.step.optimizer, self.groups, None)
        assert self.saver.start(state), "nothing is under way"

    def measure_once(self) -> dict[str, float]:
        """Seconds of a save that training waits for and of one that goes on beside it."""
        alone = statistics.median(self.train() for _ in range(2))
        began = time.perf_counter()
        self.start_save()
        assert self.saver.wait(), "the disk takes it"
        synchronous = time.perf_counter() - began
        self.train()
        began = time.perf_counter()
        self.start_save()
        blocked = time.perf_counter() - began
        polls, beside = 0.0, list[float]()
        while self.saver.is_saving:
            beside.append(self.train())
            before = time.perf_counter()
            self.saver.poll()
            polls += time.perf_counter() - before
        return {
            "synchronous": synchronous,
            "blocked": blocked,
            "polls": polls,
            "written": time.perf_counter() - began,
            "step_alone": alone,
            "step_beside": statistics.median(beside),
        }


def save_rank(info: RankInfo, config: RunConfig, folder: str, repeats: int) -> dict[str, Any]:
    """Body of the rank: seconds of every save, by kind."""
    import torch

    from internvl_megatron.checkpoint import folders
    from internvl_megatron.device import open_device
    from internvl_megatron.logs import configure_logging
    from internvl_megatron.ranks import joined

    configure_logging(info.rank)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device, root = open_device(config.device, info.local_rank), Path(folder)
    with joined(info, device, 600):
        run = TrainedSaves(config, device, root)
        run.measure_once()  # the first save gets its memory
        saves = [run.measure_once() for _ in range(repeats)]
        newest = folders.finished(root)[-1]
        num_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        run.saver.close()
    seconds = {name: [save[name] for save in saves] for name in saves[0]}
    return {
        "checkpoint_bytes": num_bytes,
        "blocked_share": statistics.median((save["blocked"] + save["polls"]) / save["synchronous"] for save in saves),
        "medians": {name: statistics.median(values) for name, values in seconds.items()},
        "seconds": seconds,
    }


def measure(options: argparse.Namespace) -> int:
    """Measure and write one record."""
    result: dict[str, Any] = {"name": "checkpoint", **machine_record(), "load_average": os.getloadavg()[0]}
    large = config_of_size(options.megabytes * 1e6)
    configs = {"large": large, "demo": replace(large, model=demo_digits().model)}
    for name, config in configs.items():
        folder = tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=options.folder)
        try:
            result[name] = launch(save_rank, 1, config, folder, options.repeats, device=config.device)[0]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        result[name]["language"] = asdict(config.model.language)
    text = json.dumps(result, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")
    return 0


def add_command(commands: Any) -> None:
    """Add the command to the benchmark's."""
    parser = commands.add_parser("checkpoint", help="how long training waits for a checkpoint")
    parser.add_argument("--megabytes", type=int, default=600, help="of state, about")
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to write to; default: that of temporary files"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file to write; default: print only")
    parser.set_defaults(run=measure)
