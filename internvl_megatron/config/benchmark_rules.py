"""What benchmarks during training ask of a run's settings."""

from internvl_megatron.config.overrides import changed_fields
from internvl_megatron.config.schema import BenchmarkConfig, RunConfig


def benchmark_problems(config: RunConfig) -> list[str]:
    """What is wrong with them. Their names are checked where they are read."""
    benchmarks, parallel, problems = config.benchmarks, config.parallel, []
    if benchmarks.every_steps is None:
        unused = [f"benchmarks.{name}" for name in changed_fields(BenchmarkConfig(), benchmarks)]
        if unused:
            problems.append(
                f"{', '.join(unused)}: set, but benchmarks.every_steps is not, so nothing would be scored: say after how many steps "
                "(benchmarks.every_steps=N), or leave it out"
            )
        return problems
    if not benchmarks.names or benchmarks.data is None:
        problems.append(
            "benchmarks.every_steps is set: name some (benchmarks.names) and the folder of their data (benchmarks.data)"
        )
    # Answers come from modules of their own around the run's parameters: these must lie as inference has them.
    unfit = {
        "virtual_size": parallel.virtual_size > 1,
        "context_size": parallel.context_size > 1,
        "vision_tensor_size": parallel.vision_tensor_size > 1,
        "vision_sharding": parallel.vision_sharding != "replicated",
        "vision_placement": parallel.vision_placement != "all_ranks",
    }
    return problems + [
        f"benchmarks.every_steps={benchmarks.every_steps} does not go with parallel.{name}={getattr(parallel, name)}: set it to null, "
        "and score checkpoints with `internvl-megatron evaluate`"
        for name, is_unfit in unfit.items()
        if is_unfit
    ]
