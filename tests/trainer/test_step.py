"""The training module: randomness from (seed, position) alone, in fp32, in bf16 and under autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.data.fields.normalisation import Normaliser, to_uint8, to_unit_range
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.augmentation import AugmentationConfig, augment, augmentation_mistakes
from scoreray.trainer.diffusion.condition import Condition, Conditions, ConditionSpec
from scoreray.trainer.diffusion.denoiser import PARAMETERIZATIONS, Denoiser
from scoreray.trainer.diffusion.process import EDM, PROCESSES, VP
from scoreray.trainer.diffusion.sigma_sampling import LogNormal, UniformT
from scoreray.trainer.diffusion.weighting import WEIGHTINGS, Adaptive, Learned, LikelihoodWeighting
from scoreray.trainer.networks.rbm import GaussianRBMConfig, RBMConfig
from scoreray.trainer.objectives.denoising import DenoisingObjective, EDMObjective
from scoreray.trainer.objectives.energy_based import ContrastiveObjective, EnergyObjective
from scoreray.trainer.objectives.objective import OBJECTIVES
from scoreray.trainer.objectives.score_matching import SlicedVRObjective
from scoreray.trainer.objectives.teacher import Teacher
from scoreray.trainer.step import MachineModule, TrainingModule, drawn_latents

B = 12
POSITIONS = torch.arange(100, 100 + B)
WITHOUT_SOLVER = [kind for kind in OBJECTIVES if kind != "maximum_likelihood"]  # torchdiffeq compares the times it gets


class Small(nn.Module):
    """A convolution that keeps the labels and the condition that it saw, and adds the sum of the latter's numbers."""

    def __init__(self, conditions: Conditions | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conditions = conditions
        self.seen: Condition | None = None
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.labels: Tensor | None = None

    def forward(self, x: Tensor, c_noise: Tensor, condition: Condition | None = None) -> Tensor:
        self.seen, self.labels = condition, None if condition is None else condition.values.get("label")
        h = self.first(x) + c_noise[:, None, None, None].to(x.dtype)
        for name in self.conditions or {} if condition else {}:
            value, mask = condition.values[name], condition.mask(name)
            masked = value * mask.view(*mask.shape, *[1] * (value.ndim - mask.ndim))
            h = h + masked.reshape(len(x), -1).float().mean(1).to(x.dtype)[:, None, None, None]
        return self.last(torch.tanh(h))


def module(objective=None, parameterization="edm", process=None, seed=5, conditions=None, **settings) -> TrainingModule:
    denoiser = Denoiser(Small(conditions), parameterization)
    objective, process = objective or EDMObjective(), process or EDM()
    made = TrainingModule(denoiser, objective, process, seed=seed, global_batch_size=B, **settings)
    if getattr(objective, "needs_teacher", False):
        made.teacher = Teacher(Denoiser(Small(conditions)))
    return made


def images() -> Tensor:
    return torch.randint(0, 256, (B, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


LABELS = torch.arange(B) % 10

EVERY_KIND = {
    "label": ConditionSpec("class", classes=tuple("abc")),
    "place": ConditionSpec("vector", (2,), normaliser=Normaliser("channel", (10.0, 0.0), (2.0, 4.0))),
    "coarse": ConditionSpec("concat", (1, 2, 2), normaliser=Normaliser("range", (127.5,), (127.5,))),
    "tokens": ConditionSpec("sequence", (3, 2), normaliser=Normaliser("log1p", (1.0, 0.0), (1.0, 2.0))),
    "caption": ConditionSpec("text", (4,)),
}


def every_kind(rows: int, device: str = "cpu") -> Condition:
    """A condition of each kind, in the data's own units."""
    g = torch.Generator().manual_seed(1)
    values = {
        "label": torch.arange(rows) % 3,
        "place": torch.randn(rows, 2, generator=g) * 3 + 9,
        "coarse": torch.randint(0, 256, (rows, 1, 2, 2), dtype=torch.uint8, generator=g),
        "tokens": torch.randn(rows, 3, 2, generator=g).half(),
        "caption": torch.randint(97, 123, (rows, 4), dtype=torch.uint8, generator=g),
    }
    masks = {"tokens": torch.arange(3).expand(rows, 3) < 2, "caption": torch.ones(rows, 4, dtype=torch.bool)}
    return Condition(values, masks).to(device)


def test_half_the_images_are_flipped_others_each_epoch_by_position_alone():
    config, positions = AugmentationConfig(horizontal_flip=0.5), torch.arange(20_000)
    picture = torch.arange(6, dtype=torch.uint8).reshape(1, 1, 2, 3)
    seen = augment(picture.expand(len(positions), -1, -1, -1), config, 5, positions)
    flipped = (seen == picture.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped, ~(seen == picture).flatten(1).all(1))
    assert abs(flipped.double().mean() - 0.5) < 4 * 0.5 / len(positions) ** 0.5
    first, second = flipped[:10_000], flipped[10_000:]  # one epoch and the next
    assert abs((first == second).double().mean() - 0.5) < 4 * 0.5 / len(first) ** 0.5
    alone = augment(picture.expand(3, -1, -1, -1), config, 5, positions[777:780])
    assert torch.equal(alone, seen[777:780])
    assert augment(picture, AugmentationConfig(), 5, positions[:1]) is picture


def test_points_can_not_be_flipped():
    assert augmentation_mistakes(AugmentationConfig(), (2,)) == []
    (line,) = augmentation_mistakes(AugmentationConfig(horizontal_flip=0.5), (2,))
    assert line.startswith("augmentation.horizontal_flip: 0.5 is for images")
    with pytest.raises(UserError, match="between 0 and 1"):
        AugmentationConfig(horizontal_flip=1.5)


def test_a_flipped_image_is_trained_on_with_the_noise_of_its_place():
    always, never = module(augmentation=AugmentationConfig(horizontal_flip=1.0)), module()
    (flipped, sigma), (mirrored, same) = (
        always(images(), LABELS, POSITIONS),
        never(images().flip(-1), LABELS, POSITIONS),
    )
    assert torch.equal(flipped, mirrored)
    assert torch.equal(sigma, same)
    assert not torch.equal(flipped, never(images(), LABELS, POSITIONS)[0])


def test_latents_are_drawn_from_moments_again_at_each_position():
    mean, std = torch.randn(len(POSITIONS), 1, 8, 8), torch.rand(len(POSITIONS), 1, 8, 8)
    z = noise.normal(5, POSITIONS, (1, 8, 8), stream=noise.STREAM_LATENT)
    of_moments, plain = module(moments=True), module()
    moments = torch.cat([mean, std], 1)
    assert torch.equal(of_moments(moments, LABELS, POSITIONS)[0], plain(mean + std * z, LABELS, POSITIONS)[0])
    again = drawn_latents(moments, 5, POSITIONS + 1000)
    assert not torch.equal(again, mean + std * z)


def test_bytes_become_minus_one_to_one_and_floats_stay():
    bytes_ = torch.tensor([0, 255], dtype=torch.uint8)
    assert to_unit_range(bytes_).tolist() == [-1.0, 1.0]
    points = torch.randn(3, 2)
    assert to_unit_range(points) is points
    assert to_unit_range(points.double()).dtype == torch.float64
    assert to_unit_range(points.bfloat16()).dtype == torch.float32


def test_every_byte_comes_back_and_what_is_outside_is_clipped():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit_range(every)), every)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_the_default_step_is_edm_s_by_hand():
    from scoreray.trainer.diffusion import noise

    step = module()
    loss, sigma = step(images(), LABELS, POSITIONS)
    u = noise.uniform(5, POSITIONS, stream=noise.STREAM_SIGMA, dtype=torch.float64)
    torch.testing.assert_close(sigma, (-1.2 + 1.2 * torch.special.ndtri(u)).exp().float())
    x0 = images().float() / 127.5 - 1
    s = sigma[:, None, None, None]
    x = x0 + s * noise.normal(5, POSITIONS, (1, 4, 4), stream=noise.STREAM_NOISE)
    c_skip, c_out = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt()
    denoised = c_skip * x + c_out * step.denoiser.network(x / (s**2 + 0.25).sqrt(), sigma.log() / 4)
    expected = ((s**2 + 0.25) / (s * 0.5) ** 2 * (denoised - x0) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_sample_s_loss_is_the_same_in_any_micro_batch(kind):
    few = {"solver": "midpoint", "steps": 2} if kind == "maximum_likelihood" else {}
    objective = OBJECTIVES[kind](sigma_sampling=LogNormal(stratified=True), **few)
    step = module(objective, "energy_dot" if issubclass(OBJECTIVES[kind], EnergyObjective) else "edm")
    loss, sigma = step(images(), LABELS, POSITIONS)
    parts = [step(images()[i : i + 3], LABELS[i : i + 3], POSITIONS[i : i + 3]) for i in range(0, B, 3)]
    assert torch.equal(torch.cat([part[1] for part in parts]), sigma)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), loss, rtol=1e-4, atol=1e-4)


