"""Small runs of the demo's recipe: a little of its data, on one rank unless overridden."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.config.schema import RunConfig
from tools.prepare_demo import Amounts, prepare

FEW = Amounts(
    num_pictures=60,
    num_pairs=12,
    num_texts=20,
    num_heldout_pictures=12,
    num_heldout_pairs=6,
    num_heldout_texts=6,
    questions_per_task=4,
)


def small_data(folder: Path) -> Path:
    """Write a small version of the demo's data; the folder."""
    prepare(folder, amounts=FEW)
    return folder


def small_run_settings(data: Path, run: Path) -> list[str]:
    """Overrides of `demo_digits`: short rows, no held-out loss, a rate that does not depend on how many steps there are to be."""
    return [
        f"data.meta={data / 'train_meta.json'}",
        f"data.tokenizer={data / 'tokenizer'}",
        f"folder={run}",
        "data.eval_meta=null",
        "eval_every_steps=null",
        "data.tokens_per_row=512",
        "data.tiles_per_row=32",
        "data.num_workers=0",
        "parallel.tensor_size=1",
        "parallel.pipeline_size=1",
        "optimizer.schedule=constant",
        "optimizer.warmup_ratio=0",
    ]


def small_run(data: Path, run: Path, *overrides: str) -> RunConfig:
    """The configuration these make; later settings of a field win."""
    return apply_overrides(demo_digits(), [*small_run_settings(data, run), *overrides])


def read_lines(path: Path) -> list[Any]:
    """What a file of JSON lines holds."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Write one."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
