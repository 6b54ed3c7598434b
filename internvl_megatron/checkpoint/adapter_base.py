"""The weights that adapters were trained on: where they are, and how to tell that they are the same.

A run with adapters (LoRA) saves what it trains: adapters, and parts of the model that are trained as a whole. The rest is in the
checkpoint or weights the run started from. A checkpoint names that folder in `base.json`, beside a checksum of every
parameter that is not in the checkpoint, so that adapters are never put on other weights.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from internvl_megatron.checkpoint import folders
from internvl_megatron.errors import CheckpointError

BASE_FILE = "base.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Base:
    """Weights that adapters belong to."""

    path: str
    """Folder of converted weights, or of a checkpoint of a run; absolute."""
    dtype: str
    """Number format in which the run has them: "fp32" or "bf16"."""
    sums: dict[str, int]
    """`bit_sum` of every parameter that the run does not train, by name."""


def is_adapter_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint of a run holds adapters, and names its base."""
    return (folder / BASE_FILE).is_file()


def refuse_adapters(folder: Path) -> None:
    """Refuse a run, or a checkpoint of one, that holds adapters where whole weights are wanted.

    Raises:
        CheckpointError: says how to make whole weights of it.
    """
    checkpoints = [folder, *folders.finished(folder / folders.CHECKPOINTS)[-1:]]
    if any(is_adapter_checkpoint(path) for path in checkpoints):
        raise CheckpointError(
            f"{folder}: holds adapters and not the weights they belong to; merge them first: "
            f"python -m checkpoint_convert hf-to-megatron {folder} TARGET"
        )


def base_bytes(base: Base) -> bytes:
    """`base.json`: the note in a checkpoint on what its adapters belong to."""
    content = {"format_version": FORMAT_VERSION, **asdict(base)}
    return (json.dumps(content, indent=1) + "\n").encode()


def read_base(folder: Path) -> Base:
    """What the adapters of a checkpoint belong to.

    Raises:
        CheckpointError: the file is missing, damaged or of another version.
    """
    path = folder / BASE_FILE
    try:
        fields = json.loads(path.read_text())
        version = fields.pop("format_version")
        base = Base(**fields)
        whole = [isinstance(base.path, str), base.dtype in ("fp32", "bf16"), isinstance(base.sums, dict)]
        if not all(whole) or any(type(value) is not int for value in base.sums.values()):
            raise ValueError("a field has another type")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing: the checkpoint holds a whole model, not adapters; leave lora.language_rank and "
            "lora.vision_rank out"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another checkpoint") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}, this program reads version {FORMAT_VERSION}")
    return base


def base_folder(folder: Path, base: Base) -> Path:
    """Folder of the weights that a checkpoint's adapters belong to.

    Raises:
        CheckpointError: it is gone.
    """
    if not Path(base.path).is_dir():
        raise CheckpointError(
            f"{folder}: its adapters belong to the weights in {base.path}, which is not there; put them back, or write their "
            f'new place into {folder / BASE_FILE} ("path")'
        )
    return Path(base.path)


def check_sums(folder: Path, wanted: Mapping[str, int], found: Mapping[str, int], where: str) -> None:
    """Compare checksums of a checkpoint's base with those of weights.

    Args:
        folder: of the checkpoint.
        wanted: what the checkpoint says.
        found: of the weights.
        where: they are.

    Raises:
        CheckpointError: they differ; names the first parameter.
    """
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differing:
        raise CheckpointError(
            f"{folder}: its adapters were trained on other weights than those of {where}: {len(differing)} of "
            f"{len(wanted)} parameters differ, the first is {differing[0]}; give those it was trained on"
        )