def test_another_seed_or_position_gives_another_noise_and_the_same_gives_the_same():
    loss, sigma = module()(images(), LABELS, POSITIONS)
    again = module()(images(), LABELS, POSITIONS)
    assert torch.equal(again[0], loss)
    for other in (module(seed=6)(images(), LABELS, POSITIONS), module()(images(), LABELS, POSITIONS + B)):
        assert (other[1] != sigma).all()
        assert (other[0] != loss).all()


def test_labels_are_hidden_at_the_rate_asked_for_by_position():
    step = module(EDMObjective(label_dropout=0.25))
    many = torch.arange(8000)
    labels = torch.full((8000,), 3)
    points = torch.zeros(8000, 1, 1, 1)
    step(points, labels, many)
    hidden = step.denoiser.network.labels == -1
    assert abs(hidden.float().mean() - 0.25) < 4.5 * (0.25 * 0.75 / 8000) ** 0.5
    step(points[:50], labels[:50], many[100:150])
    assert torch.equal(step.denoiser.network.labels == -1, hidden[100:150])
    step = module()
    step(points[:4], labels[:4], many[:4])
    assert torch.equal(step.denoiser.network.labels, labels[:4])
    step(points[:4], None, many[:4])
    assert step.denoiser.network.labels is None


def test_conditions_are_dropped_together_and_each_at_its_own_rate_by_position():
    rates = {"place": 0.2, "tokens": 0.2, "caption": 0.0}
    step = module(EDMObjective(label_dropout=0.25), conditions=EVERY_KIND, dropout=rates)
    n = 8000
    many, points = torch.arange(n), torch.zeros(n, 1, 1, 1)
    step(points, every_kind(n), many)

    def given(name: str) -> Tensor:
        mask = step.denoiser.network.seen.mask(name)
        return mask if mask.ndim == 1 else mask.any(1)

    there = {name: given(name) for name in EVERY_KIND}
    together = ~there["label"]
    alone = module(EDMObjective(label_dropout=0.25))  # the same rows as of a run with classes alone
    alone(points, torch.ones(n, dtype=torch.int64), many)
    assert torch.equal(together, alone.denoiser.network.labels == -1)
    assert torch.equal(there["caption"], ~together)
    assert torch.equal(there["coarse"], ~together)
    own = {name: ~there[name] & ~together for name in ("place", "tokens")}
    for rows in own.values():
        assert abs(rows.float().mean() - 0.75 * 0.2) < 4.5 * (0.15 * 0.85 / n) ** 0.5
    both = (own["place"] & own["tokens"]).float().mean()
    assert abs(both - 0.75 * 0.2**2) < 4.5 * (0.03 * 0.97 / n) ** 0.5
    step(points[:50], every_kind(n)[100:150], many[100:150])
    assert torch.equal(given("place"), there["place"][100:150])


