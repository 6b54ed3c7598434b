"""Report on a finished demo: a loss curve and a sheet of held-out pictures with their answers.

    python tools/demo_report.py --metrics metrics.jsonl --answers answers.jsonl --data FOLDER --out FOLDER

Lines of the metrics file: {step, loss, ..., [eval_loss]}; of the answers file: {id, task, [image], question, answer,
truth, chance, correct}. Image paths are relative to the data folder.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

RIGHT, WRONG, INK, FAINT = "#1a7f37", "#cf222e", "#24292f", "#8c959f"
SHEET_COLUMNS, SHEET_ROWS = 4, 3
CELL_PIXELS, CELL_ASPECT = 90, 0.42
"""Width of a cell in picture pixels (wider pictures shrink), and its height over its width."""
SMOOTHING_STEPS = 20


def loss_curve(metrics_jsonl: Path, out_png: Path) -> None:
    """Draw the training loss by step, its running mean, and the held-out loss where it was measured."""
    rows = _read_jsonl(metrics_jsonl)
    trained = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    heldout = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    steps, losses = (np.array(column) for column in zip(*trained, strict=True))
    figure = _new_figure(8, 4.5)
    axes = figure.subplots()
    axes.plot(steps, losses, color="#54aeff", linewidth=0.7, alpha=0.6, label="training, each step")
    axes.plot(
        steps, _running_mean(losses), color="#0969da", linewidth=1.8, label=f"training, mean of {SMOOTHING_STEPS}"
    )
    if heldout:
        axes.plot(*zip(*heldout, strict=True), color="#bc4c00", marker="o", markersize=4, label="held-out")
    axes.set(xlabel="step", ylabel="loss", title="Loss of the demo run", yscale="log")
    axes.grid(which="both", color="#d0d7de", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out_png)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value and up to `SMOOTHING_STEPS` - 1 before it."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - SMOOTHING_STEPS, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def contact_sheet(answers_jsonl: Path, images_root: Path, out_png: Path) -> None:
    """Draw a dozen held-out pictures, the tasks in turn, with question, answer and truth, right ones green."""
    chosen = _one_of_each_task_in_turn([row for row in _read_jsonl(answers_jsonl) if row.get("image")])
    figure = _new_figure(3 * SHEET_COLUMNS, 2.2 * SHEET_ROWS)
    figure.suptitle("Held-out pictures: question, answer, truth", color=INK, fontsize=14)
    for axes in figure.subplots(SHEET_ROWS, SHEET_COLUMNS).flat:
        axes.axis("off")
        row = next(chosen, None)
        if row is not None:
            _draw_answer(axes, row, images_root)
    figure.savefig(out_png)


def _one_of_each_task_in_turn(rows: Sequence[Row]) -> Iterator[Row]:
    """The first row of every task, then the second of every task, and so on."""
    by_task: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)
    longest = max(map(len, by_task.values()), default=0)
    return (known[index] for index in range(longest) for known in by_task.values() if index < len(known))


def _draw_answer(axes: "Axes", row: Row, images_root: Path) -> None:
    """Draw one cell: every cell has the same shape, every single picture the same scale."""
    paths = [row["image"]] if isinstance(row["image"], str) else row["image"]
    picture = _side_by_side([images_root / path for path in paths])
    height, width = picture.shape
    cell_width = max(width + 6, CELL_PIXELS)
    cell_height = cell_width * CELL_ASPECT
    left, top = (width - cell_width) / 2, (height - cell_height) / 2
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
    axes.set(xlim=(left, left + cell_width), ylim=(top + cell_height, top), box_aspect=CELL_ASPECT)
    axes.set_title(row["question"].rpartition("\n")[2], color=INK, fontsize=10)
    color = RIGHT if row["correct"] else WRONG
    below: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "top"}
    axes.text(0.5, -0.02, row["answer"] or "(nothing)", color=color, fontsize=15, fontweight="bold", **below)
    axes.text(0.5, -0.22, f"truth: {row['truth']}", color=FAINT, fontsize=9, **below)


def _side_by_side(paths: Sequence[Path], gap_pixels: int = 8) -> np.ndarray:
    """The pictures of one question in a row, a white gap between them: uint8 [height, width]."""
    images = [Image.open(path).convert("L") for path in paths]
    width = sum(image.width for image in images) + gap_pixels * (len(images) - 1)
    sheet = Image.new("L", (width, max(image.height for image in images)), 255)
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap_pixels
    return np.asarray(sheet)


def _new_figure(width_inches: float, height_inches: float) -> "Figure":
    """A figure that needs no display, whatever matplotlib is set to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _read_jsonl(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Report on a finished demo.")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.jsonl of the run")
    parser.add_argument("--answers", type=Path, required=True, help="answers to the held-out questions, jsonl")
    parser.add_argument("--data", type=Path, required=True, help="folder image paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="folder for loss_curve.png and contact_sheet.png")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    loss_curve(arguments.metrics, arguments.out / "loss_curve.png")
    contact_sheet(arguments.answers, arguments.data, arguments.out / "contact_sheet.png")


if __name__ == "__main__":
    main()
