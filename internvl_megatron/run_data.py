"""The data of a run on one rank: its files, the rows of every training step, and those that are held out."""

import os
from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.config.plan import RunPlan, cut_multiple
from internvl_megatron.config.ramp import rows_of_step
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.dataset import load_datasets, prepare_records
from internvl_megatron.data.evaluation_rows import eval_rows
from internvl_megatron.data.loader import ReplicaLoader
from internvl_megatron.data.meta import read_meta
from internvl_megatron.data.mixture import dataset_groups
from internvl_megatron.data.one_rank_first import one_rank_first
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.reference_file import ReferenceFile
from internvl_megatron.data.row_cost import RowCost
from internvl_megatron.data.row_exchange import RowExchange
from internvl_megatron.data.step_rows import StepRows
from internvl_megatron.data.stream import SampleStream
from internvl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from internvl_megatron.errors import ConfigError
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import broadcast_bytes, exchange_bytes

MAX_INDEX_THREADS = 8
"""Annotation files indexed at the same time by the rank that does so for all."""


class RunData:
    """What a rank reads, or is sent by the leader of its replica."""

    def __init__(self, config: RunConfig, made: RunPlan, groups: Groups, reference: ReferenceFile | None) -> None:
        """Check the files and open them; collective over all ranks.

        Args:
            config: of the run.
            made: its plan.
            groups: process groups.
            reference: log-probabilities of the reference, in a run on pairs that has them in a file.

        Raises:
            DataError: on all ranks, if a file is wrong.
            ConfigError: the tokenizer has more tokens than the model's vocabulary.
        """
        self.tokenizer = open_tokenizer(config)
        self.settings = SampleSettings.of_run(config)
        self._config = config
        self._plan = made
        self._groups = groups
        self._reference = reference
        self._replica = made.layout.replica(groups.rank)
        self._replica_ranks = made.layout.replica_ranks(self._replica)
        self.is_leader = groups.rank == self._replica_ranks[0]
        """Whether this rank reads for its replica."""
        self._index_folder = Path(config.data.index_folder or Path(config.folder) / "index")
        self._check()
        self.loader = self._loader()
        """Rows of the training steps."""
        self.eval_rows = self._eval_rows()
        """This rank's part of the held-out rows; None where nothing is evaluated."""

    def _check(self) -> None:
        """Rank 0 reads the meta files and indexes the annotations that are not yet; the others then find the indices."""
        config = self._config
        data = config.data
        eval_metas = [] if config.eval_every_steps is None else [data.eval_meta]

        def work() -> None:
            entries = read_meta(data.meta)
            dataset_groups(entries, data.group_weights)
            entries += [entry for meta in eval_metas if meta is not None for entry in read_meta(meta)]
            num_threads = min(MAX_INDEX_THREADS, len(os.sched_getaffinity(0)))
            prepare_records(entries, self._index_folder, num_threads)

        def broadcast(payload: bytes | None) -> bytes:
            return broadcast_bytes(payload, 0, self._groups.host_world)

        one_rank_first(work, self._groups.rank == 0, broadcast, config.parallel.collective_timeout_seconds / 4)

    def _loader(self) -> ReplicaLoader:
        """Row g of the run comes from stream g modulo `rows_per_step`, which the leader of replica g modulo replicas reads, so
        the data of a step do not depend on the layout."""
        config = self._config
        streams = None
        if self.is_leader:
            datasets = load_datasets(config.data.meta, self._index_folder)
            numbers = range(self._replica, config.rows_per_step, self._plan.layout.data_size)
            streams = [
                SampleStream(datasets, self.settings, self.tokenizer, number, config.rows_per_step, self._reference)
                for number in numbers
            ]

        def broadcast(payload: bytes | None) -> bytes:
            return broadcast_bytes(payload, self._replica_ranks[0], self._groups.host_replica)

        def rows(step: int) -> range:
            return rows_of_step(config, step)

        place, size = self._replica_ranks.index(self._groups.rank), len(self._replica_ranks)
        return ReplicaLoader(streams, broadcast, self.settings, place, size, self._row_exchange(), rows)

    def _row_exchange(self) -> RowExchange | None:
        """This leader's trade of rows with those of the other replicas, if there is one."""
        if not self.is_leader or not self._plan.balance_rows:
            return None
        layout = self._plan.layout
        cost = RowCost.of_model(self._config.model.language, cut_multiple(self._config, layout))

        def exchange(payloads: Sequence[bytes]) -> list[bytes]:
            return exchange_bytes(payloads, self._groups.host_data)

        return RowExchange(exchange, cost, self._replica, layout.data_size)

    def _eval_rows(self) -> StepRows | None:
        config = self._config
        meta, count = config.data.eval_meta, config.eval_rows
        if meta is None or config.eval_every_steps is None:
            return None
        rows = eval_rows(meta, self.settings, self.tokenizer, count, self._index_folder, self._reference)
        slots = range(self._replica, count, self._plan.layout.data_size)
        place = self._replica_ranks.index(self._groups.rank)
        return StepRows([rows[slot] for slot in slots], slots, self.settings, place, len(self._replica_ranks))


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's tokenizer.

    Raises:
        ConfigError: it has more tokens than the model's vocabulary.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    if len(tokenizer) > config.model.language.vocab_size:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} has {len(tokenizer)} tokens, more than "
            f"model.language.vocab_size={config.model.language.vocab_size}: set model.language.vocab_size={len(tokenizer)}"
        )
    return tokenizer