def test_conditions_are_normalised_in_the_step_and_labels_alone_are_the_class_condition():
    raw = every_kind(B)
    step = module(conditions=EVERY_KIND)
    loss, _ = step(images(), raw, POSITIONS)
    seen = step.denoiser.network.seen
    assert all(value.dtype == torch.float32 for value in seen.values.values() if value.is_floating_point())
    torch.testing.assert_close(
        seen.values["place"], (raw.values["place"] - torch.tensor([10.0, 0.0])) / torch.tensor([2.0, 4.0])
    )
    torch.testing.assert_close(seen.values["coarse"], raw.values["coarse"] / 127.5 - 1)
    tokens = raw.values["tokens"].float()
    expected = (tokens.sign() * tokens.abs().log1p() - torch.tensor([1.0, 0.0])) / torch.tensor([1.0, 2.0])
    torch.testing.assert_close(seen.values["tokens"], expected)
    parts = [step(images()[i : i + 4], raw[i : i + 4], POSITIONS[i : i + 4])[0] for i in range(0, B, 4)]
    torch.testing.assert_close(torch.cat(parts), loss)
    classes = {"label": EVERY_KIND["label"]}
    by_tensor = module(conditions=classes)(images(), LABELS % 3, POSITIONS)
    by_name = module(conditions=classes)(images(), Condition({"label": LABELS % 3}), POSITIONS)
    assert torch.equal(by_tensor[0], by_name[0])
    assert module(conditions={})._given(LABELS, POSITIONS) is None


