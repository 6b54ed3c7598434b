"""What the tool that scores pairs with the reference says of runs that have none to score."""

import pytest

from tools.reference_logprobs import main


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "set loss.kind=mpo"),
        (["loss.kind=mpo"], "set data.v2pe=fixed"),
        (["loss.kind=mpo", "data.v2pe=fixed"], "checkpoint.load is not set"),
    ],
)
def test_wrong_runs(capsys: pytest.CaptureFixture[str], overrides: list[str], message: str) -> None:
    assert main(["out.jsonl", "demo_digits", *overrides]) == 2
    assert message in capsys.readouterr().err
