"""The engine behind VLMEvalKit's interface of a model (revision e8e78f0, `vlmeval/vlm/base.py`, `vlmeval/vlm/internvl/`).

Nothing of VLMEvalKit is imported: a class made of this one and its `BaseModel` is what it takes (docs/evaluation.md).
"""

from collections.abc import Mapping, Sequence

from internvl_megatron.data.conversation import IMAGE_PLACEHOLDER
from internvl_megatron.errors import DataError
from internvl_megatron.evaluate.benchmarks.benchmark import MAX_NEW_TOKENS, MAX_TILES_OF_ALL_IMAGES
from internvl_megatron.evaluate.lone_engine import LoneEngine
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import Generation

TILES = {
    12: ("ChartQA_TEST", "MMMU_DEV_VAL", "MMMU_TEST", "MME-RealWorld", "VCR_EN", "VCR_ZH", "OCRVQA", "BMMR"),
    18: ("DocVQA_VAL", "DocVQA_TEST", "DUDE", "MMLongBench_DOC", "SLIDEVQA"),
    24: ("InfoVQA_VAL", "InfoVQA_TEST", "OCRBench", "HRBench4K", "HRBench8K"),
}
"""Most tiles of a picture, by what names of data sets contain (`set_max_num`); of others 6."""


class VLMEvalKitModel:
    """Answers one message after the other."""

    INTERLEAVE = True

    def __init__(self, model_path: str, device: str | None = None, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        """Load a model (`LoneEngine`), which answers with its most likely tokens."""
        super().__init__()
        self.dump_image_func = None
        self._engine = LoneEngine(model_path, device, max_sequences=1)
        self._generation = Generation(max_new_tokens)

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to a message: parts {"type": "text" or "image", "value": text or path}.

        Raises:
            DataError: a part is of another type, or a picture cannot be read.
        """
        (answer,) = self._engine.generator.generate([as_prompt(message, dataset)], self._generation)
        return answer.text

    def close(self) -> None:
        """Give back what the process holds for the model."""
        self._engine.close()


def as_prompt(message: Sequence[Mapping[str, str]], dataset: str | None) -> Prompt:
    """A message as VLMEvalKit asks InternVL (`reorganize_prompt`): one picture first, several with a list of them in front.

    Raises:
        DataError: a part is neither text nor a picture.
    """
    for part in message:
        if part["type"] not in ("text", "image"):
            raise DataError(
                f"{dataset}: a message has a part of type {part['type']!r}; this engine takes text and images"
            )
    images = [part["value"] for part in message if part["type"] == "image"]
    if len(images) == 1:
        texts = [part["value"] for part in message if part["type"] == "text"]
        text = f"{IMAGE_PLACEHOLDER}\n" + "\n".join(texts)
    else:
        numbers = iter(range(1, len(images) + 1))
        text = "".join(part["value"] if part["type"] == "text" else f"<Image-{next(numbers)}>" for part in message)
        text = text.replace("".join(f"<Image-{number}>" for number in range(1, len(images) + 1)), "")
        text = "".join(f"Image-{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, len(images) + 1)) + text
    tiles = next((count for count, names in TILES.items() if any(name in (dataset or "") for name in names)), 6)
    tiles = max(1, min(tiles, MAX_TILES_OF_ALL_IMAGES // max(1, len(images))))
    return Prompt(text, tuple(images), max_tiles=tiles, where=dataset or "")
