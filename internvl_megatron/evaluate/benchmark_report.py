"""Results of benchmarks on disk: a JSON file each, and one table of all in a folder with the published scores beside them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvl_megatron.data.files import write_whole
from internvl_megatron.evaluate.benchmarks.benchmark import Scores
from internvl_megatron.evaluate.benchmarks.published import NOTES, published_score

RESULT_FILE = "result.json"
"""In a benchmark's folder."""

TABLE_FILE = "results.md"
SUMMARY_FILE = "results.json"
"""Of all benchmarks of a folder."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """How a model did on a benchmark."""

    benchmark: str
    title: str
    model: str = ""
    """Where it was loaded from."""
    size: str | None = None
    """Of InternVL3 that the model has, "8B"; None = another."""
    weights: str
    """Checksum of its parameters (`weights_id`)."""
    options: Mapping[str, str]
    generation: Mapping[str, Any]
    num_questions: int
    """That were asked."""
    num_all_questions: int
    scores: Scores

    @property
    def published(self) -> float | None:
        """The paper's score of this size."""
        return published_score(self.benchmark, self.options, self.size)

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {**asdict(self), "published": self.published, "note": NOTES.get(self.benchmark)}


def write_results(folder: Path, results: Sequence[BenchmarkResult]) -> str:
    """Write results into their benchmarks' folders, and the table of all that are there; the table."""
    for result in results:
        write_whole(folder / result.benchmark / RESULT_FILE, json.dumps(result.as_json(), indent=1) + "\n")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"*/{RESULT_FILE}"))]
    write_whole(folder / SUMMARY_FILE, json.dumps(found, indent=1) + "\n")
    table = format_results(found)
    write_whole(folder / TABLE_FILE, f"# Benchmarks\n\n{table}\n")
    return table


def format_results(results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, one benchmark a line, of results as JSON has them."""
    lines = [
        "| benchmark | options | metric | questions | score | InternVL3, published | note | model |",
        "|---|---|---|--:|--:|--:|---|---|",
    ]
    for result in results:
        asked, total = result["num_questions"], result["num_all_questions"]
        options = ", ".join(f"{name}={value}" for name, value in result["options"].items())
        published = "-" if result["published"] is None else f"{result['published']:g} ({result['size']})"
        cells = [
            result["title"],
            options or "-",
            result["scores"]["metric"],
            str(asked) if asked == total else f"{asked} of {total}",
            f"{result['scores']['main']:.1f}",
            published,
            result["note"] or "-",
            f"{result['model']} ({result['weights']})",
        ]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)
