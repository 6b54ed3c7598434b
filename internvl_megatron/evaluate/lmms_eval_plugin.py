"""What lmms-eval finds in the entry point `lmms_eval.models`: where the model `internvl_megatron` is. Imports nothing of ours."""

from typing import Any


def manifest() -> Any:
    """Its `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(
        model_id="internvl_megatron",
        simple_class_path="internvl_megatron.evaluate.lmms_eval_model.InternVLMegatron",
    )
