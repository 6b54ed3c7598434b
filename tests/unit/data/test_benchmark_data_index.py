"""The benchmark of the data index on a million lines: what it claims of 50 million holds in small."""

import json

from tools.benchmark import main


def test_a_million_lines(tmp_path):
    output = tmp_path / "result.json"
    assert main(["index", "--lines", "1000000", "--folder", str(tmp_path), "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["lines"] == 1_000_000 and 60e6 < result["source_bytes"] < 110e6
    assert result["build_peak_growth_bytes"] < 100e6, "less than 8 bytes a record, and they are not kept either"
    assert result["private_growth_bytes"] < 30e6
    assert result["mixture"]["private_growth_bytes"] < 150e6
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"], "the lines are removed"
