"""The order of buckets: each global batch is of one, and each sample comes once in each of its bucket's epochs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoreray.data.buckets.batch_order import BatchOrder
from scoreray.data.buckets.sizes import bucket_of, parse_buckets, sorted_sizes, usual_sizes
from scoreray.data.errors import UserError

COUNTS = st.lists(st.integers(1, 90), min_size=1, max_size=6)


@given(counts=COUNTS, batch=st.integers(1, 40), seed=st.integers(0, 2**63), rounds=st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_every_bucket_hands_out_its_batches_one_after_another(
    counts: list[int], batch: int, seed: int, rounds: int
) -> None:
    """After a round all epochs of every bucket up to then are handed out, but for less than a batch of each."""
    order = BatchOrder(counts, global_batch_size=batch, seed=seed)
    places: dict[int, list[int]] = {bucket: [] for bucket in range(len(counts))}
    for number in range(order.first_batch(rounds)):
        bucket, place = order.locate(number)
        places[bucket].append(place)
    for bucket, count in enumerate(counts):
        assert places[bucket] == list(range(rounds * count // batch))
        assert rounds * count - batch < len(places[bucket]) * batch <= rounds * count


@given(counts=COUNTS, batch=st.integers(1, 40), numbers=st.lists(st.integers(0, 10**12), max_size=5))
@settings(max_examples=50, deadline=None)
def test_any_batch_is_found_without_going_through_those_before(
    counts: list[int], batch: int, numbers: list[int]
) -> None:
    order = BatchOrder(counts, global_batch_size=batch, seed=3)
    for number in numbers:
        bucket, place = order.locate(number)
        epoch = -(-(place + 1) * batch // counts[bucket]) - 1  # of the bucket, in which the batch ends: the round
        assert order.first_batch(epoch) <= number < order.first_batch(epoch + 1)


def test_rounds_are_shuffled_and_seeds_differ() -> None:
    def buckets(seed: int, first: int) -> list[int]:
        order = BatchOrder([640, 640, 320], global_batch_size=16, seed=seed)
        return [order.locate(first + i).bucket for i in range(100)]

    assert Counter(buckets(1, 0)) == {0: 40, 1: 40, 2: 20}
    for a, b in ((buckets(1, 0), buckets(2, 0)), (buckets(1, 0), buckets(1, 100))):
        assert np.mean(np.array(a) == np.array(b)) < 0.7


def test_the_order_of_batches_is_pinned() -> None:
    """A change of these numbers would make every run that is resumed see other samples."""
    order = BatchOrder([5, 30, 17], global_batch_size=8, seed=123)
    assert [tuple(order.locate(number)) for number in range(16)] == PINNED


PINNED = [
    (2, 0),
    (1, 0),
    (2, 1),
    (1, 1),
    (1, 2),
    (0, 0),
    (2, 2),
    (2, 3),
    (1, 3),
    (1, 4),
    (1, 5),
    (1, 6),
    (2, 4),
    (1, 7),
    (1, 8),
    (1, 9),
]


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((600, 400), (80, 48)),
        ((400, 600), (48, 80)),
        ((500, 500), (64, 64)),
        ((10_000, 1), (80, 48)),
        ((64, 60), (64, 64)),
    ],
)
def test_a_picture_goes_to_the_size_of_the_nearest_aspect_ratio(
    picture: tuple[int, int], size: tuple[int, int]
) -> None:
    sizes = sorted_sizes([(64, 64), (80, 48), (48, 80)])
    assert sizes[bucket_of(sizes, picture)] == size


@given(picture=st.tuples(st.integers(1, 10**5), st.integers(1, 10**5)))
def test_nearest_is_by_the_logarithm_of_the_ratio(picture: tuple[int, int]) -> None:
    sizes = sorted_sizes(usual_sizes(512, 3, 64))
    distances = [abs(np.log(picture[0] / picture[1]) - np.log(w / h)) for w, h in sizes]
    assert distances[bucket_of(sizes, picture)] <= min(distances) + 1e-12


def test_the_usual_sizes_are_those_of_sdxl() -> None:
    assert parse_buckets("1024", 2, 64) == (
        (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024), (1088, 960), (1152, 896), (1216, 832),
        (1344, 768),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64x64,128x128", "same aspect ratio"),
        ("100", "--buckets 100: must be a multiple of --multiple 64"),
        ("64x0", "--buckets 64x0: WIDTHxHEIGHT is needed"),
        ("64x9999", "--buckets 64x9999: sides of 1 to 8192"),
    ],
)
def test_wrong_buckets_are_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_buckets(text)
