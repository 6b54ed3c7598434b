"""Scores the model of a run on benchmarks while it is trained.

Training's modules are made for training: sequence parallelism, FP8, kernels that want rows of fixed lengths. Answers come from a second
set of modules, built as inference builds them for the same ranks, which borrow the run's parameters for the time of an evaluation: they
cost no memory in between.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from internvl_megatron.config.schema import Fp8Config, KernelConfig, ParallelConfig, RunConfig
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.device import Device
from internvl_megatron.evaluate.benchmark_report import write_results
from internvl_megatron.evaluate.benchmark_run import read_benchmarks, run_benchmarks
from internvl_megatron.evaluate.settings import EvaluationSettings
from internvl_megatron.inference.generate import Generator
from internvl_megatron.model.build import Model, build_model
from internvl_megatron.parallel.groups import Groups

FOLDER = "benchmarks"
"""In that of the run: a folder for each evaluation, with answers and results."""

log = logging.getLogger(__name__)


class LiveBenchmarks:
    """Benchmarks of a run. In runs without them it does nothing."""

    def __init__(self, config: RunConfig, groups: Groups, device: Device) -> None:
        """Read and check the questions, and build the second modules; before the run's model, so that they may use its memory.

        Raises:
            ConfigError: a benchmark or an option is not known.
            DataError: data are missing or wrong.
        """
        chosen = config.benchmarks
        if chosen.every_steps is None:
            return
        assert chosen.data is not None, "plan() has checked that there are data"
        self._root = Path(config.folder) / FOLDER
        self._settings = EvaluationSettings(
            benchmarks=chosen.names,
            data=Path(chosen.data),
            output=self._root,
            options=chosen.options,
            limit=chosen.limit_samples,
            max_new_tokens=chosen.limit_answer_tokens,
        )
        self._asked = read_benchmarks(self._settings)
        parallel = ParallelConfig(
            tensor_size=config.parallel.tensor_size,
            pipeline_size=config.parallel.pipeline_size,
            stage_layers=config.parallel.stage_layers,
        )
        self._config = replace(config, parallel=parallel, kernels=KernelConfig(), fp8=Fp8Config())
        self._groups, self._device = groups, device
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        self._borrower = build_model(self._config, groups, device, initialize=False)
        for _, parameter in self._borrower.named_parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    def scores(self, model: Model, step: int, on_answer: Callable[[], None]) -> dict[str, float]:
        """Score the model as it is, by benchmark; collective over all ranks.

        Args:
            model: of the run, its parameters up to date.
            step: steps taken.
            on_answer: called behind every answer of this rank's replica.

        Returns:
            The scores, on rank 0, which writes the results too; nothing on the others.
        """
        output = self._root / f"step-{step:08d}"
        settings = replace(self._settings, output=output)
        with self._borrowed(model):  # the generator holds a cache, which goes with it
            generator = Generator(self._config, self._borrower, self._groups, self._tokenizer, self._device)
            results = run_benchmarks(generator, settings, self._asked, f"{self._config.name}, step {step}", on_answer)
        if results:
            log.info("step %d:\n%s", step, write_results(output, results))
        return {result.benchmark: result.scores.main for result in results}

    @contextmanager
    def _borrowed(self, model: Model) -> Iterator[None]:
        """Let the second modules have the parameters of a model for the duration of a block."""
        lent = dict(model.named_parameters())
        own = dict(self._borrower.named_parameters())
        assert lent.keys() == own.keys(), "both are built for the same ranks"
        for name, parameter in own.items():
            parameter.data = lent[name].data
        try:
            yield
        finally:
            for parameter in own.values():
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
