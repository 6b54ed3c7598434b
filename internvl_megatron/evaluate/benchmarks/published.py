"""InternVL3's published scores (arXiv 2504.10479, tables 2 to 6, 8 and 11), on the scales of `Scores.main`.

A score that is printed for another split or another way to ask than the default here has its reason in `NOTES`.
"""

from collections.abc import Mapping

SIZES = ("1B", "2B", "8B", "9B", "14B", "38B", "78B")

SCORES: Mapping[str, tuple[float | None, ...]] = {
    "mmmu": (43.4, 48.6, 62.7, 57.7, 67.1, 70.1, 72.2),
    "mathvista": (45.8, 57.0, 71.6, 71.5, 75.1, 75.1, 79.0),
    "mathvision": (18.8, 21.7, 29.3, 27.6, 37.2, 34.2, 43.1),
    "ai2d": (69.4, 78.7, 85.2, 84.6, 86.0, 88.9, 89.7),
    "chartqa": (75.3, 80.2, 86.6, 86.2, 87.3, 89.2, 89.7),
    "textvqa": (74.1, 77.0, 80.2, 79.4, 80.5, 83.9, 84.3),
    "docvqa": (81.9, 88.3, 92.7, 93.6, 94.1, 95.4, 95.4),
    "infovqa": (53.7, 66.1, 76.8, 79.6, 83.6, 85.0, 86.5),
    "ocrbench": (790, 835, 880, 877, 875, 886, 906),
    "seed2plus": (58.2, 64.6, 69.7, 68.8, 70.3, 71.6, 71.9),
    "blink": (42.9, 50.3, 55.5, 58.6, 60.3, 64.0, 66.3),
    "realworldqa": (58.2, 64.3, 70.8, 70.5, 70.7, 75.6, 78.0),
    "mme": (1934.4, 2221.2, 2415.4, 2372.8, 2478.3, 2523.6, 2549.8),
    "mmbench": (72.6, 81.1, 83.4, 83.4, 85.6, 87.6, 89.0),
    "mmstar": (51.5, 60.7, 68.2, 66.3, 68.8, 71.5, 72.5),
    "hallusionbench": (41.4, 42.5, 49.9, 51.2, 55.1, 57.1, 59.1),
    "pope": (90.7, 89.6, 91.1, 90.4, 90.2, 90.6, 90.3),
    "refcoco": (81.6, 86.7, 89.6, 88.2, 89.1, 91.2, 91.4),
    "mvbench": (63.1, 70.4, 75.4, 74.3, 76.6, 76.9, 78.7),
    "mmlu": (49.8, 64.8, 77.3, None, 82.1, 85.4, 86.9),
}
"""By benchmark, for each of the sizes; None = not given."""

OPTION_SCORES: Mapping[tuple[str, str, str], tuple[float | None, ...]] = {
    ("ai2d", "mask", "no"): (78.3, 87.4, 92.6, 92.9, 93.7, 95.5, 96.0),
    ("mmbench", "table", "dev_cn"): (67.9, 78.4, 82.2, 82.2, 84.1, 86.8, 88.7),
    ("mmbench", "table", "dev_en_v11"): (69.9, 78.6, 81.7, 81.7, 83.5, 86.9, 87.7),
    ("mmbench", "table", "dev_cn_v11"): (None,) * len(SIZES),
}
"""In place of those where (benchmark, option, value) is chosen."""

NOTES: Mapping[str, str] = {
    "docvqa": "published: test questions",
    "infovqa": "published: test questions",
    "mmbench": "published: test questions",
    "mmlu": "published: prompts not given",
    "gsm8k": "published: per-benchmark scores of text not transcribed",
    "mmmu": "published: with reasoning (mmmu.reasoning=yes)",
    "mathvista": "published: with reasoning (mathvista.reasoning=yes), answers read by a language model",
    "mathvision": "published: with reasoning (mathvision.reasoning=yes), answers read by a language model",
}


def published_score(benchmark: str, options: Mapping[str, str], size: str | None) -> float | None:
    """The score of a size, "8B", under some options; None where there is none."""
    if size not in SIZES:
        return None
    scores = SCORES.get(benchmark)
    for option, value in options.items():
        scores = OPTION_SCORES.get((benchmark, option, value), scores)
    return None if scores is None else scores[SIZES.index(size)]
