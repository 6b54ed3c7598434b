"""Where a run can be watched: TensorBoard, always, and Weights & Biases, if the run asks for it. Both show the same."""

import html
import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from internvl_megatron.errors import ConfigError

TENSORBOARD_FOLDER = "tensorboard"
TENSORBOARD_FLUSH_SECONDS = 10
WANDB_ID_FILE = "wandb_id.txt"
"""In the folder of a run: what Weights & Biases calls it, so that a run that continues is one run there too."""


@dataclass(frozen=True)
class ShownSample:
    """A sample of a run, for people."""

    text: str
    """Plain text of several lines; nothing in it is markup."""
    pictures: list[np.ndarray] = field(default_factory=list)
    """uint8 [height, width, 3] each."""


class Board(Protocol):
    """Shows figures and samples by step. Names are `group/what`."""

    def show_figures(
        self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Mapping[float, int]]
    ) -> None:
        """Add a step's figures; a histogram is how often each value came."""
        ...

    def show_samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        """Add some of a step's samples."""
        ...

    def close(self) -> None:
        """Write out what is still held."""
        ...


class TensorBoard:
    """Event files in the folder of the run."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open them; TensorBoard hides what earlier sessions wrote from `first_step` on."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(folder / TENSORBOARD_FOLDER), purge_step=first_step, flush_secs=TENSORBOARD_FLUSH_SECONDS
        )

    def show_figures(
        self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Mapping[float, int]]
    ) -> None:
        """See `Board`."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        for name, counts in histograms.items():
            if counts:
                values = np.repeat(np.array([*counts]), [*counts.values()])
                self._writer.add_histogram(name, values, step, bins=_edges(counts))  # pyright: ignore[reportArgumentType]

    def show_samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        """As code, in which TensorBoard's markdown leaves everything as it is."""
        for number, sample in enumerate(samples):
            lines = "\n".join(f"    {line}" for line in sample.text.splitlines())
            self._writer.add_text(f"samples/{number}/text", lines, step)
            for place, picture in enumerate(sample.pictures):
                self._writer.add_image(f"samples/{number}/picture_{place}", picture, step, dataformats="HWC")

    def close(self) -> None:
        """See `Board`."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases. Where it goes, and as whom, is told as its users are used to: `wandb login`, WANDB_MODE, ..."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any], is_new: bool) -> None:
        """Begin a run, or go on with the one of the folder.

        Args:
            folder: of the run.
            project: of Weights & Biases.
            name: of the run.
            config: the run's settings, to be found by.
            is_new: the run begins with its first step.

        Raises:
            ConfigError: Weights & Biases does not let it.
        """
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb, known = wandb, folder / WANDB_ID_FILE
        is_new = is_new or not known.exists()
        run_id = uuid.uuid4().hex[:12] if is_new else known.read_text(encoding="utf-8").strip()
        try:
            self._run = wandb.init(
                project=project, name=name, id=run_id, resume="allow", dir=str(folder), config=dict(config)
            )
        except (wandb.errors.Error, OSError, ValueError) as error:
            raise ConfigError(
                f"wandb_project={project}: Weights & Biases refuses the run ({error}); run `wandb login`, or set "
                "WANDB_MODE=offline in the environment, or wandb_project=null"
            ) from error
        if is_new:
            temporary = known.with_name(f".{WANDB_ID_FILE}.partial")
            temporary.write_text(run_id + "\n", encoding="utf-8")
            temporary.replace(known)
        # Not its own count of calls: a run that continues takes some steps again.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def show_figures(
        self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Mapping[float, int]]
    ) -> None:
        """See `Board`."""
        bars = {}
        for name, counts in histograms.items():
            if counts:
                ordered = np.array([counts[value] for value in sorted(counts)])
                bars[name] = self._wandb.Histogram(np_histogram=(ordered, _edges(counts)))
        self._run.log({"step": step, **scalars, **bars})

    def show_samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        """Texts as preformatted HTML, pictures beside them."""
        shown: dict[str, Any] = {"step": step}
        for number, sample in enumerate(samples):
            shown[f"samples/{number}/text"] = self._wandb.Html(f"<pre>{html.escape(sample.text)}</pre>", inject=False)
            if sample.pictures:
                shown[f"samples/{number}/pictures"] = [self._wandb.Image(picture) for picture in sample.pictures]
        self._run.log(shown)

    def close(self) -> None:
        """See `Board`."""
        self._run.finish()


def check_wandb(project: str | None) -> None:
    """See that a run that asks for Weights & Biases can have it.

    Raises:
        ConfigError: it is not installed.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"wandb_project={project}: Weights & Biases is not installed; pip install 'internvl_megatron[wandb]', or set "
            "wandb_project=null"
        )


def _edges(counts: Mapping[float, int]) -> np.ndarray:
    """Bounds of a bar around each of the values, halfway to the next one; one more than there are."""
    values = np.array(sorted(counts), dtype=np.float64)
    between = (values[1:] + values[:-1]) / 2
    return np.concatenate([[values[0] - 0.5], between, [values[-1] + 0.5]])
