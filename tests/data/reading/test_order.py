"""The order: each sample once an epoch, whatever the numbers; the same at every world size; quick to open anywhere."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoreray.data.errors import UserError
from scoreray.data.reading.order import Order, default_lanes


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    lanes=st.sampled_from([1, 2, 3, 7, 24]),
    shuffle_block=st.integers(1, 40),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 2**63),
)
@settings(max_examples=150, deadline=None)
def test_every_sample_has_exactly_one_position_in_every_epoch(
    counts: list[int], lanes: int, shuffle_block: int, epoch: int, seed: int
) -> None:
    order = Order(counts, seed=seed, num_lanes=lanes, shuffle_block=shuffle_block)
    n = order.num_samples
    samples = order.samples(np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(samples.tolist()) == list(range(n))


def test_positions_asked_one_by_one_out_of_order_and_together_agree() -> None:
    order = Order([30, 50, 21], seed=5, num_lanes=6, shuffle_block=8)
    positions = np.random.default_rng(0).permutation(500)
    together = order.samples(positions)
    alone = [
        int(Order([30, 50, 21], seed=5, num_lanes=6, shuffle_block=8).samples(np.array([p]))[0]) for p in positions
    ]
    assert together.tolist() == alone


def test_epochs_and_seeds_differ() -> None:
    order = Order([100, 100], seed=1, num_lanes=4, shuffle_block=16)
    epochs = [order.samples(np.arange(e * 200, (e + 1) * 200)) for e in range(3)]
    other = Order([100, 100], seed=2, num_lanes=4, shuffle_block=16).samples(np.arange(200))
    for a, b in [(epochs[0], epochs[1]), (epochs[1], epochs[2]), (epochs[0], other)]:
        assert (a == b).mean() < 0.1


def test_the_order_is_pinned() -> None:
    """A change of these numbers would make every run that is resumed see other samples."""
    order = Order([5, 7, 4], seed=123, num_lanes=4, shuffle_block=3)
    assert order.samples(np.arange(32)).tolist() == PINNED


PINNED = [0, 4, 9, 12, 1, 6, 8, 15, 2, 5, 10, 14, 3, 7, 11, 13, 2, 6, 10, 13, 3, 7, 9, 0, 1, 5, 11, 14, 4, 8, 12, 15]


def test_blocks_of_a_lane_are_few_long_runs() -> None:
    order = Order([1000] * 20, seed=0, num_lanes=8, shuffle_block=256)
    for epoch in range(3):
        runs = [r for l in range(8) for b in range(order.num_blocks(epoch, l)) for r in order.block(epoch, l, b).ranges]
        assert sum(run.count for run in runs) == 20_000
        assert len(runs) < 20_000 / 256 + 8 + 20 + 8 + 1  # blocks, the lanes' ends, the shards' ends, the turn


def test_neighbours_in_the_run_are_spread_over_the_data_set_like_in_a_full_permutation() -> None:
    """The mean distance of two samples of a batch of 64 drawn from 0..N-1 is N/3 in a full permutation."""
    order = Order([1000] * 20, seed=3, num_lanes=64, shuffle_block=128)
    samples = order.samples(np.arange(20_000)).reshape(-1, 50)
    distance = np.abs(samples[:, :, None] - samples[:, None, :]).sum() / (400 * 50 * 49)
    assert distance == pytest.approx(20_000 / 3, rel=0.05)


def test_a_run_of_1e9_samples_in_1e5_shards_is_opened_anywhere_at_once() -> None:
    started = time.process_time()
    order = Order(np.full(100_000, 10_000), seed=1, num_lanes=64, shuffle_block=256)
    samples = order.samples(np.arange(7_500_000_000, 7_500_000_256))
    assert time.process_time() - started < 1
    assert len(set(samples.tolist())) == 256


def test_default_lanes_leave_room_for_other_world_sizes() -> None:
    assert [default_lanes(b) for b in (1, 7, 48, 64, 192, 256, 1000)] == [1, 7, 48, 64, 96, 128, 100]
    assert default_lanes(192, [8, 64]) == 64
    assert default_lanes(320, [160]) == 160
    with pytest.raises(UserError, match=r"64 is not divisible by every world size .*\(2, 3\); take a multiple of 6"):
        default_lanes(64, [3, 2])
