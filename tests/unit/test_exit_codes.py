"""Exit codes: the same kind of end has one code, whoever started the ranks, and everything that acts on codes knows it."""

import re
from typing import Any

import pytest

from internvl_megatron import __main__
from internvl_megatron.cluster.commands import ENDS
from internvl_megatron.cluster.job_folder import CHECKOUT
from internvl_megatron.errors import CheckpointError, ConfigError, TrainingError
from internvl_megatron.faults.stop_signals import EXIT_TRAINING_ERROR
from internvl_megatron.launcher import Failure, RankFailedError
from tools.collect_logs import meaning


def raises(error: BaseException) -> Any:
    def run(_options: Any) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (CheckpointError("x"), 2),
        (TrainingError("step 3 is bad"), 3),
        (RankFailedError([Failure(1, 0.0, "step 3 is bad", is_user_error=True, is_training_error=True)]), 3),
        (RankFailedError([Failure(1, 0.0, "no such file", is_user_error=True)]), 2),
        (RankFailedError([Failure(1, 0.0, "Traceback")]), 1),
    ],
)
def test_code_of_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    monkeypatch.setattr(__main__, "_doctor", raises(error))
    assert __main__.main(["doctor"]) == code
    assert capsys.readouterr().err.startswith("internvl-megatron: ")


@pytest.mark.parametrize(("error", "code"), [(TrainingError("x"), 3), (ConfigError("x"), 2), (RuntimeError("x"), 1)])
def test_code_of_a_rank_that_others_started(monkeypatch: pytest.MonkeyPatch, error: Exception, code: int) -> None:
    ends: list[int] = []
    monkeypatch.setattr(__main__.os, "_exit", ends.append)

    def train_rank(_info: Any, _config: Any) -> Any:
        raise error

    __main__._joined(train_rank, __main__.RankInfo(0, 1, 0, 1, ""), Any)  # pyright: ignore[reportPrivateUsage, reportArgumentType]
    assert ends == [code]


def test_a_training_error_is_known_to_all_who_act_on_codes() -> None:
    """A job that ends so is not started again: the same step would come again."""
    code = str(EXIT_TRAINING_ERROR)
    script = (CHECKOUT / "launch/slurm/train.sbatch").read_text()
    branch = re.search(rf"^    {code}\) .*$", script, re.MULTILINE)
    assert branch is not None and "start_again" not in branch[0]
    table = re.search(rf"^\| {code} \|.*$", (CHECKOUT / "launch/README.md").read_text(), re.MULTILINE)
    assert table is not None and "| done" in table[0]
    assert code in ENDS and "may not go on" in meaning(EXIT_TRAINING_ERROR)
