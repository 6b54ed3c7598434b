"""What is trained under which layouts."""

from dataclasses import replace

from internvl_megatron.config.schema import DataConfig, KernelConfig, LossConfig, PartConfig
from tests.support.layouts import ADAMW, LAYOUTS, SGD, Scenario

_TWO_STEPS = {"num_steps": 2}
_DROP_PATH = 0.5
_PADDED_SAMPLES = DataConfig(tokens_per_row=96, tiles_per_row=16, sample_multiple_tokens=4)
_FROZEN = PartConfig(trainable=False)

SCENARIOS = {
    "300m": Scenario(),
    "6b": Scenario(family="6b"),
    "adamw": Scenario(changes={"optimizer": ADAMW}),
    "micro_batch": Scenario(changes={"loss": LossConfig(normalize="micro_batch"), **_TWO_STEPS}),
    "token_weights": Scenario(weight_exponent=0.0, changes=_TWO_STEPS),
    "sample_weights": Scenario(weight_exponent=1.0, changes=_TWO_STEPS),
    # How the vision side does its work must not matter.
    "window": Scenario(parallel_changes={"vision_window_rows": 1}, changes=_TWO_STEPS),
    "no_overlap": Scenario(
        changes={"optimizer": ADAMW}, parallel_changes={"overlap_gradients": False, "overlap_parameters": False}
    ),
    "overlapped_window": Scenario(
        changes={"optimizer": ADAMW}, parallel_changes={"vision_window_rows": 1, "vision_recompute": "full"}
    ),
    # Images come late or not at all: reductions of the encoder may start in any window, and gathers are due later.
    "sparse_images": Scenario(rows="sparse", changes={"optimizer": ADAMW}, parallel_changes={"vision_window_rows": 1}),
    "nothing_ahead": Scenario(parallel_changes={"prepare_ahead": False}),
    "window_nothing_ahead": Scenario(
        parallel_changes={"prepare_ahead": False, "vision_window_rows": 1}, changes=_TWO_STEPS
    ),
    "short_rows": Scenario(parallel_changes={"pad_rows": False}, changes=_TWO_STEPS),
    "short_text_rows": Scenario(rows="text", parallel_changes={"pad_rows": False}, changes=_TWO_STEPS),
    "uneven_window": Scenario(parallel_changes={"vision_window_rows": 3}, changes=_TWO_STEPS),
    "recompute": Scenario(
        parallel_changes={"vision_recompute": "full", "language_recompute": "full"}, changes=_TWO_STEPS
    ),
    "recompute_less": Scenario(
        parallel_changes={"vision_recompute": "layer", "language_recompute": "selective"}, changes=_TWO_STEPS
    ),
    "offload": Scenario(parallel_changes={"vision_offload": True, "language_offload": True}, changes=_TWO_STEPS),
    "offload_recomputed": Scenario(
        parallel_changes={"language_offload": True, "language_recompute": "full"}, changes=_TWO_STEPS
    ),
    "loss_in_chunks": Scenario(changes={"kernels": KernelConfig(loss_chunk_tokens=3)}),
    "loss_in_one": Scenario(changes={"kernels": KernelConfig(loss_chunk_tokens=None), **_TWO_STEPS}),
    "padded_samples": Scenario(changes={"data": _PADDED_SAMPLES, **_TWO_STEPS}),
    "short_padded_samples": Scenario(
        changes={"data": _PADDED_SAMPLES, **_TWO_STEPS}, parallel_changes={"pad_rows": False}
    ),
    "small_chunks": Scenario(parallel_changes={"vision_chunk_tiles": 1}, changes=_TWO_STEPS),
    "large_chunks": Scenario(parallel_changes={"vision_chunk_tiles": 16}, changes=_TWO_STEPS),
    # Parts that are frozen, or trained in ways of their own.
    "frozen_vision": Scenario(changes={"optimizer": replace(SGD, vision=_FROZEN), **_TWO_STEPS}),
    "frozen_vision_side": Scenario(
        changes={"optimizer": replace(ADAMW, vision=_FROZEN, projector=_FROZEN), **_TWO_STEPS}
    ),
    "projector_only": Scenario(changes={"optimizer": replace(ADAMW, vision=_FROZEN, language=_FROZEN), **_TWO_STEPS}),
    "frozen_language": Scenario(changes={"optimizer": replace(SGD, language=_FROZEN), **_TWO_STEPS}),
    "own_ways": Scenario(
        changes={
            "optimizer": replace(
                ADAMW,
                vision=PartConfig(learning_rate_scale=0.1, decay="matrices"),
                projector=PartConfig(learning_rate_scale=3.0),
                language=PartConfig(decay="matrices"),
            )
        }
    ),
    # Steps with little or nothing in them, and steps that go wrong.
    "text": Scenario(rows="text", changes=_TWO_STEPS),
    "one_tile": Scenario(rows="one_tile", changes=_TWO_STEPS),
    "no_targets": Scenario(has_targets=False, changes=_TWO_STEPS),
    "broken_image": Scenario(broken=frozenset({(0, 0), (3, 0)}), changes=_TWO_STEPS),
    "language_overflow": Scenario(overflow_in="language.decoder.layers.3.mlp.linear_fc2.weight", changes=_TWO_STEPS),
    "vision_overflow": Scenario(overflow_in="vision.encoder.layers.0.mlp.linear_fc1.weight", changes=_TWO_STEPS),
    "adamw_overflow": Scenario(
        overflow_in="vision.encoder.layers.0.mlp.linear_fc1.weight", changes={"optimizer": ADAMW, **_TWO_STEPS}
    ),
    # Drop path has no counterpart in the reference: layouts are compared with each other.
    "drop_path": Scenario(drop_path_rate=_DROP_PATH, changes=_TWO_STEPS),
    "drop_path_off": Scenario(drop_path_rate=_DROP_PATH, changes={"num_steps": 0}),
    # bf16 weights and activations, fp32 main parameters and gradients; compared with fp32, loosely.
    "bf16": Scenario(changes={"dtype": "bf16", "optimizer": ADAMW}),
    "drop_path_otherwise": Scenario(
        drop_path_rate=_DROP_PATH,
        parallel_changes={"vision_recompute": "full", "vision_window_rows": 1, "vision_chunk_tiles": 1},
        changes=_TWO_STEPS,
    ),
    "drop_path_by_layer": Scenario(
        drop_path_rate=_DROP_PATH,
        parallel_changes={"vision_recompute": "layer", "vision_chunk_tiles": 1},
        changes=_TWO_STEPS,
    ),
}

