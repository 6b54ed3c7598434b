"""What goes together with Mixed Preference Optimization."""

from internvl_megatron.config.schema import MpoConfig, RunConfig


def mpo_problems(config: RunConfig) -> list[str]:
    """What is wrong with a run that trains on pairs, or sets up something for pairs without training on them."""
    mpo, data, problems = config.mpo, config.data, []
    if config.loss.kind != "mpo":
        if mpo != MpoConfig():
            problems.append("mpo: is set, but loss.kind=next_token does not train on pairs; set loss.kind=mpo")
        return problems
    if not (mpo.preference_factor or mpo.quality_factor or mpo.generation_factor):
        problems.append("mpo: all three factors are 0: nothing is learned; set one of them")
    if mpo.reference_file is None and config.checkpoint.load is None:
        problems.append(
            "loss.kind=mpo: the reference model is the one the run starts from, and checkpoint.load is not set: give its "
            "weights (checkpoint.load=PATH)"
        )
    if mpo.reference_file is not None and data.v2pe == "random":
        problems.append(
            f"mpo.reference_file={mpo.reference_file}: with data.v2pe=random no two passes see the same positions; set "
            "data.v2pe=fixed, or leave mpo.reference_file out"
        )
    if config.fp8.language == "delayed":
        problems.append(
            "loss.kind=mpo: fp8.language=delayed would take scales from the reference model's passes; choose current"
        )
    largest = data.max_tiles + (1 if data.use_thumbnail and data.max_tiles > 1 else 0)
    tokens = largest * config.model.vision.tokens_per_tile
    if tokens > data.tokens_per_row // 2:
        problems.append(
            f"data.tokens_per_row={data.tokens_per_row}: each answer of a pair may take half of it, which cannot hold one image "
            f"of {largest} tiles ({tokens} tokens): raise it or lower data.max_tiles"
        )
    return problems
