"""All stages on real pictures: pre-training, fine-tuning, MPO and a process reward model, against held-out questions.

`make pipeline` runs the same. Seeds are fixed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_convert.__main__ import main as convert
from internvl_megatron.__main__ import main
from tests.support.small_runs import read_lines, write_lines
from tools.pipeline import MAX_NEW_TOKENS, Pipeline, Sizes

pytestmark = [pytest.mark.slow, pytest.mark.parallel]

NUM_COMPARED, MARGIN = 40, 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    Pipeline(folder, 2, Sizes()).run()
    return folder


def test_every_stage_does_what_it_is_for(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    matched, preference, judge = report["exact_match"], report["preference"], report["judge"]
    assert report["sizes"]["data"]["num_heldout"] >= 2000
    assert matched["sft"] > 0.5, "the starting point of MPO answers something"
    assert matched["mpo"] >= matched["sft"] - 0.01, "MPO does not make answers worse"
    # Before MPO all implicit rewards are 0, which is no order.
    assert preference["pairs"] >= 300
    assert preference["rewards"] >= 0.5 + 0.15, "held-out pairs are put in order"
    assert preference["likelihood_mpo"] > preference["likelihood_sft"]
    assert judge["pairs"] >= 300
    assert judge["order"] >= 0.5 + 0.2, "right solutions of a question are before wrong ones"
    assert judge["best"] > judge["any"], "the best by the judge is better than one at random"


def transformers_answers(folder: Path, questions: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Greedy answers of an export by transformers, one by one, and how close the closest choice of each was."""
    from transformers import AutoProcessor, InternVLForConditionalGeneration

    processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
    model: Any = InternVLForConditionalGeneration.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    found = []
    for question in questions:
        text = question["question"].removeprefix("<image>\n")
        content = [{"type": "image", "path": question["image"]}, {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        made = model.eval().generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens = made.sequences[0, inputs["input_ids"].shape[1] :]
        closest = min(float(scores[0].topk(2).values.diff().abs()) for scores in made.scores)
        found.append((processor.tokenizer.decode(tokens, skip_special_tokens=True), closest))
    return found


def test_trained_weights_answer_as_in_transformers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the run's checkpoint, alone and under TP2 x PP2, all together; from its export by transformers, one by one."""
    data = folder / "data"
    questions = read_lines(data / "heldout_questions.jsonl")[:NUM_COMPARED]
    asked = [{"question": one["question"], "image": str(data / one["image"])} for one in questions]
    write_lines(tmp_path / "prompts.jsonl", asked)
    assert convert(["megatron-to-hf", str(folder / "mpo"), str(tmp_path / "hf"), "--layout", "transformers"]) == 0
    wanted = transformers_answers(tmp_path / "hf", asked)
    clear = [closest >= MARGIN for _, closest in wanted]
    assert sum(clear) >= 0.9 * NUM_COMPARED, "too many close calls to see anything"
    for sizes in ([], ["--tensor-size", "2", "--pipeline-size", "2"]):
        capsys.readouterr()
        limits = ["--max-new-tokens", str(MAX_NEW_TOKENS), "--device", "cpu"]
        assert (
            main(["generate", str(folder / "mpo"), "--prompts", str(tmp_path / "prompts.jsonl"), *limits, *sizes]) == 0
        )
        answers = [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]
        assert [one for one, is_clear in zip(answers, clear, strict=True) if is_clear] == [
            text for (text, _), is_clear in zip(wanted, clear, strict=True) if is_clear
        ]
