"""The list of what the project must do: every row has its word or function and a test, and they exist."""

from __future__ import annotations

import importlib
import re
import typing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scoreray.sampling.samplers import SAMPLERS
from scoreray.trainer.denoiser import PARAMETERIZATIONS
from scoreray.trainer.network import NETWORKS
from scoreray.trainer.objective import OBJECTIVES, ContrastiveObjective
from scoreray.trainer.process import PROCESSES
from scoreray.trainer.sigma_sampling import SIGMA_SAMPLINGS
from scoreray.trainer.weighting import WEIGHTINGS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "mathematics.md").read_text().split("## What is where")[1]
ROWS = {cells[0]: cells[1:] for line in PAGE.splitlines() if len(cells := re.split(r" *\| *", line)[1:-1]) == 3}

# The members that are asked for, row by row, by the words that choose them.
ASKED = {
    "processes": (PROCESSES, "ve vp ddpm sub_vp flow_matching cosine edm"),
    "parameterizations": (
        PARAMETERIZATIONS,
        "score noise denoised velocity v edm energy_dot energy_residual energy_norm",
    ),
    "objectives": (OBJECTIVES, "denoising implicit sliced sliced_vr flow_matching ddpm edm contrastive"),
    "weightings": (
        WEIGHTINGS,
        "sigma2 constant likelihood edm velocity min_snr soft_min_snr adaptive learned",
    ),
    "sigma sampling": (SIGMA_SAMPLINGS, "ladder uniform_t log_normal log_uniform logit_normal"),
    "networks": (NETWORKS, "mlp unet dit ladder"),
    "samplers": (
        SAMPLERS,
        "langevin sgld ncsn ncsnv2 ddpm ddim reverse_sde predictor_corrector euler heun rk45 edm_sde dpm2 dpmpp_2m "
        "dpmpp_2m_sde dpmpp_3m_sde unipc",
    ),
}
SAMPLER_ROWS = ("Langevin", "ancestral, reverse SDE", "probability-flow ODE")


@pytest.mark.parametrize("group", ASKED)
def test_every_member_of_the_list_is_a_word_and_every_word_stands_on_the_page(group):
    words, asked = ASKED[group]
    assert sorted(words) == sorted(asked.split())
    rows = SAMPLER_ROWS if group == "samplers" else (group,)
    named = [word for row in rows for word in re.findall(r"`(\w+)`", ROWS[row][0])]
    assert set(words) <= set(named)


def test_contrastive_chains_begin_where_the_page_says():
    start = typing.get_type_hints(ContrastiveObjective)["start"]
    assert set(typing.get_args(start)) <= set(re.findall(r"`(\w+)`", ROWS["contrastive divergence"][0]))


@pytest.mark.parametrize("row", [row for row in ROWS if row not in ("row", "---")])
def test_every_test_and_function_of_the_page_exists(row):
    where, tests = ROWS[row]
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
    assert named, "a row without a test"
    for file, test in named:
        (path,) = ROOT.glob(f"tests/*/{file}")
        assert f"def {test}(" in path.read_text(), f"{file}::{test}"
    for module, name in re.findall(r"`(\w+)\.(\w+)`", where):
        if name in ("kind", "parameterization", "start"):
            continue  # a key of a config
        folder = "trainer" if (ROOT / "trainer" / f"{module}.py").exists() else "sampling"
        assert hasattr(importlib.import_module(f"scoreray.{folder}.{module}"), name), f"{module}.{name}"


def test_the_command_line_has_the_options_of_the_page():
    cli = importlib.import_module("scoreray.cluster.cli")
    shown = CliRunner().invoke(cli.app, ["sample", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    options = {option for where, _ in ROWS.values() for option in re.findall(r"`(--\w+)`", where)}
    assert options >= {"--sampler", "--guidance"}
    assert all(option in shown.output for option in options), shown.output
