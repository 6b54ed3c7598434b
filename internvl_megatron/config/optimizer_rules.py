"""The steps of a learning-rate schedule, and which of its settings go together."""

import math

from internvl_megatron.config.schema import OptimizerConfig


def num_warmup_steps(optimizer: OptimizerConfig, num_steps: int) -> int:
    """Steps over which the learning rate rises: as the configuration says, or its share of the run, rounded up."""
    if optimizer.warmup_steps is not None:
        return optimizer.warmup_steps
    return math.ceil((optimizer.warmup_ratio or 0.0) * num_steps)


def num_decay_steps(optimizer: OptimizerConfig, num_steps: int) -> int:
    """Last steps of a run over which `wsd` lets the learning rate fall, rounded up; at least one."""
    return math.ceil(optimizer.final_decay_ratio * num_steps)


def schedule_problems(optimizer: OptimizerConfig, num_steps: int) -> list[str]:
    """What is wrong with a schedule over so many steps."""
    warmup_steps, ratio, problems = optimizer.warmup_steps, optimizer.warmup_ratio, []
    if warmup_steps is not None and ratio:
        problems.append(
            f"optimizer.warmup_steps={warmup_steps} and optimizer.warmup_ratio={ratio} both say how long the learning rate rises; "
            "set one of them to null"
        )
    elif warmup_steps is not None and warmup_steps >= num_steps:
        problems.append(
            f"optimizer.warmup_steps={warmup_steps} must be below num_steps={num_steps}, or the learning rate never gets there"
        )
    if optimizer.min_learning_rate > optimizer.learning_rate:
        problems.append(
            f"optimizer.min_learning_rate={optimizer.min_learning_rate} is above "
            f"optimizer.learning_rate={optimizer.learning_rate}"
        )
    if optimizer.schedule == "wsd" and not problems:
        rising, falling = num_warmup_steps(optimizer, num_steps), num_decay_steps(optimizer, num_steps)
        if rising + falling > num_steps:
            problems.append(
                f"optimizer.schedule=wsd: {rising} steps of warm-up and {falling} of decay "
                f"(optimizer.final_decay_ratio={optimizer.final_decay_ratio}) are more than num_steps={num_steps}"
            )
    return problems
