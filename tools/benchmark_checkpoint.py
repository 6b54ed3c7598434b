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
from typing import Any

from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.config.schema import CheckpointConfig, RunConfig
from internvl_megatron.launcher import launch
from internvl_megatron.ranks import RankInfo
from tools.machine_record import machine_record

BYTES_PER_PARAMETER = 16
"""In fp32: the weight, and AdamW's copy of it and two moments."""
TILES_PER_IMAGE = 4


def config_of_size(num_bytes: float) -> RunConfig:
    """The demo's recipe on one rank, with a language model wide enough for so many bytes of state."""
    base = demo_digits()
    parallel = replace(base.parallel, tensor_size=1, pipeline_size=1)
    hidden = 64 * round((num_bytes / BYTES_PER_PARAMETER / 4 / 11.5) ** 0.5 / 64)
    language = replace(base.model.language, hidden_size=hidden, ffn_hidden_size=3 * hidden, head_size=hidden // 4)
    data = replace(base.data, tokens_per_row=512, tiles_per_row=32)
    return replace(base, model=replace(base.model, language=language), parallel=parallel, data=data)


def save_rank(info: RankInfo, config: RunConfig, folder: str, repeats: int) -> dict[str, Any]:
    """Body of the rank: seconds of every save, by kind."""
    import torch

    from internvl_megatron.checkpoint import folders, save_load
    from internvl_megatron.checkpoint.optimizer_layout import optimizer_layout
    from internvl_megatron.checkpoint.saver import Saver
    from internvl_megatron.device import open_device
    from internvl_megatron.logs import configure_logging
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.layout import Layout
    from internvl_megatron.ranks import joined
    from internvl_megatron.train.step import Step
    from tools.benchmark import SyntheticStep

    configure_logging(info.rank)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = open_device(config.device, info.local_rank)
    seconds: dict[str, list[float]] = {
        name: [] for name in ("synchronous", "blocked", "polls", "written", "step_alone", "step_beside")
    }
    with joined(info, device, 600):
        groups = make_groups(Layout(1, 1, 1), device, 600)
        model = build_model(config, groups, device)
        step = Step(config, model, groups, device)
        root = Path(folder)
        saver = Saver(root, CheckpointConfig(keep_last=1), groups)
        batch: Any = SyntheticStep(config.model, 1, config.data.tokens_per_row, TILES_PER_IMAGE, seed=0)
        number = 0

        def train() -> float:
            nonlocal number
            start = time.perf_counter()
            step.run(batch, number)
            number += 1
            return time.perf_counter() - start

        def start_save() -> None:
            info = folders.CheckpointInfo(
                number, 0, 0, "benchmark", optimizer_state=True, optimizer_layout=optimizer_layout(config, groups)
            )
            assert saver.start(save_load.state_to_save(info, model, step.optimizer, groups, None)), (
                "nothing is under way"
            )

        for repeat in range(repeats + 1):  # the first save gets its memory
            alone = statistics.median(train() for _ in range(3))
            began = time.perf_counter()
            start_save()
            assert saver.wait(), "the disk takes it"
            synchronous = time.perf_counter() - began
            train()
            began = time.perf_counter()
            start_save()
            blocked = time.perf_counter() - began
            polls, beside = 0.0, []
            while saver.is_saving:
                beside.append(train())
                before = time.perf_counter()
                saver.poll()
                polls += time.perf_counter() - before
            written = time.perf_counter() - began
            if repeat:
                values = (synchronous, blocked, polls, written, alone, statistics.median(beside))
                for name, value in zip(seconds, values, strict=True):
                    seconds[name].append(value)
        newest = folders.finished(root)[-1]
        num_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        saver.close()
    share = [
        (blocked + polls) / synchronous
        for blocked, polls, synchronous in zip(
            seconds["blocked"], seconds["polls"], seconds["synchronous"], strict=True
        )
    ]
    return {
        "checkpoint_bytes": num_bytes,
        "blocked_share": statistics.median(share),
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
