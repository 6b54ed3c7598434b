"""The same training twice, here and by a plain Hugging Face loop, on the same packed rows: two loss curves and their difference.

    python -m tools.huggingface_curve WORK [--steps N] [--ranks {1,2,4}] [--output FILE.json]

A narrow InternVL3 (the demo's, 1.8 M parameters) with transformers' own random weights is saved by transformers, converted, and
trained by the command line on real pictures of digits, texts and V2PE positions, by default on TP2 x PP2. The other loop is
transformers' `InternVLForConditionalGeneration` in one process from the same folder: torch's AdamW, clipping and cosine schedule,
block-diagonal masks, no line of the trainer but the data's. Both in fp32 on the CPU. Writes both curves as JSON and, with
matplotlib, a picture beside it. Exit status 1 if the curves differ by more than `TOLERANCE` of the loss in any step.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.files import write_whole
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.step_rows import StepRows
from internvl_megatron.data.stream import SampleStream
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.watching.metrics import METRICS_FILE, read_metrics
from tools.huggingface_baseline import MicroBatch, packed_batches, transformers_config, weighted_loss_sum
from tools.machine_record import is_installed, machine_record
from tools.prepare_demo import Amounts, prepare

NUM_STEPS = 500
TOLERANCE = 0.005
"""Of the loss, in every step."""
LAYOUTS = {
    1: ("parallel.tensor_size=1", "parallel.pipeline_size=1"),
    2: ("parallel.tensor_size=2", "parallel.pipeline_size=1", "parallel.sequence_parallel=true"),
    4: ("parallel.tensor_size=2", "parallel.pipeline_size=2", "parallel.sequence_parallel=true"),
}
SETTINGS = (
    "data.eval_meta=null",
    "eval_every_steps=null",
    "checkpoint.save_every_steps=null",
    "data.tokens_per_row=512",
    "data.tiles_per_row=32",
    "rows_per_step=2",
    "optimizer.learning_rate=1e-4",
    "optimizer.beta2=0.999",
)
"""Changes to the demo's recipe."""


def run_config(work: Path, num_steps: int) -> RunConfig:
    """What is trained, but for the layout."""
    data = [f"data.meta={work / 'data' / 'train_meta.json'}", f"data.tokenizer={work / 'data' / 'tokenizer'}"]
    config = apply_overrides(demo_digits(), [*SETTINGS, *data, f"num_steps={num_steps}", f"folder={work / 'ours'}"])
    vocab_size = len(load_tokenizer(config.data.tokenizer))
    return replace(config, model=replace(config.model, language=replace(config.model.language, vocab_size=vocab_size)))


def save_first_weights(config: RunConfig, folder: Path) -> None:
    """transformers' model with its own random weights, as transformers saves it."""
    from transformers import InternVLForConditionalGeneration

    tokenizer = load_tokenizer(config.data.tokenizer)
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(transformers_config(config.model, tokenizer.image_context_id))
    model.save_pretrained(folder)
    tokenizer.save(folder)


def train_here(config: RunConfig, work: Path, num_ranks: int) -> list[float]:
    """Losses of the command line's run from these weights; its output goes to the terminal."""
    convert = ["checkpoint_convert", "hf-to-megatron", str(work / "first"), str(work / "weights")]
    overrides = [
        *SETTINGS,
        *LAYOUTS[num_ranks],
        f"data.meta={config.data.meta}",
        f"data.tokenizer={config.data.tokenizer}",
        f"model.language.vocab_size={config.model.language.vocab_size}",
        f"num_steps={config.num_steps}",
        f"folder={config.folder}",
        f"checkpoint.load={work / 'weights'}",
    ]
    train = ["internvl_megatron", "train", "demo_digits", *overrides, "--nproc", str(num_ranks)]
    for arguments in (convert, train):
        subprocess.run([sys.executable, "-m", *arguments], check=True)
    return [row["loss"] for row in read_metrics(Path(config.folder) / METRICS_FILE)]


def batches_of_steps(config: RunConfig) -> Iterator[list[MicroBatch]]:
    """The rows that training draws, step by step, with their pictures."""
    settings, tokenizer = SampleSettings.of_run(config), load_tokenizer(config.data.tokenizer)
    datasets, count = load_datasets(config.data.meta), config.rows_per_step
    streams = [SampleStream(datasets, settings, tokenizer, number, count) for number in range(count)]
    while True:
        rows = [stream.next_row() for stream in streams]
        yield packed_batches(rows, StepRows(rows, range(count), settings, 0, 1).tiles().tiles)


