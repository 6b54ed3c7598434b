"""Which kernels go together with which device and layout, as far as the configuration alone can tell.

What is installed is known only where a run starts: `Device.kernels` refuses the rest.
"""

from internvl_megatron.config.schema import RunConfig


def kernel_problems(config: RunConfig) -> list[str]:
    """What is wrong with the kernels a run asks for."""
    kernels, fp8 = config.kernels, config.fp8
    problems = []
    if config.device == "cpu":
        wanted = {
            "kernels.layers": (kernels.layers, ("auto", "torch")),
            "kernels.attention": (kernels.attention, ("auto", "sdpa")),
            "fp8.backend": (fp8.backend, ("auto", "emulated")),
        }
        problems += [
            f"{name}={value}: its kernels need a GPU, and device=cpu; set {name}={possible[1]} or leave it out"
            for name, (value, possible) in wanted.items()
            if value not in possible
        ]
    sharded = config.parallel.vision_sharding == "sharded"
    if kernels.layers == "transformer_engine" and sharded:
        problems.append(
            "kernels.layers=transformer_engine: with parallel.vision_sharding=sharded the vision encoder is made without "
            "values, where Transformer Engine does not mark what belongs to which rank; leave kernels.layers out: the "
            "language model then has Transformer Engine's layers and the vision encoder torch's"
        )
    if fp8.backend == "transformer_engine":
        parts = {"language": fp8.language, "vision": fp8.vision, "projector": fp8.projector}
        of_torch = set(parts) if kernels.layers == "torch" else {"vision", "projector"} if sharded else set()
        reason = "kernels.layers=torch" if kernels.layers == "torch" else "parallel.vision_sharding=sharded"
        problems += [
            f"fp8.{part}={recipe}: fp8.backend=transformer_engine needs its layers, and {reason} means torch's; change "
            "one of them, or set fp8.backend=emulated"
            for part, recipe in parts.items()
            if recipe != "none" and part in of_torch
        ]
    if fp8.gather_parameters:
        problems.append(
            "fp8.gather_parameters=true: the optimizer would take its fp32 weights from those that are rounded to FP8 wherever "
            "weights are loaded; set it to false until it takes them from the file"
        )
    return problems
