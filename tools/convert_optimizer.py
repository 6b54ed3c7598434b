"""Turn the optimizer state of a run's checkpoint from the fast format into the layout-free one, or back.

    python -m tools.convert_optimizer RUN [--step N] [--to layout_free|same_layout] [section.field=value ...]

The checkpoint is replaced when the new one is whole. It is read under the layout of the run's config.json, by as many local ranks as one
replica has, or by the ranks torchrun or srun has started; nothing is trained and no data are read. `--to same_layout` with settings
(`parallel.tensor_size=4`) makes the fast format of another layout.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from internvl_megatron.checkpoint import folders
from internvl_megatron.config.overrides import CONFIG_FILE, apply_overrides, from_json
from internvl_megatron.config.plan import plan
from internvl_megatron.config.schema import KernelConfig, RunConfig
from internvl_megatron.errors import CheckpointError, UserError
from internvl_megatron.launcher import RankFailedError, launch
from internvl_megatron.ranks import RankInfo, rank_from_environment


def convert_rank(info: RankInfo, config: RunConfig, folder: Path, layout_free: bool) -> str:
    """Body of a rank: load, and save in the other format; returns the layout that the optimizer's state then belongs to."""
    from internvl_megatron.checkpoint import adapter_base, save_load
    from internvl_megatron.checkpoint.optimizer_layout import optimizer_layout
    from internvl_megatron.checkpoint.saver import Saver
    from internvl_megatron.device import open_device
    from internvl_megatron.logs import configure_logging
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from internvl_megatron.train.step import Step

    configure_logging(info.rank)
    device, timeout = open_device(config.device, info.local_rank), config.parallel.collective_timeout_seconds
    with joined(info, device, timeout):
        planned = plan(config, info.world_size)
        groups = make_groups(planned.layout, device, timeout, planned.vision_layout)
        model = build_model(config, groups, device, initialize=False)
        step = Step(config, model, groups, device)
        own = optimizer_layout(config, groups)
        marker, positions = save_load.load(folder, model, step.optimizer, groups, own_layout=own)
        marker = replace(marker, layout=str(planned.layout), optimizer_layout=None if layout_free else own)
        base = adapter_base.read_base(folder) if model.has_adapters else None
        step.gather_parameters()
        saver = Saver(
            folder.parent, replace(config.checkpoint, keep_last=len(folders.finished(folder.parent))), groups
        )
        # Positions of all streams in one file: whoever reads them joins all files.
        state = positions if info.rank == 0 else None
        saver.start(save_load.state_to_save(marker, model, step.optimizer, groups, state, base))
        if not saver.wait():
            raise CheckpointError(f"{folder}: could not be written again; it is as it was")
        saver.close()
        return marker.optimizer_layout or "any layout"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 (a rank failed) or 2 (the user can mend it)."""
    parser = argparse.ArgumentParser(description="Convert the optimizer state of a checkpoint.")
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument("--to", choices=("layout_free", "same_layout"), default="layout_free")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    try:
        fits = convert(options.run, options.overrides, options.step, options.to == "layout_free", options.device)
    except UserError as error:
        print(f"convert_optimizer: {error}", file=sys.stderr)
        return 2
    except RankFailedError as error:
        first = error.failures[0]
        print(f"convert_optimizer: {first.text if first.is_user_error else error}", file=sys.stderr)
        return 2 if first.is_user_error else 1
    print(f"{options.run}: the optimizer state now fits {fits}")
    return 0


def convert(run: Path, overrides: Sequence[str], step: int | None, layout_free: bool, device: str) -> str:
    """Convert a checkpoint of a run; returns the layout its optimizer's state then fits.

    Raises:
        UserError: there is no such checkpoint, or it does not fit the settings.
        RankFailedError: a rank failed.
    """
    root = run / folders.CHECKPOINTS
    found = folders.finished(root) if step is None else [folders.path_of(root, step)]
    if not found:
        raise CheckpointError(f"{run}: no finished checkpoint")
    marker = folders.read_info(found[-1])
    if not marker.optimizer_state:
        raise CheckpointError(f"{found[-1]}: has no optimizer state")
    # The run's kernels may not be here.
    config = replace(from_json(run / CONFIG_FILE), kernels=KernelConfig())
    config = apply_overrides(config, [*overrides, f"device={device}"])
    info = rank_from_environment()
    if info is not None:
        return convert_rank(info, config, found[-1], layout_free)
    parallel = config.parallel
    num_ranks = parallel.tensor_size * parallel.pipeline_size * parallel.context_size
    return launch(convert_rank, num_ranks, config, found[-1], layout_free, device=config.device)[0]


if __name__ == "__main__":
    sys.exit(main())
