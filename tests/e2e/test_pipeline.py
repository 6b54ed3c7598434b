"""All stages on real pictures: pre-training, fine-tuning, MPO and a process reward model, against held-out questions.

`make pipeline` runs the same. Seeds are fixed.
"""

from pathlib import Path

import pytest

from tools.pipeline import Pipeline, Sizes

pytestmark = [pytest.mark.slow, pytest.mark.parallel]


def test_every_stage_does_what_it_is_for(tmp_path: Path) -> None:
    report = Pipeline(tmp_path / "pipeline", 2, Sizes()).run()
    matched, preference, judge = report["exact_match"], report["preference"], report["judge"]
    assert report["sizes"]["data"]["num_heldout"] >= 2000
    assert matched["sft"] > 0.2, "the starting point of MPO answers something"
    assert matched["mpo"] >= matched["sft"] - 0.01, "MPO does not make answers worse"
    # Before MPO all implicit rewards are 0, which is no order.
    assert preference["pairs"] >= 300
    assert preference["rewards"] >= 0.5 + 0.15, "held-out pairs are put in order"
    assert preference["likelihood_mpo"] > preference["likelihood_sft"]
    assert judge["pairs"] >= 300
    assert judge["order"] >= 0.5 + 0.2, "right solutions of a question are before wrong ones"
    assert judge["best"] > judge["any"], "the best by the judge is better than one at random"
