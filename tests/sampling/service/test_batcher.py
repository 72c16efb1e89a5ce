"""The step batcher: each request gets what it would get alone, and its fair share, whichever others fail or leave."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.sampling.guidance.guidance import ClassifierFree
from scoreray.sampling.model.load import load
from scoreray.sampling.offline.driver import in_same_rows
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import SAMPLERS, num_calls, sample
from scoreray.sampling.samplers.sigmas import karras
from scoreray.sampling.service.batcher import BatcherStopped, StepBatcher
from scoreray.sampling.service.request import SampleRequest
from scoreray.sampling.service.ticket import NonFiniteSamplesError
from scoreray.trainer.config.condition_values import condition_of
from scoreray.trainer.diffusion.condition import Condition, ConditionSpec

SMALL = {"ncsn": {"num_steps": 2}, "ncsnv2": {"num_steps": 2}}


class Recorder:
    """Data N(label / 2, 0.5^2), element by element, so that a row has the same bits in any batch; keeps the batches. To
    a level to reach it answers as an exact flow map."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, sigma, condition=None):
        self.batches.append(len(x))
        labels = None if condition is None else condition.values.get("label")
        shape = (-1, *[1] * (x.ndim - 1))
        mean = 0.0 if labels is None else (labels.to(x.dtype) * 0.5).view(shape)
        if labels is None:
            mean = torch.full((len(x),), -0.5, dtype=x.dtype).view(shape)
        kept = 0.25 / (0.25 + sigma**2)
        if condition is not None and "target_level" in condition.values:
            reached = condition.values["target_level"][:, 0] / sigma
            mapped = ((0.25 + (reached * sigma) ** 2) / (0.25 + sigma**2)).sqrt()
            kept = torch.where(condition.mask("target_level"), (mapped - reached) / (1 - reached), kept)
        return mean + (x - mean) * kept.to(x.dtype).view(shape)


def alone(request: SampleRequest, denoiser=None) -> torch.Tensor:
    noise = SampleNoise(request.seeds)
    x = float(request.sigmas[0]) * noise.normal((len(noise.seeds), *request.shape), torch.float32)
    if denoiser is None:
        denoiser = Recorder() if request.guidance == 1 else ClassifierFree(Recorder(), request.guidance)
    given = request.condition
    return sample(
        denoiser, x, request.sigmas, sampler=request.sampler, generator=noise, condition=given, **request.options
    )


def classes(*labels: int) -> Condition:
    return Condition({"label": torch.tensor(labels)})


