"""Noise is a pure function of (seed, stream, position, element), and its law is the one it claims."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from scipy import stats

from scoreray.trainer.diffusion import noise

POSITIONS = torch.arange(512)
UNIFORM_OF_7_AT_5 = [[0.19608443975448608, 0.5350874066352844]]
NORMAL_OF_7_AT_5 = [[0.7793843150138855, 0.8556907773017883, 1.1723458766937256, -0.08806467056274414]]
DRAWS = {"uniform": noise.uniform, "normal": noise.normal, "rademacher": noise.rademacher}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 5, 7), (784,)])
def test_a_value_does_not_depend_on_how_positions_are_batched(draw, shape):
    whole = draw(7, POSITIONS, shape)
    assert whole.shape == (512, *shape)
    for size in (1, 3, 64, 511):
        parts = torch.cat([draw(7, part, shape) for part in POSITIONS.split(size)])
        assert torch.equal(parts, whole)
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(7, POSITIONS[order], shape), whole[order])


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_an_element_depends_on_its_index_and_not_on_the_shape(draw):
    assert torch.equal(draw(7, POSITIONS, (100,))[:, :31], draw(7, POSITIONS, (31,)))
    assert torch.equal(draw(7, POSITIONS, (2, 3)).flatten(1), draw(7, POSITIONS, (6,)))


def test_float32_is_float64_rounded():
    single, double = (noise.uniform(1, POSITIONS, (64,), dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert (single - double).abs().max() < 2e-6
    single, double = (noise.normal(1, POSITIONS, (64,), dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert double.dtype == torch.float64
    assert torch.equal(single.double(), double)
    assert torch.equal(noise.normal(1, POSITIONS, (64,), dtype=torch.bfloat16), single.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("draw", "law"), [(noise.uniform, stats.uniform), (noise.normal, stats.norm)])
def test_the_law_passes_kolmogorov_smirnov_over_elements_and_over_positions(draw, law, dtype):
    over_elements = draw(3, torch.tensor([10**12]), (200_000,), dtype=dtype).flatten()
    over_positions = draw(3, torch.arange(200_000), (), dtype=dtype)
    for values in (over_elements, over_positions):
        assert stats.kstest(values.double().numpy(), law.cdf).pvalue > 1e-3


def test_normal_has_the_moments_and_the_tails_of_a_normal():
    count = 4_000_000
    values = noise.normal(5, torch.arange(4000), (1000,), dtype=torch.float64).flatten()
    moments = [math.prod(range(1, power, 2)) if power % 2 == 0 else 0 for power in range(17)]
    for power in range(1, 9):
        deviation = math.sqrt((moments[2 * power] - moments[power] ** 2) / count)
        assert abs((values**power).mean() - moments[power]) < 4.5 * deviation
    for edge in (3.0, 4.0, 5.0):
        expected = count * 2 * stats.norm.sf(edge)
        assert abs((values.abs() > edge).sum() - expected) < 4.5 * math.sqrt(expected)
    assert 4.7 < values.abs().max() < 6.3


def test_seeds_streams_positions_and_elements_are_independent():
    base = noise.normal(0, POSITIONS, (400,), dtype=torch.float64)
    others = {
        "seed": noise.normal(1, POSITIONS, (400,), dtype=torch.float64),
        "stream": noise.normal(0, POSITIONS, (400,), stream=1, dtype=torch.float64),
        "position": noise.normal(0, POSITIONS + 1, (400,), dtype=torch.float64),
        "element": base.roll(1, dims=1),
        "pair": base.reshape(512, 200, 2).flip(-1).reshape(512, 400),
    }
    bound = 4.5 / math.sqrt(base.numel())
    for name, other in others.items():
        assert abs((base * other).mean()) < bound, name
        assert abs(((base**2 - 1) * (other**2 - 1)).mean() / 2) < bound, f"{name}, squares"


def test_uniform_never_reaches_its_ends():
    values = noise.uniform(0, torch.arange(2000), (2000,))
    assert values.min() > 0
    assert values.max() < 1
    # The extremes that 23 bits can make stay inside too.
    assert torch.tensor([0, 2**23 - 1]).float().add(0.5).mul(2.0**-23).tolist() == [2.0**-24, 1 - 2.0**-24]


def test_normal_is_the_inverse_of_the_distribution_to_the_last_tail():
    k = torch.cat([torch.arange(1, 50_000), torch.logspace(0, 31, 100_000, base=2, dtype=torch.float64).long()])
    k = k.clamp(max=2**31 - 1)
    exact = torch.from_numpy(stats.norm.isf(k.numpy() * 2.0**-32))
    found = noise._quantile(k.to(torch.int32))
    assert (found.double() - exact).abs().max() < 7e-7
    assert torch.equal(noise._quantile(-k.to(torch.int32)), -found)
    ends = noise._quantile(torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)], dtype=torch.int32))
    assert ends.tolist() == pytest.approx([0, 6.2303, -6.2303, 0, 0], abs=1e-4)


def test_numbers_are_the_same_on_every_machine():
    """As torch's operations make them, on a GPU too, and as they were when this was written."""
    for count in (1, 2, 785):
        hashed = noise._hash(7, POSITIONS, (count + 1) // 2, [3])
        keys, elements = noise._keys(7, POSITIONS, [3]), noise._elements((count + 1) // 2, "cpu")
        assert torch.equal(noise._mix(keys[:, None] + elements), hashed)
        by_torch = noise._quantile(hashed.view(torch.int32))[:, :count]
        assert torch.equal(noise.normal(7, POSITIONS, (count,), stream=3), by_torch)
    assert hashlib.sha256(noise._lines("cpu").numpy().tobytes()).hexdigest()[:16] == "bbaf9ff9d8d65a6a"
    assert noise.uniform(7, torch.tensor([5]), (2,), stream=3).tolist() == UNIFORM_OF_7_AT_5
    assert noise.normal(7, torch.tensor([5]), (4,), stream=3).tolist() == NORMAL_OF_7_AT_5


def test_the_table_does_not_depend_on_the_last_places_of_a_library_s_logarithm(monkeypatch):
    table, exact = noise._lines("cpu"), torch.special.ndtri
    for off_by in (2e-13, 1e-4):
        off = lambda p, size=off_by: exact(p) + size * torch.rand_like(p).sub(0.5).sign()  # noqa: E731
        monkeypatch.setattr(torch.special, "ndtri", off)
        assert torch.equal(noise._lines.__wrapped__("cpu"), table) == (off_by < 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_context_changes_numbers(dtype):
    """Not even where the table is made in it."""
    expected = noise.normal(7, POSITIONS, (3, 5), dtype=torch.float32)
    before = torch.get_default_dtype()
    for context in (torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(), torch.device("cpu")):
        noise._lines.cache_clear()
        noise._elements.cache_clear()
        torch.set_default_dtype(dtype)
        try:
            with context:
                drawn = noise.normal(7, POSITIONS, (3, 5), dtype=torch.float32)
                by_torch = noise._quantile(noise._hash(7, POSITIONS, 8, [0]).view(torch.int32))[:, :15].view(-1, 3, 5)
        finally:
            torch.set_default_dtype(before)
        assert torch.equal(drawn, expected)
        assert torch.equal(by_torch, expected)


def test_blocks_do_not_change_numbers(monkeypatch):
    whole = noise.normals(7, POSITIONS[:9], (3, 41), streams=[0, 5])
    for block in (1, 7, 62, 100, 200):
        monkeypatch.setattr(noise, "_BLOCK", block)
        assert torch.equal(noise.normals(7, POSITIONS[:9], (3, 41), streams=[0, 5]), whole)


def test_negative_and_huge_seeds_and_positions_are_accepted():
    positions = torch.tensor([0, 2**62, -1])
    values = [noise.normal(seed, positions, (8,)) for seed in (0, -1, 2**63 + 5, 2**70)]
    assert all(value.isfinite().all() for value in values)
    assert not torch.equal(values[0], values[1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_compiles_into_one_graph(backend, dtype):
    draw = lambda p: noise.normal(3, p, (2, 65), dtype=dtype)  # noqa: E731
    torch.compiler.reset()  # else all cases are one function's, which has a limit of recompilations
    compiled = torch.compile(draw, backend=backend, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(POSITIONS), draw(POSITIONS))
    assert torch.equal(compiled(POSITIONS), draw(POSITIONS))


def test_a_chains_draws_are_its_own_each_a_new_one_and_in_the_dtype_asked_for():
    whole, alone = noise.ChainNoise(3, torch.arange(50, 60)), noise.ChainNoise(3, torch.tensor([57]))
    draws = []
    for source in (whole, alone):
        draws.append([source.uniform((1000,), torch.float64), source.normal((1000,), torch.float64)])
        draws[-1].append(source.uniform((1000,), torch.float64))
    for many, one in zip(*draws, strict=True):
        assert torch.equal(many[7:8], one)
    assert (draws[0][0] != draws[0][2]).all()
    other = noise.ChainNoise(4, torch.tensor([57])).uniform((1000,), torch.float64)
    for again in (draws[0][2][7], other[0]):
        assert torch.corrcoef(torch.stack([draws[1][0][0], again]))[0, 1].abs() < 5 / 1000**0.5
    training = noise.uniform(3, torch.tensor([57]), (1000,), stream=noise.STREAM_CHAIN, dtype=torch.float64)
    assert (training != draws[1][0]).all()


def test_draws_made_at_once_are_the_draws_one_by_one_and_numpys_hash_is_torchs():
    at_once = noise.normals(7, POSITIONS, (3, 5), streams=range(40, 44))
    assert torch.equal(at_once, torch.stack([noise.normal(7, POSITIONS, (3, 5), stream=s) for s in range(40, 44)]))
    z = torch.cat([POSITIONS * 0x5DEECE66D123, torch.tensor([-1, -(2**63), 2**63 - 1, 0])])
    assert torch.equal(torch.from_numpy(noise._mix_unsigned(z.numpy().view("u8").copy()).view("i8")), noise._mix(z))
