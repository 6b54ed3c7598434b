"""What a rank does in the tests of the adapters to other harnesses."""

from pathlib import Path

from internvl_megatron.evaluate.vlmevalkit_model import VLMEvalKitModel
from internvl_megatron.ranks import RankInfo


def vlmevalkit_answers(info: RankInfo, folder: Path, messages: list[list[dict[str, str]]]) -> list[str]:
    """Answers of the model as VLMEvalKit asks for them."""
    assert info.world_size == 1, "a harness has one rank"
    model = VLMEvalKitModel(str(folder), "cpu", max_new_tokens=6)
    answers = [model.generate_inner(message, "MMStar") for message in messages]
    model.close()
    return answers
