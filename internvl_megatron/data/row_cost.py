"""What a packed row costs the language model: the work by which rows are shared out and put in order."""

from dataclasses import dataclass

import numpy as np

from internvl_megatron.config.schema import LanguageConfig
from internvl_megatron.data.rows import Row
from internvl_megatron.scaling.counts import language_flops


@dataclass(frozen=True, kw_only=True)
class RowCost:
    """Coefficients of a row's cost in FLOPs of a forward pass; backward costs all rows the same multiple of it.

    The vision encoder is not counted: tiles are shared out among ranks by themselves.
    """

    per_token: int
    """For a token that is computed, padding included where rows keep it."""
    per_target: int
    """For a token that carries loss: the output layer runs on those alone."""
    per_attention_pair: int
    """Times the square of each sample's length. Attention of padding is not computed."""
    cut_multiple: int | None
    """Rows end with their last sample, rounded up to a multiple of this many tokens; None = at their full length."""

    @classmethod
    def of_model(cls, language: LanguageConfig, cut_multiple: int | None) -> "RowCost":
        """The cost of rows in this language model."""
        flops = language_flops(language)
        return cls(
            per_token=flops.per_token,
            per_target=flops.per_prediction,
            per_attention_pair=flops.per_attention_pair,
            cut_multiple=cut_multiple,
        )

    def of(self, row: Row) -> int:
        """Cost of a row as it is trained on, in FLOPs."""
        computed = len(row.token_ids) if self.cut_multiple is None else row.cut_length(self.cut_multiple)
        pairs = int((row.segment_lengths[: row.num_samples].astype(np.int64) ** 2).sum())
        return (
            self.per_token * computed
            + self.per_target * int(np.count_nonzero(row.weights))
            + self.per_attention_pair * pairs
        )
