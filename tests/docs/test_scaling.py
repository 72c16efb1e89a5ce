"""The prediction for many GPUs: the page's tables are the model's, and the model's limits are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from scaling import NODES, SIZES, WAYS, WORKS, efficiency, table, table_of_zero0

from scoreray.trainer.engine.communication import GpuNodes, Work, all_gather_s, all_reduce_s, step_time

PAGE = (Path(__file__).parent.parent.parent / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize("name", WORKS)
def test_the_pages_tables_are_the_models(name: str) -> None:
    assert f"{name}\n\n{table(WORKS[name])}\n" in PAGE


def test_the_page_states_what_less_overlap_would_cost() -> None:
    assert table_of_zero0() in PAGE


def test_sums_of_large_messages_are_no_faster_than_what_is_published() -> None:
    """Bus bandwidth of H100 nodes with 400 Gb/s a GPU: 400 to 450 GB/s (nccl-tests, 8 GB)."""
    for num_gpus in (16, 64, 256, 1024):
        assert 250e9 < 2 * 8e9 / all_reduce_s(8e9, num_gpus, NODES) < 450e9


def test_goals_of_the_recommended_stage() -> None:
    """95% at 64 GPUs and 90% at 1,024 with zero_stage 0, wherever it fits into a GPU's memory."""
    for name in list(WORKS)[:2]:
        assert efficiency("zero0", 64, WORKS[name]) > 0.95
        assert efficiency("zero0", 1024, WORKS[name]) > 0.90


def test_collectives_without_latency_move_the_bytes_that_they_must() -> None:
    """A ring's bound inside a node; between nodes each adapter carries its GPU's part."""
    free = GpuNodes(inside_latency_s=0, between_latency_s=0, inside_bytes_per_s=100.0, between_bytes_per_s=10.0)
    assert all_gather_s(800, 8, free) == pytest.approx(800 * 7 / 8 / 100)
    assert all_reduce_s(800, 8, free) == pytest.approx(2 * 800 * 7 / 8 / 100)
    assert all_gather_s(800, 16, free) == pytest.approx(max(7.0, 800 / 2 / 80))
    assert all_reduce_s(800, 16, free) == pytest.approx(max(14, 2 * 100 / 2 / 10))
    assert all_reduce_s(800, 16, replace(free, pipelined=False)) == pytest.approx(14 + 2 * 100 / 2 / 10)
    assert all_gather_s(800, 1, free) == all_reduce_s(800, 1, free) == 0


@pytest.mark.parametrize("way", WAYS)
def test_efficiency_at_its_limits(way: str) -> None:
    """Alone nothing is lost; more GPUs never help; endless computing hides what can be hidden."""
    work = WORKS["DiT-XL, 675 M parameters, 32 images a GPU"]
    assert efficiency(way, 1, work) == pytest.approx(1)
    found = [efficiency(way, n, work) for n in SIZES]
    assert found == sorted(found, reverse=True)
    assert efficiency(way, 1024, Work(1e6, 1e12, 1000)) > 0.99


def test_a_partition_group_is_never_slower_than_none() -> None:
    for work in WORKS.values():
        for num_gpus in SIZES:
            grouped, all_ranks = (step_time(WAYS[way], num_gpus, work, NODES) for way in ("hpz", "zero3"))
            assert grouped.exposed_s <= all_ranks.exposed_s
