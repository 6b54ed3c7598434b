"""How many rows each step has while the global batch grows, and which ones: pure arithmetic on the number of the step.

The rows of a run have one order, whoever reads them and however many a step has: row g comes from stream g modulo
`rows_per_step`. A step takes those that follow the last step's.
"""

from internvl_megatron.config.schema import RunConfig


def rows_of_step(config: RunConfig, step: int) -> range:
    """Numbers of the rows of a step counted from 0, in the order of all rows of the run."""
    ramp, full = config.ramp, config.rows_per_step
    if ramp.start_rows is None:
        return range(step * full, (step + 1) * full)
    assert ramp.ramp_steps is not None, "plan has checked that the ramp is whole"
    first = 0
    for level, rows in enumerate(ramp_levels(config)):
        begin, end = (-(-part * ramp.ramp_steps // num_levels(config)) for part in (level, level + 1))
        if step < end:
            return range(first + (step - begin) * rows, first + (step - begin + 1) * rows)
        first += (end - begin) * rows
    first += (step - ramp.ramp_steps) * full
    return range(first, first + full)


def num_levels(config: RunConfig) -> int:
    """Numbers of rows that steps have before they have all; 0 without a ramp."""
    return len(ramp_levels(config))


def ramp_levels(config: RunConfig) -> range:
    """The numbers of rows that steps have one after the other before they have `rows_per_step`, each for about as many steps."""
    ramp = config.ramp
    if ramp.start_rows is None or ramp.increment_rows is None:
        return range(0)
    return range(ramp.start_rows, config.rows_per_step, ramp.increment_rows)


def ramp_problems(config: RunConfig, data_size: int) -> list[str]:
    """What is wrong with the ramp of a run with so many replicas."""
    ramp, full = config.ramp, config.rows_per_step
    fields = {
        "ramp.start_rows": ramp.start_rows,
        "ramp.increment_rows": ramp.increment_rows,
        "ramp.ramp_steps": ramp.ramp_steps,
    }
    missing = [name for name, value in fields.items() if value is None]
    if len(missing) == len(fields):
        return []
    if ramp.start_rows is None or ramp.increment_rows is None or ramp.ramp_steps is None:
        return [
            f"{', '.join(missing)}: a growing global batch needs all of {', '.join(fields)}; or set them all to null"
        ]
    if ramp.start_rows >= full or (full - ramp.start_rows) % ramp.increment_rows:
        return [
            f"ramp.start_rows={ramp.start_rows} does not reach rows_per_step={full} in steps of "
            f"ramp.increment_rows={ramp.increment_rows}: their difference must be a multiple of the increment, above 0"
        ]
    problems = [
        f"{name}={rows} must be a multiple of the {data_size} replicas"
        for name, rows in (("ramp.start_rows", ramp.start_rows), ("ramp.increment_rows", ramp.increment_rows))
        if rows % data_size
    ]
    if ramp.ramp_steps < num_levels(config):
        problems.append(
            f"ramp.ramp_steps={ramp.ramp_steps} is too few for {num_levels(config)} increments of "
            f"ramp.increment_rows={ramp.increment_rows}: raise one of them"
        )
    if config.fp8.language == "delayed" and config.fp8.backend != "emulated":
        problems.append(
            "fp8.language=delayed: Transformer Engine counts fp8.history_steps in passes of a full step, and with ramp.start_rows "
            "steps have fewer; set fp8.language=current, or leave the ramp out"
        )
    pipeline = config.parallel.pipeline_size
    if config.parallel.virtual_size > 1:
        problems += [
            f"parallel.virtual_size={config.parallel.virtual_size}: {name}={rows} is {rows // data_size} rows of a replica, which "
            f"must be a multiple of {pipeline} (parallel.pipeline_size)"
            for name, rows in (("ramp.start_rows", ramp.start_rows), ("ramp.increment_rows", ramp.increment_rows))
            if rows % data_size == 0 and rows // data_size % pipeline
        ]
    return problems
