"""Which kernels go together with which device and layout, as far as the configuration alone can tell.

What is installed is known only where a run starts: `Device.kernels` refuses the rest.
"""

from internvl_megatron.config.schema import RunConfig


def kernel_problems(config: RunConfig) -> list[str]:
    """What is wrong with the kernels a run asks for."""
    kernels, problems = config.kernels, []
    if config.device == "cpu":
        wanted = {
            "kernels.layers": (kernels.layers, ("auto", "torch")),
            "kernels.attention": (kernels.attention, ("auto", "sdpa")),
            "kernels.vision_attention": (kernels.vision_attention, ("auto", "sdpa")),
            "kernels.fuse_rotary": (kernels.fuse_rotary, ("auto", "off")),
            "optimizer.moments": (config.optimizer.moments, ("fp32",)),
        }
        problems += [
            f"{name}={value}: its kernels need a GPU, and device=cpu; set {name}={possible[-1]} or leave it out"
            for name, (value, possible) in wanted.items()
            if value not in possible
        ]
    sharded = config.parallel.vision_sharding == "sharded"
    if config.optimizer.moments == "bf16":
        needed = {
            "optimizer.name=adamw": config.optimizer.name == "adamw",
            "dtype=bf16": config.dtype == "bf16",
            "parallel.vision_sharding=replicated": not sharded,
        }
        problems += [f"optimizer.moments=bf16: needs {what}" for what, holds in needed.items() if not holds]
    if kernels.layers == "transformer_engine" and sharded:
        problems.append(
            "kernels.layers=transformer_engine: with parallel.vision_sharding=sharded the vision encoder is made without "
            "values, where Transformer Engine does not mark what belongs to which rank; leave kernels.layers out: the "
            "language model then has Transformer Engine's layers and the vision encoder torch's"
        )
    return problems