LAYOUTS_OF = {name: ["TP2xPP2"] for name in SCENARIOS} | {
    "300m": [name for name in LAYOUTS if "ring" not in name],
    "padded_samples": ["1", *(name for name in LAYOUTS if "ring" in name)],
    "short_padded_samples": ["CP2 ring", "TP2+SPxCP2 ring"],
    "6b": ["1", "TP2+SP", "TP2xPP2", "TP2+SPxPP2", "TP2+SPxCP2"],
    "adamw": ["1", "DP2", "TP2xPP2", "TP2xDP2", "CP2xDP2"],
    "bf16": ["1", "TP2+SPxPP2", "PP2xDP2"],
    "micro_batch": ["1", "DP2", "TP2xPP2"],
    "sample_weights": ["1"],
    "window": ["DP2", "TP2xPP2"],
    "no_overlap": ["DP2", "TP2xDP2"],
    "overlapped_window": ["DP2", "TP2xDP2"],
    "sparse_images": ["DP2", "TP2xPP2", "PP2xDP2"],
    "nothing_ahead": ["TP2xPP2"],
    "window_nothing_ahead": ["TP2xPP2"],
    "short_rows": ["1", "TP2+SPxPP2xVPP2", "PP2xDP2", "TP2+SPxCP2", "TP2xPP2 first stage"],
    "recompute": ["1", "TP2xPP2", "TP2+SPxCP2"],
    "offload": ["1", "TP2+SPxPP2xVPP2", "TP2xPP2 first stage"],
    "recompute_less": ["1", "TP2+SPxPP2xVPP2"],
    "large_chunks": ["1"],
    "loss_in_chunks": ["1", "DP2", "TP2xPP2", "TP2+SPxCP2", "TP2+SPxPP2xVPP2"],
    "frozen_vision": ["1", "DP2", "TP2xPP2"],
    "projector_only": ["1", "TP2+SPxPP2"],
    "own_ways": ["1", "TP2xDP2", "PP2xVPP2"],
    "text": ["1", "TP2xPP2", "CP2xPP2", "TP2xPP2 first stage"],
    "one_tile": ["DP2", "TP2xPP2", "TP2xCP2", "PP2xDP2 apart", "TP2xPP2 first stage"],
    "no_targets": ["1", "TP2xPP2", "CP2"],
    "broken_image": ["DP2", "TP2xPP2"],
    "vision_overflow": ["1", "TP2xPP2"],
    "adamw_overflow": ["DP2"],
    "drop_path_off": ["1", "TP2xPP2"],
    "drop_path": ["1", "DP2", "TP2xPP2", "TP2xDP2"],
}
"""Layouts each scenario is trained under."""

SLOW_LAYOUTS = {
    "TP2+SP", "TP2+SPxPP2", "CP2xPP2", "TP2xCP2", "CP4", "CP2xDP2", "PP4", "PP2xVPP2xDP2", "CP4 ring 2", "CP2xPP2 ring",
    "TP2+SPxDP2 first stage", "PP2xVPP2xDP2 first stage", "CP2xPP2 first stage",
}  # fmt: skip
"""With few scenarios of their own, and in `test_matrix` what they combine meets too."""
SLOW_SCENARIOS = {
    "token_weights", "uneven_window", "window_nothing_ahead", "short_text_rows", "offload_recomputed", "loss_in_one",
    "small_chunks", "large_chunks", "drop_path_by_layer", "drop_path_otherwise", "overlapped_window", "short_padded_samples",
    "frozen_vision_side",
}  # fmt: skip
"""Relatives of others that are trained always."""