def test_the_target_is_normalised_by_channel():
    points = torch.randn(B, 2, 1, 1) * torch.tensor([3.0, 50.0])[:, None, None] + 280

    class Kept(Small):
        def forward(self, x: Tensor, c_noise: Tensor, condition: Condition | None = None) -> Tensor:
            return x * 0

    def step(**settings):
        return TrainingModule(
            Denoiser(Kept(), "denoised"), EDMObjective(), EDM(), seed=5, global_batch_size=B, **settings
        )

    normaliser = Normaliser("channel", (280.0, 280.0), (6.0, 100.0))
    loss, _ = step(normaliser=normaliser)(points, None, POSITIONS)
    by_hand, _ = step()((points - 280) / torch.tensor([6.0, 100.0])[:, None, None], None, POSITIONS)
    torch.testing.assert_close(loss, by_hand)


def test_a_grid_is_flipped_with_its_image():
    specs = {"coarse": EVERY_KIND["coarse"]}
    raw = Condition({"coarse": every_kind(B).values["coarse"]})
    flipped = Condition({"coarse": raw.values["coarse"].flip(-1)})
    always = module(augmentation=AugmentationConfig(horizontal_flip=1.0), conditions=specs)
    never = module(conditions=specs)
    a, b = always(images(), raw, POSITIONS), never(images().flip(-1), flipped, POSITIONS)
    assert torch.equal(a[0], b[0])
    assert torch.equal(always.denoiser.network.seen.values["coarse"], never.denoiser.network.seen.values["coarse"])


def test_half_the_pairs_are_flipped_and_each_stays_a_pair():
    """The network sees a grid that is the means of its own image, at noise that hides nothing."""

    class Keeping(Small):
        def forward(self, x: Tensor, c_noise: Tensor, condition: Condition | None = None) -> Tensor:
            self.x = x
            return super().forward(x, c_noise, condition)

    network, quiet = Keeping({"coarse": EVERY_KIND["coarse"]}), LogNormal(P_mean=-9.0, P_std=0.1)
    flips = AugmentationConfig(horizontal_flip=0.5)
    step = TrainingModule(
        Denoiser(network), EDMObjective(sigma_sampling=quiet), EDM(), seed=5, global_batch_size=B, augmentation=flips
    )
    means = torch.nn.functional.avg_pool2d(images().float(), 2)
    step(images(), Condition({"coarse": means}), POSITIONS)
    x0 = network.x / 2  # c_in is 1 / sigma_data
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(x0, 2), network.seen.values["coarse"], rtol=0, atol=2e-3)
    flipped = (x0 - to_unit_range(images().flip(-1))).abs().flatten(1).amax(1) < 2e-3
    assert 0 < int(flipped.sum()) < B


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("kind", ["edm", "sliced_vr"])
def test_bf16_weights_and_autocast_give_float32_losses_near_those_of_fp32(kind, parameterization):
    objective = OBJECTIVES[kind](sigma_sampling=LogNormal())
    exact, _ = module(objective, parameterization)(images(), LABELS, POSITIONS)
    half = module(objective, parameterization).bfloat16()
    loss, sigma = half(images(), LABELS, POSITIONS)
    loss.mean().backward()
    assert (loss.dtype, sigma.dtype) == (torch.float32, torch.float32)
    assert half.denoiser.network.first.weight.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = module(objective, parameterization)(images(), LABELS, POSITIONS)
    for other in (loss, cast):
        assert other.dtype == torch.float32
        assert ((other - exact).abs() / (exact.abs() + exact.abs().mean())).max() < 0.1


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_trains_on_every_process(process, weighting):
    step = module(DenoisingObjective(WEIGHTINGS[weighting]()), process=PROCESSES[process]())
    loss, sigma = step(images(), LABELS, POSITIONS)
    loss.mean().backward()
    assert loss.isfinite().all()
    assert (sigma > 0).all()
    assert all(p.grad.isfinite().all() for p in step.parameters())


