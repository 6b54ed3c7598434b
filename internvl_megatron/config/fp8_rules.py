"""What FP8 asks of sizes, rows, tiles and other settings; every rule names the way out.

Products in FP8 want each operand's two dimensions in multiples: 16 for one scale a tensor (cuBLAS), 32 (mxfp8) or 128 (blockwise)
for scales of blocks, which lie along either dimension (Transformer Engine 2.20, `assert_dim_for_fp8_exec`, `is_quantizable`).
"""

import math
from collections.abc import Callable, Mapping, Sequence

from internvl_megatron.config.schema import Fp8Config, RunConfig

MULTIPLE: Mapping[str, int] = {"none": 1, "delayed": 16, "current": 16, "mxfp8": 32, "blockwise": 128}
"""Of both dimensions of every operand, by recipe."""


def fp8_problems(config: RunConfig, vision_unit_ranks: int) -> list[str]:
    """What is wrong with `fp8` in a configuration.

    Args:
        config: of the run.
        vision_unit_ranks: ranks that encode a tile together.
    """
    fp8 = config.fp8
    if (fp8.language, fp8.vision, fp8.projector) == ("none", "none", "none"):
        return _without_effect(fp8)
    return [
        *_backend(config),
        *_layers(config),
        *_language_sizes(config),
        *_vision_sizes(config, vision_unit_ranks),
        *_projector_sizes(config),
        *_rows(config),
        *_tiles(config),
    ]


