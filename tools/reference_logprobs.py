"""Score the pairs of an MPO run with its reference model, ahead of the run.

    python -m tools.reference_logprobs OUTPUT RECIPE [section.field=value ...] [--nproc N]

RECIPE and settings are those of the run (loss.kind=mpo, checkpoint.load=WEIGHTS, data.meta=..); layout and rows_per_step may
differ. The run then takes `mpo.reference_file=OUTPUT` and makes no passes of the reference model. On several nodes start it
with torchrun or srun, as the run.
"""

import argparse
import sys
from dataclasses import replace

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.errors import ConfigError, UserError

SCORE_RANK = "internvl_megatron.score_reference:score_rank"


def main(arguments: list[str] | None = None) -> int:
    """Run it; 2 if the user can mend what went wrong."""
    from internvl_megatron.launcher import RankFailedError, launch
    from internvl_megatron.ranks import rank_from_environment

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("output", help="file to write")
    parser.add_argument("recipe", help="name of the run's recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings of the run")
    parser.add_argument("--nproc", type=int, help="local ranks to start (default: 1)")
    options = parser.parse_args(arguments)
    try:
        config = scoring(apply_overrides(find_recipe(options.recipe), options.overrides))
        info = rank_from_environment()
        if info is not None:
            from internvl_megatron.score_reference import score_rank

            num_pairs = score_rank(info, config, options.output)
        else:
            plan(config, options.nproc or 1)
            num_pairs = launch(SCORE_RANK, options.nproc or 1, config, options.output, device=config.device)[0]
    except (UserError, RankFailedError) as error:
        print(f"reference_logprobs: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) or error.failures[0].is_user_error else 1
    if num_pairs:
        print(f"{options.output}: {num_pairs} pairs")
    return 0


def scoring(config: RunConfig) -> RunConfig:
    """The run's configuration as scoring needs it.

    Raises:
        ConfigError: it does not train on pairs.
    """
    if config.loss.kind != "mpo":
        raise ConfigError(f"loss.kind={config.loss.kind}: only MPO has a reference model; set loss.kind=mpo")
    if config.data.v2pe == "random":
        raise ConfigError("data.v2pe=random: no two passes see the same positions; set data.v2pe=fixed")
    return replace(config, mpo=replace(config.mpo, reference_file=None))


if __name__ == "__main__":
    sys.exit(main())