def test_what_a_weighting_learns_is_an_ordinary_parameter_or_buffer():
    learned = module(EDMObjective(Learned()))
    assert {name.split(".")[0] for name, _ in learned.named_parameters()} == {"denoiser", "weighting"}
    adaptive = module(EDMObjective(Adaptive()))
    assert [name for name, _ in adaptive.named_buffers()] == ["weighting.ratio"]
    assert not list(module().named_buffers())


@pytest.mark.parametrize(
    ("objective", "conditions"),
    [
        (EDMObjective(), None),
        (EDMObjective(), EVERY_KIND),
        (EDMObjective(Learned()), None),
        (DenoisingObjective(LikelihoodWeighting(), label_dropout=0.3), EVERY_KIND),
    ],
    ids=["edm, classes", "edm, every kind", "learned, classes", "likelihood, every kind"],
)
def test_a_step_compiles_into_one_graph(objective, conditions):
    torch._dynamo.reset()
    given = every_kind(B) if conditions else LABELS
    parts = {"process": VP(), "conditions": conditions, "dropout": {"place": 0.5} if conditions else {}}
    eager = module(objective, **parts)(images(), given, POSITIONS)
    compiled = torch.compile(module(objective, **parts), backend="eager", fullgraph=True)
    for got, expected in zip(compiled(images(), given, POSITIONS), eager, strict=True):
        torch.testing.assert_close(got, expected)


def test_points_in_float64_train_too():
    step = module(SlicedVRObjective()).double()
    loss, _ = step(torch.randn(B, 1, 2, 1, dtype=torch.float64), None, POSITIONS)
    assert loss.isfinite().all()


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("kind", WITHOUT_SOLVER)
def test_a_step_never_waits_for_the_device(kind, process):
    """Tensors of the meta device have no values: whatever would read one, and so wait for a GPU, fails."""
    with torch.device("meta"):
        step = module(
            OBJECTIVES[kind](sigma_sampling=UniformT(stratified=True), label_dropout=0.1),
            "energy_dot" if issubclass(OBJECTIVES[kind], EnergyObjective) else "edm",
            PROCESSES[process](),
        )
        loss, sigma = step(
            torch.empty(B, 1, 4, 4, dtype=torch.uint8),
            torch.empty(B, dtype=torch.int64),
            torch.empty(B, dtype=torch.int64),
        )
        loss.mean().backward()
    assert loss.device.type == sigma.device.type == "meta"


@pytest.mark.parametrize("kind", WITHOUT_SOLVER)
def test_no_condition_waits_for_the_device(kind):
    with torch.device("meta"):
        objective = OBJECTIVES[kind](sigma_sampling=LogNormal(), label_dropout=0.1)
        step = module(
            objective,
            "energy_dot" if issubclass(OBJECTIVES[kind], EnergyObjective) else "edm",
            conditions=EVERY_KIND,
            dropout={"coarse": 0.5},
        )
        positions = torch.empty(B, dtype=torch.int64)
    loss, _ = step(torch.empty(B, 1, 4, 4, device="meta"), every_kind(B, "meta"), positions)
    assert loss.device.type == "meta"


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_weighting_waits_for_the_device(weighting):
    with torch.device("meta"):
        step = module(DenoisingObjective(WEIGHTINGS[weighting]()), process=VP())
        positions = torch.empty(B, dtype=torch.int64)
        loss, _ = step(torch.empty(B, 1, 4, 4), None, positions)
    assert loss.device.type == "meta"


