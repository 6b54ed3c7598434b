"""Windows of micro-batches, made ready for encoding: what all ranks agree on, the plan of the tiles, the tiles on their way.

All of it is host work and one message in groups of its own, so it runs in a thread, one window ahead, while the language
model computes. A run gives the same numbers with and without.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.step_rows import StepRows
from internvl_megatron.device import Device
from internvl_megatron.parallel.bubble_plan import (
    BubblePlan,
    can_fill_bubbles,
    plan_bubbles,
    settings_against_filling,
)
from internvl_megatron.parallel.exchange import Exchange, TilesOnTheWay
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.tile_plan import TilePlan, plan_rows, plan_tiles
from internvl_megatron.scaling.counts import tile_flops
from internvl_megatron.train.agreement import StepAgreement, agree, decoded_tiles


@dataclass
class Window:
    """Some micro-batches of a step, ready to be encoded."""

    batch: StepRows
    agreement: StepAgreement
    """Of the whole step."""
    rows: range
    """The micro-batches, by their numbers in the step."""
    plan: TilePlan
    tiles: TilesOnTheWay | None
    """None where no replica has an image, and once they have been taken."""

    @property
    def is_first(self) -> bool:
        """Whether the step begins with it."""
        return self.rows.start == 0

    @property
    def is_last(self) -> bool:
        """Whether the step ends with it."""
        return self.rows.stop == len(self.agreement.rows)

    @property
    def is_last_with_images(self) -> bool:
        """Whether no later window of the step has any."""
        return not (self.agreement.table.row >= self.rows.stop).any()

    def order(self, replica: int) -> Sequence[int]:
        """The rows in the order a replica's pipeline takes them."""
        return self.plan.order[replica].tolist() if isinstance(self.plan, BubblePlan) else self.rows

    def take_tiles(self) -> TilesOnTheWay:
        """Hand the tiles over: whoever takes them decides how long they stay in memory."""
        tiles, self.tiles = self.tiles, None
        assert tiles is not None, "the window has no tiles, or they have been taken"
        return tiles


class WindowMaker:
    """Makes windows, one after the other; all ranks must ask for the same ones in the same order."""

    def __init__(self, config: RunConfig, groups: Groups, device: Device, exchange: Exchange) -> None:
        self._config = config
        self._groups = groups
        self._device = device
        self._exchange = exchange
        self._fills_bubbles = not settings_against_filling(config.parallel)
        self._thread = (
            ThreadPoolExecutor(1, thread_name_prefix="window", initializer=device.use_in_this_thread)
            if config.parallel.prepare_ahead
            else None
        )
        self._ahead: tuple[StepRows, int, Future[Window]] | None = None

    def first(self, batch: StepRows) -> Window:
        """The first window of a step."""
        return self._take(batch, None, 0)

    def first_of_evaluation(self, batch: StepRows, agreement: StepAgreement | None = None) -> Window:
        """The first window of a batch for a pass without backward; the agreement on the batch, if there is one already."""
        return self._make(batch, agreement, 0, evaluates=True)

    def after(self, window: Window) -> Window:
        """The next window of the same step."""
        return self._take(window.batch, window.agreement, window.rows.stop)

    def prepare_after(self, window: Window, following: StepRows | None) -> None:
        """Begin to make the window that comes after this one, of the following step if this one is the step's last."""
        if self._thread is None or (window.is_last and following is None):
            return
        batch, agreement, first = window.batch, window.agreement, window.rows.stop
        if window.is_last:
            assert following is not None, "there is nothing to prepare"
            batch, agreement, first = following, None, 0
        self._ahead = batch, first, self._thread.submit(self._make, batch, agreement, first)

    def wait(self) -> None:
        """Wait for what is being prepared: its messages must not meet those of others who use the same groups."""
        if self._ahead is not None:
            self._ahead[2].exception()

    def _take(self, batch: StepRows, agreement: StepAgreement | None, first: int) -> Window:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is batch and ahead[1] == first:
            return ahead[2].result()
        return self._make(batch, agreement, first)

    def _make(self, batch: StepRows, agreement: StepAgreement | None, first: int, evaluates: bool = False) -> Window:
        agreement = agreement or agree(batch, self._groups, self._config)
        size = self._config.parallel.vision_window_rows or len(agreement.rows)
        rows = range(first, min(first + size, len(agreement.rows)))
        plan = self._plan(agreement, rows, evaluates)
        tiles = None
        if plan.num_tiles > 0:
            decoded = decoded_tiles(batch, self._config.model.vision.tile_pixels, rows)
            with self._device.side_stream():
                tiles = self._exchange.send_tiles(plan, decoded)
        return Window(batch, agreement, rows, plan, tiles)

    def _plan(self, agreement: StepAgreement, rows: range, evaluates: bool) -> TilePlan:
        """Who encodes which tile, and when."""
        parallel, layout, table = self._config.parallel, self._groups.vision_layout, agreement.table.of_rows(rows)
        if layout.first_stage_only:
            return plan_rows(table, layout)
        # The pauses that are filled are those before gradients.
        if self._fills_bubbles and not evaluates and len(table) and can_fill_bubbles(layout, len(agreement.rows)):
            return plan_bubbles(table, layout, parallel.vision_chunk_tiles, self._row_tiles(agreement))
        return plan_tiles(table, layout, parallel.vision_chunk_tiles)

    def _row_tiles(self, agreement: StepAgreement) -> np.ndarray:
        """A stage's time for a row over a unit's time for a tile, [R, M], if both compute equally fast."""
        layout, model = self._groups.layout, self._config.model
        stage = agreement.row_costs / (layout.pipeline_size * layout.stage_size)
        return stage / (tile_flops(model) / self._groups.vision_layout.tensor_size)
