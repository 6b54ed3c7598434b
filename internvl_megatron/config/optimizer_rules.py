"""The steps of a learning-rate schedule, and which of its settings go together."""

import math

from internvl_megatron.config.schema import OptimizerConfig


def num_schedule_steps(optimizer: OptimizerConfig, num_steps: int) -> int:
    """Steps from the beginning of warm-up to where the learning rate is at its minimum: those of the run, if nothing else is said."""
    return num_steps if optimizer.schedule_steps is None else optimizer.schedule_steps


def num_warmup_steps(optimizer: OptimizerConfig, num_steps: int) -> int:
    """Steps over which the learning rate rises: as the configuration says, or its share of the schedule, rounded up."""
    if optimizer.warmup_steps is not None:
        return optimizer.warmup_steps
    return math.ceil((optimizer.warmup_ratio or 0.0) * num_schedule_steps(optimizer, num_steps))


def num_decay_steps(optimizer: OptimizerConfig, num_steps: int) -> int:
    """Last steps of a schedule over which `wsd` lets the learning rate fall, rounded up; at least one."""
    return math.ceil(optimizer.final_decay_ratio * num_schedule_steps(optimizer, num_steps))


def schedule_problems(optimizer: OptimizerConfig, num_steps: int) -> list[str]:
    """What is wrong with a schedule in a run of so many steps."""
    warmup_steps, ratio, problems = optimizer.warmup_steps, optimizer.warmup_ratio, []
    horizon = num_schedule_steps(optimizer, num_steps)
    what = f"num_steps={num_steps}" if optimizer.schedule_steps is None else f"optimizer.schedule_steps={horizon}"
    if warmup_steps is not None and ratio:
        problems.append(
            f"optimizer.warmup_steps={warmup_steps} and optimizer.warmup_ratio={ratio} both say how long the learning rate rises; "
            "set one of them to null"
        )
    elif warmup_steps is not None and warmup_steps >= min(horizon, num_steps):
        shorter = what if horizon <= num_steps else f"num_steps={num_steps}"
        problems.append(
            f"optimizer.warmup_steps={warmup_steps} must be below {shorter}, or the learning rate never gets there"
        )
    if optimizer.min_learning_rate > optimizer.learning_rate:
        problems.append(
            f"optimizer.min_learning_rate={optimizer.min_learning_rate} is above "
            f"optimizer.learning_rate={optimizer.learning_rate}"
        )
    if optimizer.schedule_steps is not None and optimizer.schedule == "constant":
        problems.append(
            f"optimizer.schedule_steps={horizon}: a constant learning rate does not fall; leave it out, or choose another "
            "optimizer.schedule"
        )
    elif horizon < num_steps and optimizer.min_learning_rate == 0:
        problems.append(
            f"optimizer.schedule_steps={horizon} is below num_steps={num_steps}, and from there on the learning rate would stay at "
            "optimizer.min_learning_rate=0, so that nothing is learned: set a minimum, or make one of the two as long as the other"
        )
    if optimizer.schedule == "wsd" and not problems:
        rising, falling = num_warmup_steps(optimizer, num_steps), num_decay_steps(optimizer, num_steps)
        if rising + falling > horizon:
            problems.append(
                f"optimizer.schedule=wsd: {rising} steps of warm-up and {falling} of decay "
                f"(optimizer.final_decay_ratio={optimizer.final_decay_ratio}) are more than {what}"
            )
    return problems