@pytest.mark.parametrize("config", [RBMConfig(5), RBMConfig(5, "sample"), GaussianRBMConfig(5)])
def test_a_machine_s_step_is_a_function_of_position_in_any_micro_batch_and_near_itself_in_bf16(config):
    def machine(dtype=torch.float32):
        torch.manual_seed(0)
        built = config.build((1, 4, 4))
        built.weight.data *= 50  # as training leaves them
        return MachineModule(built, ContrastiveObjective(chain="gibbs"), seed=5, global_batch_size=B).to(dtype)

    loss, sigma = machine()(images(), LABELS, POSITIONS)
    assert (loss.dtype, sigma.tolist()) == (torch.float32, [0.0] * B)
    parts = [machine()(images()[i : i + 1], None, POSITIONS[i : i + 1])[0] for i in range(B)]
    torch.testing.assert_close(torch.cat(parts), loss, rtol=1e-4, atol=1e-4)
    assert not torch.equal(machine()(images(), LABELS, POSITIONS + B)[0], loss)
    half = machine(torch.bfloat16)
    rounded, _ = half(images(), LABELS, POSITIONS)
    rounded.mean().backward()
    assert rounded.dtype == torch.float32
    assert half.denoiser["network"].weight.grad.dtype == torch.bfloat16
    v = machine().denoiser["network"].visible(to_unit_range(images()), 5, POSITIONS)
    energies = [m.denoiser["network"].free_energy(v) for m in (machine(), half)]
    torch.testing.assert_close(energies[1], energies[0], rtol=0.02, atol=0.05)


def test_binary_units_are_the_data_s_by_threshold_or_by_their_own_probability():
    x = torch.tensor([-1.0, -0.2, 0.2, 1.0]).repeat(20_000, 1)
    positions = torch.arange(20_000)
    assert RBMConfig(2).build((4,)).visible(x, 0, positions)[0].tolist() == [0, 0, 1, 1]
    drawn = RBMConfig(2, "sample").build((4,)).visible(x, 0, positions)
    assert set(drawn.flatten().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), torch.tensor([0.0, 0.4, 0.6, 1.0]), atol=0.02, rtol=0)


def test_persistent_chains_continue_in_training_only_stay_at_their_noise_level_and_have_no_classes():
    objective = ContrastiveObjective(start="persistent", num_chains=2 * B)
    network = Small()
    step = TrainingModule(
        Denoiser(network, "energy_dot"), objective, EDM(), seed=5, global_batch_size=B, shape=(1, 4, 4)
    )
    sigmas = [step(images(), None, torch.arange(k * B, (k + 1) * B))[1] for k in range(4)]
    assert torch.equal(sigmas[0], sigmas[2])
    assert torch.equal(sigmas[1], sigmas[3])
    assert (sigmas[0] != sigmas[1]).all()
    pool = step.chains.pool.clone()
    assert (pool.flatten(1).abs().sum(1) > 0).all()
    step.eval()(images(), None, torch.arange(B))
    assert torch.equal(step.chains.pool, pool)
    network.num_classes = 3
    with pytest.raises(UserError, match=r"samples of all 3 classes.*set objective\.label_dropout=1"):
        TrainingModule(Denoiser(network, "energy_dot"), objective, EDM(), seed=5, global_batch_size=B, shape=(1, 4, 4))


def test_samples_that_a_machine_was_not_built_for_are_named():
    step = MachineModule(
        RBMConfig(2).build((1, 4, 4)), ContrastiveObjective(chain="gibbs"), seed=0, global_batch_size=B
    )
    with pytest.raises(UserError, match=r"v is torch.float32 \(12, 9\): this machine takes torch.float32 \[B, 16\]"):
        step(torch.zeros(B, 1, 3, 3), None, POSITIONS)
