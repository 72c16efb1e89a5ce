"""Configs: typed, every mistake at once and in one line each, overrides, equal after a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from scoreray.data.errors import DataError, UserError
from scoreray.data.reading.order import default_lanes
from scoreray.data.storage.store import open_store
from scoreray.data.yaml_text import parse_yaml
from scoreray.trainer.config import differing_keys, dump_config, leaves, left_out_by_kinds, load_config
from scoreray.trainer.diffusion.process import PROCESSES, VP
from scoreray.trainer.diffusion.sigma_sampling import SIGMA_SAMPLINGS, LadderUniform
from scoreray.trainer.diffusion.weighting import WEIGHTINGS, MinSNR
from scoreray.trainer.objectives.base import FewStepObjective
from scoreray.trainer.objectives.energy_based import EnergyObjective
from scoreray.trainer.objectives.objective import OBJECTIVES
from scoreray.trainer.run_folder import stored_config

MINIMAL: dict[str, Any] = {
    "run": {"name": "a", "storage": "s3://bucket/runs"},
    "data": {"url": "s3://bucket/data"},
    "duration": {"images": "200k"},
}


def test_defaults_round_trip() -> None:
    config = load_config(MINIMAL)
    assert config.duration.images == 200_000
    assert load_config(yaml.safe_load(dump_config(config))) == config
    assert load_config(config.model_dump(mode="json")) == config


def test_every_mistake_is_reported_at_once() -> None:
    wrong = {
        **MINIMAL,
        "optimizer": {"learning_rate": "fast"},
        "engine": {"zero_stage": 7},
        "netwrk": {},
        "process": {"kind": "vpp"},
        "duration": {"images": -1},
    }
    with pytest.raises(UserError) as caught:
        load_config(wrong)
    lines = str(caught.value).splitlines()
    assert lines[0] == "config: 5 mistakes"
    for key, hint in (
        ("optimizer.learning_rate", "'fast'"),
        ("engine.zero_stage", "0, 1, 2 or 3"),
        ("netwrk", "did you mean 'network'?"),
        ("process.kind", "did you mean 'vp'?"),
        ("duration.images", "-1"),
    ):
        assert any(line.strip().startswith(key) and hint in line for line in lines[1:]), (key, lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("process.sigma_mx=3", "did you mean 'sigma_max'"),
        ("optimizer.lr=1", "optimizer.lr: unknown key"),
        ("objective.weighting.kind=min_snrr", "did you mean 'min_snr'"),
        ("scaling.workers=[4,2]", "scaling.workers"),
        ("scaling.workers=0", "scaling.workers"),
        ("scaling.workers=3", "data.global_batch_size: 256 in 128 lanes can't be shared by 3 workers"),
        (
            "scaling.workers=[3,4]",
            "by 3 workers, of scaling.workers (3, 4); make data.global_batch_size a multiple of 12",
        ),
        ("scaling.workers=[4,6]", "can't be shared by 6 workers"),
        ("engine.micro_batch_size=100", "does not divide the 256 rows"),
        ("data.num_lanes=100", "does not divide data.global_batch_size"),
        ("run.name=../x", "run.name"),
        ("ema.stds=[]", "no length is tracked"),
        ("ema.stds=[0.1,0.1]", "names a length twice"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas"),
        ("duration.images=many", "duration.images"),
        ("network.num_blokcs=1", "network.num_blokcs: unknown key; did you mean 'num_blocks'"),
        ("network.kind=foo", "network.kind: unknown 'foo'"),
        ("network=5", "network"),
        ("data.conditions.caption.feild=text", "data.conditions.caption.feild: unknown key; did you mean 'field'?"),
        ("data.conditions.caption=null", "None is not accepted; it should be a section of keys, {} for all defaults"),
        ("scaling.cpus_per_worker=.inf", "scaling.cpus_per_worker"),
        ("duration.images=99999999999999", "duration.images"),
        ("objective.kind=contrastive", "choose energy_dot"),
        ("duration", "is not an override"),
        ("run.name.x=1", "not a section"),
        ("process.sigma_min=[", "not YAML"),
        ("run.name=%40", "needs quotes"),
        ("run.name=@1", "needs quotes"),
        ("run.name=*x", "has no anchor"),
        ("run.name=!!int 'abc'", "tags are not read"),
        ("run.seed=" + "9" * 5000, "too long for a number"),
        ("run.seed=1:30", "run.seed: '1:30' is not accepted"),
        ("run.name=1e3", "run.name: 1000.0 is not accepted; it should be a valid string; put it in quotes"),
        ("data.url=", "config: data.url: None is not accepted; it should be a URL"),
        ("data.url=[a.tar, 3]", "config: data.url: 3 is not accepted; it should be a URL"),
        ("run.name=#1", "a comment"),
        ("duration.images=" + "9" * 5000 + "k", "duration.images"),
        ("duration.images=1" + "0" * 29 + "G", "duration.images"),
        ("duration.images=1e30", "it should be a whole number that 64 bits hold"),
        ("scaling.workers=[1,1000000000]", "a number from 1 to 100,000"),
        ("run={name: a, name: b}", "stands here again"),
        ("objective=" + "[" * 3000, "nested too deeply"),
        ("a" + ".a" * 3000 + "=1", "is not an override"),
        ("optimizer.learning_rate=" + "x" * 100_000, "(100,002 characters) is not accepted"),
        ("optimizer." + "x" * 100_000 + "=1", "unknown key"),
        ("process.kind=" + "x" * 100_000, "unknown 'xxx"),
        ("run.name.x" + "x" * 100_000 + "=1", "not a section"),
        ("ema.stds=[" + "a, " * 5000 + "]", "and 4,900 more"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(MINIMAL, [override])
    assert message in str(caught.value)
    assert max(len(line) for line in str(caught.value).splitlines()) < 600


RBM = ["network.kind=rbm", "objective.kind=contrastive", "objective.chain=gibbs"]
ENERGY = ["denoiser.parameterization=energy_dot", "objective.kind=contrastive"]


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["engine.offload=optimizer", "engine.zero_stage=0"], ["engine.offload: optimizer needs engine.zero_stage 1"]),
        (["network.kind=rbm"], ["objective.kind: 'edm' can't train network.kind 'rbm'; choose objective.kind contr"]),
        (RBM[:2], ["objective.chain: network.kind 'rbm' moves by 'gibbs', not by 'langevin'"]),
        (
            [*RBM, "process.kind=vp", "denoiser.sigma_data=1", "engine.compile=true", "scaling.workers=3"],
            ["process: network.kind 'rbm' knows no noise level", "denoiser: ", "engine.compile: ", "can't be shared"],
        ),
        ([*RBM, "objective.step_size=0.2"], ["objective.step_size: chains of block Gibbs have none"]),
        ([*RBM, "objective.weighting.kind=edm"], ["objective.weighting: chains of block Gibbs have none"]),
        ([*RBM, "network.binarize=no"], ["network.binarize: 'no' is not accepted"]),
        ([*RBM, "network.num_hidden=0"], ["network.num_hidden is 0: give 1 or more"]),
        (["network.kind=gaussian_rbm", *RBM[1:], "network.std=0"], ["network.std is 0"]),
        (["objective.kind=contrastive", "objective.chain=gibbs"], ["'gibbs' moves the layers of an RBM"]),
        ([*ENERGY, "objective.restart=0.1"], ["objective.restart: 0.1 is for chains that persist"]),
        ([*ENERGY, "objective.start=persistent", "objective.num_chains=300"], ["is no multiple of data.global_batch"]),
        ([*ENERGY, "objective.start=persistnt"], ["objective.start: 'persistnt' is not accepted"]),
        ([*ENERGY, "objective.weighting.kind=adaptive"], ["no error that weighting 'adaptive' could learn from"]),
        ([*ENERGY, "engine.compile=true"], ["differentiates twice"]),
    ],
)
def test_sections_that_contradict_each_other_are_reported_a_line_each(
    overrides: list[str], messages: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(MINIMAL, overrides)
    lines = [line.strip() for line in str(caught.value).removeprefix("config: ").splitlines()]
    found = lines[1:] if lines[0].endswith("mistakes") else lines
    assert len(found) == len(messages)
    for line, message in zip(found, messages, strict=True):
        assert message in line


@pytest.mark.parametrize(
    "overrides",
    [
        RBM,
        [*RBM, "objective.start=persistent", "objective.num_chains=512", "network.binarize=sample"],
        ["network.kind=gaussian_rbm", *RBM[1:], "objective.num_steps=5"],
        [*ENERGY, "objective.start=persistent", "objective.restart=0.05", "objective.noise_scale=0.5"],
    ],
)
def test_machines_and_persistent_chains_are_chosen_by_words_and_come_back_from_yaml(overrides: list[str]) -> None:
    config = load_config(MINIMAL, overrides)
    assert load_config(yaml.safe_load(dump_config(config))) == config


def test_numbers_are_numbers_and_words_are_words_in_files_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(MINIMAL) + "optimizer: {learning_rate: 1e-3, eps: 1E-9}\nscaling: {use_gpu: no}\n")
    config = load_config(file, ["run.seed=010", "data.prefetch_batches=0o10", "run.name='1e3'", "log.tensorboard=off"])
    assert (config.optimizer.learning_rate, config.optimizer.eps, config.scaling.use_gpu) == (1e-3, 1e-9, False)
    assert (config.run.seed, config.data.prefetch_batches, config.run.name) == (10, 8, "1e3")
    assert not config.log.tensorboard
    assert load_config(yaml.safe_load(dump_config(config))) == config
    assert load_config(parse_yaml(dump_config(config), "")) == config


@pytest.mark.parametrize("name", ["a", "1e3", "089", "1E5", "0o10", "2024", "yes", "1.5e-3"])
def test_a_config_that_an_earlier_version_stored_is_read_equal(tmp_path: Path, name: str) -> None:
    """It wrote YAML 1.1, where 1e3 and 089 are strings that need no quotes."""
    config = load_config({**MINIMAL, "run": {"name": name, "storage": "1e9"}, "optimizer": {"eps": 1e-12}})
    store = open_store(str(tmp_path))
    store.put("config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
    assert stored_config(store) == config
    store.put("config.yaml", dump_config(config).encode())
    assert stored_config(store) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {}\nrun: {}", "line 2, column 1: key 'run' stands here again"),
        ("[" * 2000, "nested too deeply"),
        ("a: " + "9" * 5000, "too long for a number"),
        ("x", "a mapping of sections, this is a str"),
        ("a: 2024-13-45", "mistakes"),
        ("a: &a {b: *a}", "within itself"),
        ("run: {name: \x00}", r"U\+0000"),
    ],
)
def test_a_stored_config_that_was_damaged_is_one_line_about_its_file(tmp_path: Path, text: str, message: str) -> None:
    store = open_store(str(tmp_path))
    store.put("config.yaml", text.encode())
    with pytest.raises(DataError, match=f"config.yaml: not the config of a run: .*{message}"):
        stored_config(store)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(
    [
        "1e3",
        "089",
        "0o10",
        "yes",
        "null",
        "~",
        "2024-01-01",
        "1:30",
        ".inf",
        "1_000",
        "a: b",
        "#",
        "- x",
        "*a",
        "'",
        "\n",
    ]
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    texts,
    texts,
    st.floats(1e-12, 1e12),
    st.floats(1e-300, 1e-1, exclude_min=True),
    st.integers(0, 2**63 - 1),
    st.booleans(),
)
def test_any_config_that_is_dumped_is_read_back_equal(
    url: str, sampler: str, cpus: float, eps: float, seed: int, flag: bool
) -> None:
    changes = {
        "run": {"name": "1e3", "storage": url, "seed": seed}, "data": {"url": sampler}, "optimizer": {"eps": eps},
        "log": {"tensorboard": flag}, "evaluation": {"sampler": sampler, "reference": url},
        "scaling": {"cpus_per_worker": min(cpus, 1024)},
    }  # fmt: skip
    config = load_config({**MINIMAL, **changes})
    text = dump_config(config)
    assert load_config(parse_yaml(text, "")) == config
    assert load_config(yaml.safe_load(text)) == config  # as an earlier version reads it


def test_the_largest_batch_is_checked_in_no_time() -> None:
    """Lanes were once searched among all numbers up to the batch size."""
    assert load_config(MINIMAL, ["data.global_batch_size=999999999989"]).world_sizes == (1,)  # a prime
    assert default_lanes(2**39) == 128
    for batch in range(1, 200):
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        assert default_lanes(batch) == max(divisors, key=lambda n: (n <= 128, sum(n % d == 0 for d in divisors), n))


def test_of_two_overrides_of_one_key_the_last_holds() -> None:
    assert load_config(MINIMAL, ["run.seed=1", "run.seed=2"]).run.seed == 2
    assert load_config(MINIMAL, ["run.seed=2", "run.seed=1"]).run.seed == 1


def test_a_section_that_stands_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optimizer: {learning_rate: 3e-4}\n" + yaml.safe_dump(MINIMAL) + "optimizer: {warmup_images: 5}\n")
    with pytest.raises(UserError, match=r"c.yaml: line \d+, column 1: key 'optimizer' stands here again, after line 1"):
        load_config(file)


def test_a_new_kind_says_which_keys_of_the_file_go_with_it() -> None:
    file = {
        **MINIMAL,
        "optimizer": {"kind": "adamw", "weight_decay": 0.1, "learning_rate": 1e-3},
        "process": {"kind": "vp"},
    }
    said = left_out_by_kinds(file, ["optimizer.kind=muon", "optimizer.learning_rate=4e-3", "process.kind=ve"])
    assert said == ["optimizer.kind=muon: this kind's own defaults, without the file's weight_decay"]
    assert left_out_by_kinds(file, ["optimizer.kind=adamw", "optimizer.weight_decay=0", "run.seed=1"]) == []


def test_an_outer_kind_does_not_undo_an_inner_one_whatever_their_order() -> None:
    words = ["objective.weighting.kind=min_snr", "objective.kind=denoising"]
    for order in (words, words[::-1]):
        config = load_config({**MINIMAL, "objective": {"kind": "edm"}}, order)
        assert config.objective.weighting == MinSNR()


def test_overrides_reach_any_key_and_kind() -> None:
    config = load_config(MINIMAL, ["process.beta_max=10", "process.kind=vp", "optimizer.learning_rate=1e-3"])
    assert config.process == VP(beta_max=10.0)
    assert config.optimizer.learning_rate == 1e-3
    nested = load_config(MINIMAL, ["objective.sigma_sampling.P_mean=-0.5"])
    assert nested.objective.sigma_sampling.P_mean == -0.5  # type: ignore[union-attr]
    ddpm = load_config(MINIMAL, ["objective.kind=ddpm", "objective.sigma_sampling.num_levels=500"]).objective
    assert ddpm.sigma_sampling == LadderUniform(500)  # the kind that is this objective's default


KINDS = (
    *(f"process.kind={kind}" for kind in PROCESSES),
    *(f"objective.sigma_sampling.kind={kind}" for kind in SIGMA_SAMPLINGS),
    *(f"objective.weighting.kind={kind}" for kind in WEIGHTINGS),
    *(
        f"objective={{kind: {kind}, teacher: {{checkpoint: t}}}}"
        if issubclass(one, FewStepObjective)
        else f"objective.kind={kind}"
        for kind, one in OBJECTIVES.items()
        if not issubclass(one, EnergyObjective)
    ),
    "network.kind=dit",
    "network.kind=mlp",
)


def test_no_number_of_a_config_may_be_beyond_what_float32_holds() -> None:
    """Each number of each kind once: those of other sections are the same whatever the kind."""
    numbers = {
        (kind, key)
        for kind in ("run.seed=0", *KINDS)
        for key, value in leaves(load_config(MINIMAL, [kind]).model_dump())
        if isinstance(value, int | float) and not isinstance(value, bool)
        if kind == "run.seed=0" or key.startswith(kind.partition("=")[0].removesuffix("kind"))
    }
    assert len(numbers) > 120
    for kind, key in numbers:
        for value in ("1e300", "-1e300"):
            with pytest.raises(UserError, match=key.rpartition(".")[2]):
                load_config(MINIMAL, [kind, f"{key}={value}"])


def test_a_new_kind_drops_the_old_kinds_keys(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, "process": {"kind": "ve", "sigma_max": 90}}))
    assert load_config(file, ["process.kind=vp"]).process == VP()


def test_a_file_that_grows_or_holds_itself_is_refused(tmp_path: Path) -> None:
    bomb = "a: &a {x: 1}\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} {{{', '.join(f'k{k}: *{chr(97 + i)}' for k in range(9))}}}\n" for i in range(11)
    )
    file = tmp_path / "c.yaml"
    for text, message in (
        (bomb, "more than"),
        ("run: &r {storage: *r}", "within itself"),
        ("[" * 20000, "nested|not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "mapping"),
        ("a: [", "not YAML"),
        ("\xff", "can't be read"),
        ("", "this is empty"),
        ("a: 2024-13-45", "a: unknown key"),
        ("1: x", "put it in quotes"),
        ("a: !!int abc", "tags are not read"),
        ("a: " + "9" * 5000, "too long for a number"),
        ("a: \x00", "U\\+0000"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=f"{message}|can't be read"):
        load_config(file)
    with pytest.raises(UserError, match="no such config"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        (["scaling.workers=4"], (4,)),
        (["scaling.workers=[2,4]"], (2, 4)),
        (["scaling.workers=[1,8]"], (1, 2, 4, 8)),
        (["scaling.workers=[16,32]"], (16, 32)),
        (["scaling.workers=[2,8]", "data.num_lanes=8", "engine.micro_batch_size=16"], (2, 4, 8)),
        (["scaling.workers=[4,16]", "engine.zero_stage=3", "engine.partition_group=2"], (4, 8, 16)),
        (["data.global_batch_size=192", "data.num_lanes=24", "scaling.workers=[2,8]"], (2, 3, 4, 6, 8)),
    ],
)
def test_an_elastic_run_takes_the_sizes_that_divide_the_batch(overrides: list[str], sizes: tuple[int, ...]) -> None:
    config = load_config(MINIMAL, overrides)
    assert config.world_sizes == sizes
    assert all(config.data.global_batch_size % size == 0 for size in sizes)


def test_differing_keys_leave_out_what_may_change() -> None:
    old = load_config(MINIMAL)
    assert (
        differing_keys(old, load_config(MINIMAL, ["scaling.workers=4", "engine.zero_stage=3", "duration.images=1M"]))
        == []
    )
    assert differing_keys(old, load_config(MINIMAL, ["run.seed=1"])) == ["run.seed: 0 in the run, 1 in this config"]
    unconditional = load_config(MINIMAL, ["data.conditions={}"])
    assert differing_keys(old, unconditional) == ["data.conditions: None in the run, {} in this config"]
    cosine = load_config(MINIMAL, ["optimizer.schedule=cosine"])
    longer = load_config(MINIMAL, ["optimizer.schedule=cosine", "duration.images=1M"])
    assert differing_keys(cosine, longer) == ["duration.images: 200000 in the run, 1000000 in this config"]


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize(
    "key", [key for key, value in leaves(load_config(MINIMAL).model_dump()) if type(value) is float]
)
def test_no_number_of_a_config_may_be_infinite_or_none_at_all(key: str, value: str) -> None:
    with pytest.raises(UserError, match=key.rpartition(".")[2]) as caught:
        load_config(MINIMAL, [f"{key}={value}"])
    assert "\n" not in str(caught.value)


def test_a_new_kind_clears_a_section_that_leaves_the_default_kind_out() -> None:
    file = {
        **MINIMAL,
        "optimizer": {"weight_decay": 0.1},
        "objective": {"weighting": {"kind": "min_snr", "gamma": 3.0}},
    }
    words = ["optimizer.kind=muon", "objective.weighting.kind=uniform", "objective.kind=edm"]
    said = left_out_by_kinds(file, words[:2])
    assert [line.rpartition(" ")[2] for line in said] == ["weight_decay", "gamma"]
    assert load_config(file, words[:1]).optimizer == load_config(MINIMAL, words[:1]).optimizer
    once = left_out_by_kinds(
        {**MINIMAL, "objective": {**file["objective"], "kind": "edm"}}, [*words[:2], "objective.kind=denoising"]
    )
    assert "".join(once).count("gamma") == 1