class Conditioned:
    """Data N(m, 0.5^2), m from text, tokens, place and grid, element by element and each sum in one order, so that
    neither batch-mates nor padding change a row's bits; keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma, condition=None):
        self.calls.append((len(x), condition))
        mean = torch.full((len(x),), 0.25, dtype=x.dtype)
        for number, name in enumerate(("caption", "tokens", "place", "coarse") if condition else ()):
            if name in condition.values:
                value, mask = condition.values[name].to(x.dtype), condition.mask(name)
                value = torch.where(mask.view(*mask.shape, *[1] * (value.ndim - mask.ndim)), value, 0.0)
                for column in value.flatten(1).T:
                    mean = mean + column * 0.01
                mean = mean + 0.1 * number * mask.flatten(1).any(1) if mask.ndim == 2 else mean + 0.1 * number * mask
        mean = mean.view(-1, *[1] * (x.ndim - 1))
        return mean + (x - mean) * (0.25 / (0.25 + sigma**2)).to(x.dtype).view(mean.shape)


SPECS = {
    "caption": ConditionSpec("text", (16,)),
    "tokens": ConditionSpec("sequence", (5, 3)),
    "place": ConditionSpec("vector", (2,)),
    "coarse": ConditionSpec("concat", (1, 2, 2)),
}


def run(batcher: StepBatcher) -> int:
    steps = 0
    while batcher.step():
        steps += 1
    return steps


def request(name="heun", count=3, steps=6, first=0, **settings) -> SampleRequest:
    settings.setdefault("options", SMALL.get(name, {}))
    return SampleRequest(range(first, first + count), (2, 2), karras(steps, 0.02, 20.0), name, **settings)


def test_interleaved_requests_of_every_sampler_get_bitwise_what_each_gets_alone():
    requests = [request(name, 1 + i % 5, 4 + i % 7, 100 * i) for i, name in enumerate(SAMPLERS)]
    labels = classes(1, 0, 2)
    requests += [request("heun", condition=labels), request("ddpm", guidance=2.5, condition=labels, first=50)]
    requests += [request("flow_map", 4, steps, 60 + steps, options={"gamma": 0.5}) for steps in (1, 2)]
    requests += [
        request("flow_map", 3, 2, 70, condition=labels),
        request("consistency", 2, 2, options={"target": True}),
    ]
    requests += [request("flow_map", guidance=2.5, condition=labels, first=80)]
    denoiser = Recorder()
    batcher = StepBatcher(denoiser, 24)
    tickets = []
    for one in requests:  # each comes when those before are under way
        tickets.append(batcher.submit(one))
        batcher.step()
    run(batcher)
    for one, ticket in zip(requests, tickets, strict=True):
        assert torch.equal(ticket.result(0), alone(one)), one.sampler
    assert max(denoiser.batches) <= 24
    assert max(denoiser.batches) > 12


def test_requests_with_other_conditions_and_lengths_share_calls_and_get_bitwise_what_each_gets_alone():
    given = [
        None,
        {"caption": "a red square"},
        {"caption": "ein Kreis", "tokens": [[1, 2, 3]]},
        {"tokens": [[0.5] * 3] * 4, "place": [1, -1], "coarse": [[1, 2], [3, 4]]},
        {"caption": "", "place": [2, 2]},
        {"caption": "x", "coarse": [[0, 1], [1, 0]]},
    ]
    weights = [{}, {}, {"tokens": 3.0, "caption": 1.5}, {"place": 0.0}, {"place": 2.0, "caption": -1.0}, {}]
    conditions = [None if values is None else condition_of(values, SPECS).expand(3) for values in given]
    requests = [
        request("heun", 3, 4 + i, 10 * i, condition=condition, weights=weights[i], guidance=2.0 if i == 5 else 1.0)
        for i, condition in enumerate(conditions)
    ]
    shared = Conditioned()
    batcher = StepBatcher(shared, 32, batch_sizes=(24, 32))
    tickets = [batcher.submit(one) for one in requests]
    run(batcher)
    assert len(shared.calls) <= 2 * 9, "calls are shared: the longest request alone takes 2 * 9 - 1"
    for one, ticket in zip(requests, tickets, strict=True):
        own = Conditioned()
        alone_in_batcher = StepBatcher(own, 32)
        again = alone_in_batcher.submit(one)
        run(alone_in_batcher)
        assert torch.equal(ticket.result(0), again.result(0))
        denoiser = own if one.guidance == 1 and not one.weights else ClassifierFree(own, one.guidance, one.weights)
        assert torch.equal(ticket.result(0), alone(one, denoiser))


def test_a_text_is_read_once_a_part_to_the_bits_that_it_had_when_read_at_each_call(new_run, tmp_path, monkeypatch):
    """Requests under texts of other lengths, guided and not, and one without, share the calls of a real network."""
    specs = {"caption": ConditionSpec("text", (6,)), "label": ConditionSpec("class", classes=("a", "b"))}
    network = load(new_run(str(tmp_path / "run"), shape=(3, 8, 8), classes=["a"], conditions=specs), device="cpu")
    denoiser, reads = in_same_rows(network, 16), []
    denoiser.network.embedding.inputs["text_caption"].read.register_forward_hook(lambda *call: reads.append(call))
    given = [{"caption": "a"}, {"caption": "abcde", "label": 1}, {"label": 0}, {"caption": "abcdef"}]
    requests = [
        SampleRequest(range(8 * i, 8 * i + 3), (3, 8, 8), karras(3, 0.02, 20.0), guidance=1.0 + i % 2,
                      condition=condition_of(values, specs).expand(3))
        for i, values in enumerate(given)
    ]  # fmt: skip

    def drawn():
        batcher = StepBatcher(denoiser, 16)
        tickets = [batcher.submit(one) for one in requests]
        run(batcher)
        return [ticket.result(0) for ticket in tickets]

    once, reads_once = drawn(), len(reads)
    monkeypatch.setattr("scoreray.sampling.service.ticket.encoded", lambda denoiser, condition: condition)
    assert all(map(torch.equal, drawn(), once))
    assert reads_once == 2 * len(requests), "parts, of two rows"
    assert len(reads) - reads_once > reads_once


def test_calls_are_shared_not_made_per_request():
    denoiser = Recorder()
    batcher = StepBatcher(denoiser, 32)
    for i in range(16):
        batcher.submit(request("euler", 2, 10, 10 * i))
    assert run(batcher) == 10
    assert denoiser.batches == [32] * 10
    assert batcher.rows == batcher.calls * batcher.max_batch


def test_guidance_counts_two_rows_a_sample():
    denoiser = Recorder()
    batcher = StepBatcher(denoiser, 16)
    batcher.submit(request("euler", 16, 5, guidance=3.0, condition=classes(*(0,) * 16)))
    assert run(batcher) == 10
    assert denoiser.batches == [16] * 10


def test_guidance_of_many_terms_takes_small_parts_and_one_of_more_terms_than_a_call_has_rows_is_refused():
    values = {f"place{i}": torch.zeros(4, 2) for i in range(6)}
    weights = {name: 2.0 + i for i, name in enumerate(values)}
    many = request("euler", 4, 5, condition=Condition(values), weights=weights)
    denoiser = Conditioned()
    batcher = StepBatcher(denoiser, 16)
    ticket = batcher.submit(many)
    run(batcher)
    assert ticket.result(0).shape == (4, 2, 2)
    assert {rows for rows, _ in denoiser.calls} == {14}
    with pytest.raises(UserError, match="guidance of 7 terms"):
        StepBatcher(denoiser, 4).submit(many)


def test_one_sample_does_not_wait_behind_many_nor_many_behind_a_stream_of_single_ones():
    batcher = StepBatcher(Recorder(), 16)
    large = batcher.submit(request("euler", 128, 10))
    batcher.step()
    single = batcher.submit(request("euler", 1, 10, 1000))
    for _ in range(10):
        assert not single.done()
        batcher.step()
    assert single.done()
    waited = 0
    while not large.done():
        for i in range(4):  # of two calls each: half of what the network can do
            batcher.submit(request("euler", 1, 2, 2000 + i))
        batcher.step()
        waited += 1
        assert waited <= 3 * 128 * 10 / 16
    assert large.result(0).shape == (128, 2, 2)


def test_shorter_requests_end_sooner_and_old_ones_are_not_overtaken_for_ever():
    batcher = StepBatcher(Recorder(), 16)
    long = batcher.submit(request("euler", 16, 60, expected_calls=60))
    batcher.step()
    short, calls = batcher.submit(request("euler", 16, 6, 100, expected_calls=6)), 0
    while not short.done():
        calls += batcher.step()
    assert calls <= 9  # an even share would take 12
    assert not long.done()
    large, calls = batcher.submit(request("euler", 32, 10, 200, expected_calls=10)), 0
    while not large.done():
        while batcher.rows_waiting < 64:  # always some 30 others, of four calls each
            batcher.submit(request("euler", 1, 4, 2000, expected_calls=4))
        calls += batcher.step()
        assert calls <= 240  # by even shares it would be some 350


def test_a_large_request_is_begun_part_by_part():
    batcher = StepBatcher(Recorder(), 16, part_rows=4)
    batcher.submit(request("euler", 4096, 4))
    batcher.step()
    assert sum(len(ticket.parts) for ticket in batcher._tickets) <= 5
    assert batcher.rows_waiting == 4096


def test_a_cancelled_request_frees_its_rows_before_the_next_call():
    denoiser = Recorder()
    batcher = StepBatcher(denoiser, 16)
    gone, stays = batcher.submit(request("euler", 8, 10)), batcher.submit(request("euler", 4, 10, 100))
    batcher.step()
    assert gone.cancel()
    batcher.step()
    assert denoiser.batches == [12, 4]
    run(batcher)
    assert torch.equal(stays.result(0), alone(request("euler", 4, 10, 100)))


def test_one_that_fails_does_not_hurt_its_batch_mates():
    class Picky(Recorder):
        def __call__(self, x, sigma, condition=None):
            labels = torch.full((len(x),), -1) if condition is None else condition.values["label"]
            if (labels == 7).any():
                raise RuntimeError("no class 7")
            if (labels == 6).any():
                x = torch.where((labels == 6).view(-1, 1, 1), math.nan, x)
            return super().__call__(x, sigma, condition)

    batcher = StepBatcher(Picky(), 16)
    good = batcher.submit(request("heun", 3, 6))
    bad = batcher.submit(request("heun", 1, 6, condition=classes(7)))
    nan = batcher.submit(request("heun", 1, 6, condition=classes(6)))
    burst = batcher.submit(request("heun", 1, 6, 9), lambda *_: 1 / 0)
    run(batcher)
    assert torch.equal(good.result(0), alone(request("heun", 3, 6)))
    with pytest.raises(RuntimeError, match="no class 7"):
        bad.result(0)
    with pytest.raises(NonFiniteSamplesError, match="not finite"):
        nan.result(0)
    with pytest.raises(ZeroDivisionError):
        burst.result(0)


def test_padding_to_compiled_sizes_changes_no_sample():
    denoiser = Recorder()
    batcher = StepBatcher(denoiser, 16, batch_sizes=(1, 4, 16))
    ticket = batcher.submit(request("ddpm", 3, 6, condition=classes(0, 1, 2)))
    run(batcher)
    assert set(denoiser.batches) == {4}
    assert torch.equal(ticket.result(0), alone(request("ddpm", 3, 6, condition=classes(0, 1, 2))))


def test_requests_of_other_shapes_take_turns():
    batcher = StepBatcher(Recorder(), 16)
    requests = [request("heun", 3, 6), SampleRequest(range(3), (5,), karras(6)), request("heun", 3, 6, first=9)]
    tickets = [batcher.submit(one) for one in requests]
    run(batcher)
    for one, ticket in zip(requests, tickets, strict=True):
        assert torch.equal(ticket.result(0), alone(one))


def test_previews_name_their_rows_and_end_in_the_sample():
    seen = []
    batcher = StepBatcher(Recorder(), 16, part_rows=2)
    ticket = batcher.submit(request("euler", 3, 5), lambda first, sigma, d: seen.append((first, sigma, d)))
    run(batcher)
    assert {first for first, _, _ in seen} == {0, 2}
    assert torch.equal([d for first, _, d in seen if first == 2][-1], ticket.result(0)[2:])
    assert len(seen) == 2 * num_calls("euler", karras(5))


def test_in_its_thread_it_serves_threads_and_asyncio_and_finishes_before_it_closes():
    async def submit_eight(batcher):
        return await asyncio.gather(*[batcher.submit(request("heun", 2, 5, 10 * i)) for i in range(8)])

    before = set(threading.enumerate())
    with StepBatcher(Recorder(), 16) as batcher:
        (thread,) = [new for new in set(threading.enumerate()) - before if new.name == "step-batcher"]
        answers = asyncio.run(submit_eight(batcher))
        last = batcher.submit(request("euler", 40, 6))
    for i, answer in enumerate(answers):
        assert torch.equal(answer, alone(request("heun", 2, 5, 10 * i)))
    assert last.result(0).shape == (40, 2, 2)
    assert batcher.rows_waiting == 0
    assert not thread.is_alive()
    with pytest.raises(BatcherStopped, match="closed"):
        batcher.submit(request())


def test_bad_requests_are_refused_when_they_are_submitted():
    batcher = StepBatcher(Recorder())
    for bad, what in (
        (request("hein"), "did you mean 'heun'"),
        (request("ddim", options={"eta": 2}), "eta = 2"),
        (request(count=0), "no samples"),
        (request(guidance=2.0), "needs a condition"),
        (request(condition=classes(0, 0, 0), weights={"lable": 2.0}), "did you mean 'label'"),
        (request(condition=classes(0, 0)), "a condition of 2 rows"),
        (SampleRequest([1], (2,), [1.0, 2.0, 0.0]), "descend"),
    ):
        with pytest.raises(UserError, match=what):
            batcher.submit(bad)
    assert not batcher.step()
    with pytest.raises(UserError, match="max_batch = 1"):
        StepBatcher(Recorder(), 1)


def test_a_request_that_a_stopped_batcher_holds_ends_in_batcher_stopped():
    """By its type a replica answers `unavailable`, which clients try again, and not that the request is wrong."""
    batcher = StepBatcher(Recorder(), 16)
    held = batcher.submit(request("euler", 2, 5))
    batcher.step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        batcher._run()
    with pytest.raises(BatcherStopped, match="ZeroDivisionError"):
        held.result(0)
    with pytest.raises(BatcherStopped, match="closed"):
        batcher.submit(request("euler", 2, 5))