def learning_rate_factor(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Linear warm-up, then half a cosine down to nothing; steps count from 0."""
    num_warmup = math.ceil(warmup_ratio * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))


def train_with_huggingface(config: RunConfig, folder: Path) -> list[float]:
    """Losses of the plain loop."""
    from transformers import InternVLForConditionalGeneration

    torch.set_num_threads(1)  # small tensors: more threads only wait for each other
    model: Any = InternVLForConditionalGeneration.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model.train()
    rule, losses = config.optimizer, []
    optimizer = torch.optim.AdamW(
        model.parameters(), rule.learning_rate, (rule.beta1, rule.beta2), rule.eps, rule.weight_decay
    )
    ratio = rule.warmup_ratio or 0.0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, config.num_steps, ratio)
    )
    for _, batches in zip(range(config.num_steps), batches_of_steps(config), strict=False):
        total_weight = sum(batch.weights.double().sum() for batch in batches)
        total = 0.0
        for batch in batches:
            loss = weighted_loss_sum(model, batch, "sdpa") / total_weight
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), rule.clip_grad_norm or math.inf)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Differences relative to the loss of the other loop."""
    differences = [abs(one - other) / other for one, other in zip(ours, theirs, strict=True)]
    largest = max(differences)
    return {
        "largest_difference": largest,
        "at_step": differences.index(largest) + 1,
        "mean_difference": sum(differences) / len(differences),
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Both curves, and their difference below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ours, theirs, layout = record["ours"], record["huggingface"], record["layout"]
    steps = range(1, len(ours) + 1)
    figure = Figure(figsize=(8, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, height_ratios=(3, 1), sharex=True)
    above.plot(steps, theirs, color="#bc4c00", linewidth=2.4, alpha=0.6, label="transformers, one process")
    above.plot(steps, ours, color="#0969da", linewidth=0.9, label=f"internvl_megatron, {layout}")
    above.set(ylabel="loss", title=f"A narrow InternVL3 on the same packed rows, fp32 on a CPU, {record['date']}")
    above.legend(frameon=False)
    percent = [100 * abs(one - other) / other for one, other in zip(ours, theirs, strict=True)]
    below.plot(steps, percent, color="#24292f", linewidth=0.8)
    below.axhline(100 * TOLERANCE, color="#cf222e", linestyle="--", linewidth=0.8)
    below.set(xlabel="step", ylabel="difference, % of loss", yscale="log", ylim=(1e-6, 2))
    for axes in (above, below):
        axes.grid(color="#d0d7de", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def curves(work: Path, num_steps: int, num_ranks: int) -> dict[str, Any]:
    """Train both ways in a folder; the record of it."""
    amounts = Amounts(
        num_pictures=2000, num_pairs=600, num_texts=600, num_heldout_pictures=4, num_heldout_pairs=4,
        num_heldout_texts=4, questions_per_task=1,
    )  # fmt: skip
    prepare(work / "data", amounts=amounts)
    config = run_config(work, num_steps)
    save_first_weights(config, work / "first")
    ours = train_here(config, work, num_ranks)
    theirs = train_with_huggingface(config, work / "first")
    return {
        "what": "training loss of every step, here and by a plain transformers loop, on the same packed rows",
        **machine_record(),
        "layout": ", ".join(part.removeprefix("parallel.") for part in LAYOUTS[num_ranks]),
        "settings": list(SETTINGS),
        "steps": num_steps,
        **compare(ours, theirs),
        "tolerance": TOLERANCE,
        "ours": [round(loss, 7) for loss in ours],
        "huggingface": [round(loss, 7) for loss in theirs],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, write; exit status 0, or 1 if the curves differ."""
    parser = argparse.ArgumentParser(description="Compare a training with a plain Hugging Face loop.")
    parser.add_argument("work", type=Path, help="empty folder for data, weights and the run")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"default: {NUM_STEPS}")
    parser.add_argument("--ranks", type=int, choices=tuple(LAYOUTS), default=4, help="default: 4, TP2 x PP2")
    parser.add_argument("--output", type=Path, help="JSON to write; a picture goes beside it")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    record = curves(options.work.resolve(), options.steps, options.ranks)
    if options.output is not None:
        write_whole(options.output, json.dumps(record, indent=1) + "\n")
        if is_installed("matplotlib"):
            draw(record, options.output.with_suffix(".png"))
    print(
        f"{options.steps} steps: loss {record['ours'][0]:.4f} to {record['ours'][-1]:.4f}; largest difference "
        f"{record['largest_difference']:.2e} of the loss in step {record['at_step']}, mean {record['mean_difference']:.2e}"
    )
    return int(record["largest_difference"] > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