def tile_multiple(config: RunConfig) -> int:
    """Tiles the vision side computes at a time are a multiple of so many, so that the rows of its products are of theirs."""
    vision = config.model.vision
    encoder, projector = MULTIPLE[config.fp8.vision], MULTIPLE[config.fp8.projector]
    tokens = 1 + vision.patches_per_side**2
    return math.lcm(encoder // math.gcd(encoder, tokens), projector // math.gcd(projector, vision.tokens_per_tile))


def language_sizes(config: RunConfig, tensor_size: int) -> dict[str, float]:
    """Dimensions that the linear layers of the language model have on a tensor-parallel rank, by what they are."""
    language = config.model.language
    heads, kv_heads = language.num_heads, language.num_kv_heads
    return {
        f"model.language.hidden_size={language.hidden_size}": language.hidden_size,
        f"queries, keys and values ({heads} + 2 x {kv_heads} heads of {language.head_size})": (
            (heads + 2 * kv_heads) * language.head_size / tensor_size
        ),
        f"model.language.num_heads={heads} x head_size={language.head_size}": heads * language.head_size / tensor_size,
        f"model.language.ffn_hidden_size={language.ffn_hidden_size}": language.ffn_hidden_size / tensor_size,
    }


def vision_sizes(config: RunConfig, unit_ranks: int) -> dict[str, float]:
    """The same for the encoder, of ranks that encode a tile together; heads are padded to go around."""
    vision = config.model.vision
    heads = -(-vision.num_heads // unit_ranks)
    attention = heads * (vision.hidden_size // vision.num_heads)
    return {
        f"model.vision.hidden_size={vision.hidden_size}": vision.hidden_size,
        f"model.vision.num_heads={vision.num_heads} x head size": attention,
        f"model.vision.ffn_hidden_size={vision.ffn_hidden_size}": vision.ffn_hidden_size / unit_ranks,
    }


def _without_effect(fp8: Fp8Config) -> list[str]:
    """Settings that say something about FP8 where there is none."""
    problems = []
    for name in ("first_bf16_layers", "last_bf16_layers"):
        if getattr(fp8, name):
            problems.append(f"fp8.{name}={getattr(fp8, name)} needs fp8.language; set it, or leave this out")
    return problems


def _backend(config: RunConfig) -> list[str]:
    """What computes in FP8, and what goes together with it."""
    fp8, problems = config.fp8, []
    if fp8.backend == "transformer_engine" and config.device == "cpu":
        problems.append("fp8.backend=transformer_engine needs a GPU, and device=cpu; set fp8.backend=emulated")
    if not may_use_transformer_engine(config):
        if config.kernels.layers == "transformer_engine":
            problems.append(
                f"fp8.backend={fp8.backend}: emulated FP8 has linear layers of its own, and "
                "kernels.layers=transformer_engine asks for others; leave kernels.layers out"
            )
        return problems
    if config.kernels.layers == "torch":
        problems.append(
            f"fp8.backend={fp8.backend} multiplies with Transformer Engine's layers, and kernels.layers=torch asks for "
            "others; leave kernels.layers out, or set fp8.backend=emulated"
        )
    if config.parallel.vision_sharding == "sharded":
        problems += [
            f"fp8.{part}={getattr(fp8, part)}: FSDP2 around Transformer Engine's modules in FP8 was never proven here; set "
            f"fp8.{part}=none, parallel.vision_sharding=replicated, or fp8.backend=emulated"
            for part in ("vision", "projector")
            if getattr(fp8, part) != "none"
        ]
    problems += _offload(config)
    if fp8.language == "delayed" and (fp8.first_bf16_layers or fp8.last_bf16_layers):
        problems.append(
            "fp8.language=delayed: Megatron Core cannot leave out layers (fp8.first_bf16_layers="
            f"{fp8.first_bf16_layers}, fp8.last_bf16_layers={fp8.last_bf16_layers}) under delayed scaling, whose amax "
            "reduction belongs to the whole model; set fp8.language=current, or set both to 0"
        )
    return problems


def _offload(config: RunConfig) -> list[str]:
    """What autograd saves of Transformer Engine's layers in FP8 is, besides their inputs, the rounded weights as plain buffers
    (`prepare_for_saving` in its `linear.py`), which nothing tells from activations: every pass would send them to the host and back."""
    fp8, parallel = config.fp8, config.parallel
    # The part, whether its side's activations move, and whether none of the weights' are among them: layers that are run again
    # save their inputs alone (but the vision side runs again as a whole under `full`, with everything saved).
    cases = (
        ("vision", "vision", parallel.vision_offload, parallel.vision_recompute == "layer"),
        ("projector", "vision", parallel.vision_offload, False),
        ("language", "language", parallel.language_offload, parallel.language_recompute == "full"),
    )
    ways_out = {"vision": "parallel.vision_recompute=layer, ", "language": "parallel.language_recompute=full, "}
    return [
        f"parallel.{side}_offload=true: with fp8.{part}={getattr(fp8, part)} the weights in FP8 would go to host memory and back with "
        f"the activations of every pass; set {ways_out.get(part, '')}parallel.{side}_offload=false, or fp8.{part}=none"
        for part, side, offloads, is_harmless in cases
        if offloads and getattr(fp8, part) != "none" and not is_harmless
    ]


def may_use_transformer_engine(config: RunConfig) -> bool:
    """Whether FP8 will be Transformer Engine's if this machine has a GPU."""
    backend = config.fp8.backend
    return backend == "transformer_engine" or (backend == "auto" and config.device != "cpu")


def _layers(config: RunConfig) -> list[str]:
    """Layers that are left out are some of the language model's."""
    fp8, num_layers = config.fp8, config.model.language.num_layers
    left_out = fp8.first_bf16_layers + fp8.last_bf16_layers
    if left_out and fp8.language == "none":
        return _without_effect(fp8)
    if left_out >= num_layers:
        return [
            f"fp8.first_bf16_layers={fp8.first_bf16_layers} and fp8.last_bf16_layers={fp8.last_bf16_layers} leave none of "
            f"model.language.num_layers={num_layers} in FP8: lower them to {num_layers - 1} together, or set "
            "fp8.language=none"
        ]
    return []


def _language_sizes(config: RunConfig) -> list[str]:
    recipe, language, tensor = config.fp8.language, config.model.language, config.parallel.tensor_size

    def is_possible(size: int) -> bool:
        heads = language.num_heads % size == 0 and not (language.num_kv_heads % size and size % language.num_kv_heads)
        return heads and language.ffn_hidden_size % size == 0

    smaller = [size for size in range(tensor - 1, 0, -1) if is_possible(size)]
    return _sizes(
        "language", recipe, "parallel.tensor_size", tensor, smaller, lambda size: language_sizes(config, size)
    )


def _vision_sizes(config: RunConfig, unit_ranks: int) -> list[str]:
    vision, recipe = config.model.vision, config.fp8.vision
    smaller = [size for size in range(unit_ranks - 1, 0, -1) if vision.ffn_hidden_size % size == 0]
    name = "parallel.vision_tensor_size"
    if config.parallel.vision_placement == "colocated":
        name, smaller = "parallel.tensor_size", []  # the language model's: not to be changed for the encoder alone
    return _sizes("vision", recipe, name, unit_ranks, smaller, lambda size: vision_sizes(config, size))


def _projector_sizes(config: RunConfig) -> list[str]:
    vision, hidden_size = config.model.vision, config.model.language.hidden_size
    width = vision.hidden_size * vision.shuffle_factor**2
    sizes = {
        f"model.vision.hidden_size={vision.hidden_size} x shuffle_factor^2": float(width),
        f"model.language.hidden_size={hidden_size}": float(hidden_size),
    }
    return _sizes("projector", config.fp8.projector, "", 1, [], lambda _size: sizes)


def _sizes(
    part: str,
    recipe: str,
    divisor: str,
    num_ranks: int,
    smaller: Sequence[int],
    sizes_on: Callable[[int], Mapping[str, float]],
) -> list[str]:
    """Local dimensions that are no multiple of what a recipe wants, with the most ranks or the recipe that would do.

    Args:
        part: field of `fp8`.
        recipe: its value.
        divisor: the setting that divides dimensions over ranks.
        num_ranks: its value.
        smaller: other values it may have, descending.
        sizes_on: dimensions by what they are, on so many ranks.
    """

    def fits(name: str, size: int) -> bool:
        return all(value % MULTIPLE[name] == 0 for value in sizes_on(size).values())

    if fits(recipe, num_ranks):
        return []
    ways_out = [f"{divisor}={size}" for size in smaller if fits(recipe, size)][:1]
    looser = "current" if recipe in ("mxfp8", "blockwise") and fits("current", num_ranks) else "none"
    ways_out.append(f"fp8.{part}={looser}" + (f" (multiples of {MULTIPLE[looser]})" if looser != "none" else ""))
    return [
        f"fp8.{part}={recipe}: {what}"
        + (f" over {divisor}={num_ranks} is {value:g} a rank, which" if num_ranks > 1 else f" is {value:g}, which")
        + f" is not a multiple of {MULTIPLE[recipe]}; set {' or '.join(ways_out)}"
        for what, value in sizes_on(num_ranks).items()
        if value % MULTIPLE[recipe]
    ]


def row_multiple(config: RunConfig) -> int:
    """Rows have a multiple of so many tokens for the language model's recipe; 1 without one. Every rank's part of a row is a whole
    multiple: under sequence parallelism the part before the gather, which Transformer Engine rounds to FP8."""
    recipe = config.fp8.language
    return 1 if recipe == "none" else MULTIPLE[recipe] * math.prod(_parts(config).values())


def _parts(config: RunConfig) -> dict[str, int]:
    """Over how many ranks a row is divided, by the setting that says so."""
    parallel = config.parallel
    parts = {"parallel.context_size": parallel.context_size}
    if parallel.sequence_parallel:
        parts["parallel.tensor_size"] = parallel.tensor_size
    return {name: size for name, size in parts.items() if size > 1}


def _rows(config: RunConfig) -> list[str]:
    tokens, recipe, multiple = config.data.tokens_per_row, config.fp8.language, row_multiple(config)
    if tokens % multiple == 0:
        return []
    product = " x ".join([str(MULTIPLE[recipe]), *(f"{name}={size}" for name, size in _parts(config).items())])
    return [
        f"fp8.language={recipe}: data.tokens_per_row={tokens} must be a multiple of {multiple} ({product}); set "
        f"data.tokens_per_row={_nearest(tokens, multiple)}"
    ]


def _tiles(config: RunConfig) -> list[str]:
    """Tiles are filled up to a multiple; whole chunks should need no filling."""
    multiple, chunk = tile_multiple(config), config.parallel.vision_chunk_tiles
    if chunk % multiple == 0:
        return []
    fp8, tokens = config.fp8, 1 + config.model.vision.patches_per_side**2
    return [
        f"fp8.vision={fp8.vision}, fp8.projector={fp8.projector}: parallel.vision_chunk_tiles={chunk} must be a multiple of "
        f"{multiple}, so that only the last tiles of a step are filled up (a tile's {tokens} tokens in the encoder are no "
        f"multiple themselves); set parallel.vision_chunk_tiles={_nearest(chunk, multiple)}"
    ]


def _nearest(value: int, multiple: int) -> int:
    """The multiple nearest to a value, and at least one."""
    return max(1, (2 * value + multiple) // (2 * multiple)) * multiple
