"""V2PE positions against the vectors of the published code, and against exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest

from internvl_megatron.data.positions import STRIDES, draw_stride, v2pe_numerators

VECTORS = [
    # position of <img>, tiles, delta * 256 -> first and last context position, </img>
    (49, 1, 1, 49 + Fraction(1, 256), 50, 51),
    (49, 1, 256, 50, 305, 306),
    (10, 13, 16, 10 + Fraction(1, 16), 218, 219),
    (10, 13, 1, 10 + Fraction(1, 256), 23, 24),
    (30000, 13, 1, 30000 + Fraction(1, 256), 30013, 30014),
    (65534, 13, 1, 65534 + Fraction(1, 256), 65547, 65548),
]


@pytest.mark.parametrize(("at", "tiles", "stride", "first", "last", "end"), VECTORS)
def test_published_positions(at, tiles, stride, first, last, end):
    tokens = 256 * tiles
    positions = v2pe_numerators(at + 1 + tokens + 2, [at + 1], [tokens], [stride])
    assert positions.dtype == np.int32
    assert (positions[: at + 1] == 256 * np.arange(at + 1)).all()
    assert [Fraction(int(n), 256) for n in positions[[at + 1, at + tokens]]] == [first, last]
    assert positions[at + 1 + tokens :].tolist() == [256 * end, 256 * (end + 1)]


def by_definition(length, starts, lengths, strides):
    """Positions token by token, in exact fractions."""
    positions, image_of = [], {}
    for image, (start, count) in enumerate(zip(starts, lengths, strict=True)):
        image_of.update(dict.fromkeys(range(start, start + count), image))
    for index in range(length):
        if index == 0:
            positions.append(Fraction(0))
        elif index in image_of:
            positions.append(positions[-1] + Fraction(strides[image_of[index]], 256))
        else:
            positions.append(Fraction(math.ceil(positions[-1]) + 1))
    return [int(256 * position) for position in positions]


def test_same_as_the_definition_also_with_odd_token_counts():
    rng = np.random.default_rng(3)
    for _ in range(200):
        starts, lengths, at = [], [], 0
        for _ in range(int(rng.integers(0, 5))):
            at += int(rng.integers(1, 6))
            starts.append(at)
            lengths.append(int(rng.integers(1, 40)))
            at += lengths[-1] + 1
        length = at + int(rng.integers(0, 5))
        strides = [draw_stride(rng) for _ in starts]
        assert v2pe_numerators(length, starts, lengths, strides).tolist() == by_definition(
            length, starts, lengths, strides
        )


def test_text_only_and_stride_256_are_ordinary_positions():
    ordinary = (256 * np.arange(40)).tolist()
    assert v2pe_numerators(40, [], [], []).tolist() == ordinary
    assert v2pe_numerators(40, [3, 20], [10, 4], [256, 256]).tolist() == ordinary


def test_an_image_may_be_the_end_of_the_sample():
    assert v2pe_numerators(4, [1], [3], [128]).tolist() == [0, 128, 256, 384]


def test_images_that_overlap_are_refused():
    with pytest.raises(AssertionError, match="do not fit"):
        v2pe_numerators(20, [2, 5], [4, 4], [1, 1])


def test_strides_are_the_nine_powers_and_all_are_drawn():
    assert [2**k for k in range(9)] == list(STRIDES)
    rng = np.random.default_rng(0)
    drawn = [draw_stride(rng) for _ in range(9000)]
    assert {stride: drawn.count(stride) > 850 for stride in STRIDES} == dict.fromkeys(STRIDES, True)
