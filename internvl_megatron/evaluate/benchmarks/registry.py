"""All benchmarks by name."""

from collections.abc import Sequence

from internvl_megatron.errors import ConfigError
from internvl_megatron.evaluate.benchmarks import (
    ai2d,
    blink,
    chartqa,
    docvqa,
    gsm8k,
    hallusionbench,
    infovqa,
    mathvision,
    mathvista,
    mmbench,
    mme,
    mmlu,
    mmmu,
    mmstar,
    mvbench,
    ocrbench,
    pope,
    realworldqa,
    refcoco,
    scienceqa,
    seed2plus,
    textvqa,
)
from internvl_megatron.evaluate.benchmarks.benchmark import Benchmark, Options

_MODULES = (
    mmmu, mathvista, mathvision, ai2d, chartqa, textvqa, docvqa, infovqa, ocrbench, seed2plus, blink, realworldqa, mme, mmbench, mmstar,
    hallusionbench, pope, refcoco, scienceqa, mvbench, mmlu, gsm8k,
)  # fmt: skip

BENCHMARKS: dict[str, Benchmark] = {module.BENCHMARK.name: module.BENCHMARK for module in _MODULES}
"""In the order of the paper's tables."""


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark {name!r} is not known; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def chosen_options(benchmark: Benchmark, settings: Sequence[str]) -> Options:
    """A benchmark's options, the defaults changed by those of "benchmark.option=value" that are for it.

    Raises:
        ConfigError: there is no such benchmark, option or value.
    """
    chosen = {name: values[0] for name, values in benchmark.options.items()}
    for setting in settings:
        name, _, value = setting.partition("=")
        owner, _, option = name.partition(".")
        values = find_benchmark(owner).options.get(option)
        if values is None:
            known = ", ".join(f"{owner}.{own}" for own in find_benchmark(owner).options) or "none"
            raise ConfigError(f"option {setting!r}: {owner} has no such option; it has {known}")
        if value not in values:
            raise ConfigError(f"option {setting!r}: must be one of {', '.join(values)}")
        if owner == benchmark.name:
            chosen[option] = value
    return chosen
