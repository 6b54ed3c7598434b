"""What low-rank adapters go together with; every rule names the way out."""

from internvl_megatron.config.schema import LoraConfig, RunConfig


def lora_problems(config: RunConfig) -> list[str]:
    """What is wrong with `lora` in a configuration."""
    lora = config.lora
    ranks = {"language": lora.language_rank, "vision": lora.vision_rank}
    adapted = {part: rank for part, rank in ranks.items() if rank is not None}
    if not adapted:
        return _without_effect(lora)
    problems = []
    for part, rank in adapted.items():
        name, width = f"lora.{part}_rank={rank}", getattr(config.model, part).hidden_size
        if rank >= width:
            problems.append(
                f"{name}: must be below model.{part}.hidden_size={width}, or there is nothing low about it"
            )
        if not getattr(config.optimizer, part).trainable:
            problems.append(
                f"{name}: the adapters would not be trained, as optimizer.{part}.trainable=false; set it to true (what they are "
                f"added to is frozen by itself), or leave lora.{part}_rank out"
            )
        if getattr(config.fp8, part) != "none":
            problems.append(
                f"{name}: not with fp8.{part}={getattr(config.fp8, part)}; set fp8.{part}=none or leave lora.{part}_rank out"
            )
    if lora.vision_rank is not None and config.parallel.vision_sharding == "sharded":
        problems.append(
            f"lora.vision_rank={lora.vision_rank}: not with parallel.vision_sharding=sharded; set it to replicated, or leave "
            "lora.vision_rank out"
        )
    if config.checkpoint.load is None:
        problems.append(
            "lora: adapters are added to weights, and checkpoint.load names none; set checkpoint.load=FOLDER (converted "
            "weights, or a run)"
        )
    return problems


def _without_effect(lora: LoraConfig) -> list[str]:
    """Settings that say something about adapters where there are none."""
    return [
        f"lora.{name}={getattr(lora, name)} needs lora.language_rank or lora.vision_rank; set one, or leave this out"
        for name in ("scale", "layers")
        if getattr(lora, name) != getattr(LoraConfig(), name)
    ]
