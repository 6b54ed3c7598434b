"""Which data set a stream draws from: exact per epoch, evenly spread, groups by tokens."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from internvl_megatron.data.meta import DatasetEntry
from internvl_megatron.data.mixture import Group, Mixture, dataset_groups
from internvl_megatron.errors import DataError

LENGTHS = (40, 7, 1, 3, 64, 12)


def one_group(lengths):
    return [Group("", 1, tuple(range(len(lengths))))]


def dealt(lengths, groups, num_streams):
    """Places of every data set, dealt to the streams one by one: [stream] -> {(data set, place)}."""
    cards = [(member, place) for group in groups for member in group.members for place in range(lengths[member])]
    return [set(cards[stream::num_streams]) for stream in range(num_streams)]


def streams_of(lengths, groups, num_streams, seed=0):
    return [Mixture(lengths, groups, seed, index, num_streams) for index in range(num_streams)]


@pytest.mark.parametrize("num_streams", [1, 2, 5, 16, 127])
def test_every_epoch_of_a_stream_is_its_share_exactly(num_streams):
    groups = one_group(LENGTHS)
    shares = dealt(LENGTHS, groups, num_streams)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for stream, share in zip(streams_of(LENGTHS, groups, num_streams), shares, strict=True):
        assert stream.group_share(0) == len(share)
        for epoch in range(3):
            draws = [stream.draw() for _ in share]
            assert {draw.epoch for draw in draws} == {epoch}
            assert {(draw.dataset, draw.place) for draw in draws} == share


def test_draws_of_a_data_set_are_spread_evenly():
    """At any time each data set is within one draw of its part, and so are the others: see `Mixture._turn`."""
    lengths = [1000, 300, 77, 13, 2]
    for stream in streams_of(lengths, one_group(lengths), 2):
        shares = [stream.group_share(0) and len(range(stream._first[n], lengths[n], 2)) for n in range(5)]
        counts, total = Counter(), sum(shares)
        for number in range(1, 2 * total):
            counts[stream.draw().dataset] += 1
            for dataset, share in enumerate(shares):
                off = abs(counts[dataset] - number * share / total)
                assert off <= 1 + len(lengths) * share / total, (number, dataset)


def test_streams_do_not_draw_the_same_data_set_at_once():
    lengths = [6400, 6400, 12800]
    drawn = [stream.draw().dataset for stream in streams_of(lengths, one_group(lengths), 64)]
    counts = Counter(drawn)
    # By chance: 16, 16 and 32 of 64, with standard deviations of 3.5 to 4.
    assert 4 <= counts[0] <= 28 and 4 <= counts[1] <= 28 and 18 <= counts[2] <= 46
    assert drawn != [stream.draw().dataset for stream in streams_of(lengths, one_group(lengths), 64, seed=1)]


def test_fewer_samples_than_streams():
    groups = one_group([2, 1])
    assert [stream.draw().dataset for stream in streams_of([2, 1], groups, 3)] == [0, 0, 1]
    with pytest.raises(DataError, match="data stream 3: 3 samples are too few for 4 streams; lower rows_per_step to"):
        streams_of([2, 1], groups, 4)


def walk(stream, sizes, num_draws):
    """Draw, counting tokens; yields (group, tokens by group, longest sample) after every draw."""
    tokens, longest = [0] * len(stream.tokens), 0
    for _ in range(num_draws):
        draw = stream.draw()
        size = sizes(draw)
        stream.add_tokens(draw.dataset, size)
        group = stream.group_of(draw.dataset)
        tokens[group] += size
        longest = max(longest, size)
        yield group, tokens, longest


def size_of(seed):
    """Sizes that differ a hundredfold, and by group."""
    rng = random.Random(seed)
    return lambda draw: rng.choice([1, 2, 30, 200, 4000]) if draw.dataset % 2 else rng.randint(100, 900)


@pytest.mark.parametrize("weights", [(1, 3), (3, 1), (1, 1), (1, 40), (1, 2, 3), (1, 1, 1, 1, 9)])
@pytest.mark.parametrize("seed", range(4))
def test_groups_have_their_share_of_the_tokens_at_all_times(weights, seed):
    lengths = [30, 50, 20, 9, 100, 31, 6, 8, 40, 60]
    groups = [
        Group(f"{number}", weight, tuple(range(number, len(lengths), len(weights))))
        for number, weight in enumerate(weights)
    ]
    # A group that is furthest behind goes next: two are never a sample apart. Of more, several may be ahead at once.
    allowed = sum(1 / rank for rank in range(1, len(weights)))
    for stream in streams_of(lengths, groups, 3, seed):
        tokens = None
        for _, tokens, longest in walk(stream, size_of(seed), 3000):
            total = sum(tokens)
            for number, weight in enumerate(weights):
                assert abs(tokens[number] - total * weight / sum(weights)) < allowed * longest
        assert stream.tokens == tokens


def test_each_group_has_epochs_of_its_own():
    lengths, groups = [12, 4, 10], [Group("a", 1, (0, 1)), Group("b", 1, (2,))]
    share = dealt(lengths, groups, 2)[1]
    drawn = {0: [], 1: []}
    stream = streams_of(lengths, groups, 2)[1]
    for _ in range(100):
        draw = stream.draw()
        drawn[stream.group_of(draw.dataset)].append((draw.dataset, draw.place))
        stream.add_tokens(draw.dataset, 1 if draw.dataset < 2 else 3)
    for group, members in ((0, {0, 1}), (1, {2})):
        of_group = {card for card in share if card[0] in members}
        epochs = [drawn[group][at : at + len(of_group)] for at in range(0, len(drawn[group]), len(of_group))]
        assert len(epochs) > 2 and all(set(epoch) == of_group for epoch in epochs[:-1])
    assert len(drawn[0]) == pytest.approx(3 * len(drawn[1]), abs=3)


def test_streams_begin_with_groups_in_proportion_to_their_weights():
    groups = [Group("a", 1, (0,)), Group("b", 3, (1,))]
    firsts = Counter(stream.draw().dataset for stream in streams_of([1000, 1000], groups, 400))
    assert 65 <= firsts[0] <= 135, "100 +- 4 standard deviations"


def test_a_stream_without_samples_of_a_group_draws_the_others(caplog):
    groups = [Group("few", 1, (0,)), Group("many", 1, (1,))]
    streams = streams_of([2, 30], groups, 3)
    assert "data stream 2 has no sample of few: too few for 3 streams" in caplog.text and len(caplog.records) == 1
    for index, stream in enumerate(streams):
        seen = {group for group, _, _ in walk(stream, lambda _: 5, 30)}
        assert seen == ({0, 1} if index < 2 else {1})


def test_a_saved_position_goes_on_the_same():
    groups = [Group("a", 2, (0, 1, 3)), Group("b", 3, (2, 4, 5))]
    stream, other = (Mixture(LENGTHS, groups, 1, 1, 3) for _ in range(2))
    for _ in walk(stream, size_of(1), 57):
        pass
    other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    expected = [(list(tokens), group) for group, tokens, _ in walk(stream, size_of(2), 100)]
    assert [(list(tokens), group) for group, tokens, _ in walk(other, size_of(2), 100)] == expected
    assert other.state_dict() == stream.state_dict()


def entry(name, group):
    return DatasetEntry(name, Path(), Path(), 1.0, False, None, group)


def test_groups_of_the_meta_file():
    entries = [entry("x", "text"), entry("y", "image"), entry("z", "text")]
    weights = ("text=0.5", "image=1.50")
    assert dataset_groups(entries, weights) == [Group("image", 3, (1,)), Group("text", 1, (0, 2))]
    assert dataset_groups(entries, None) == [Group("", 1, (0, 1, 2))]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (("a", None), "data set 'd1' has no 'group' in the meta file"),
        (("a", "c"), "data set 'd1' has group 'c', which has no weight; group 'b' has a weight and no data set"),
        (("a", "a"), "group 'b' has a weight and no data set .weights are given for a, b"),
    ],
)
def test_groups_that_do_not_fit_the_weights(groups, message):
    entries = [entry(f"d{number}", group) for number, group in enumerate(groups)]
    with pytest.raises(DataError, match=f"data.group_weights: {message}"):
        dataset_groups(entries, ("a=1", "b=2"))
