"""The list of what the project must do: every row has its word or function and a test, and they exist."""

from __future__ import annotations

import importlib
import re
import typing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scoreray.data.errors import UserError
from scoreray.sampling.guidance.operators import OPERATORS
from scoreray.sampling.metrics.registry import METRICS
from scoreray.sampling.model.describe import PROCESS_GRID
from scoreray.sampling.samplers.gibbs import GIBBS
from scoreray.sampling.samplers.sample import SAMPLERS
from scoreray.sampling.samplers.sigmas import GRIDS
from scoreray.trainer.config import load_config
from scoreray.trainer.diffusion.denoiser import PARAMETERIZATIONS
from scoreray.trainer.diffusion.process import PROCESSES
from scoreray.trainer.diffusion.sigma_sampling import SIGMA_SAMPLINGS
from scoreray.trainer.diffusion.weighting import WEIGHTINGS
from scoreray.trainer.networks.network import NETWORKS
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective
from scoreray.trainer.objectives.energy_based import ContrastiveObjective
from scoreray.trainer.objectives.objective import OBJECTIVES

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "mathematics.md").read_text()
NETWORKS_TEXT = (ROOT / "docs" / "networks.md").read_text()
PAGE = TEXT.split("## What is where")[1]
DRAWING = TEXT.split("## Drawing")[1].split("## Randomness")[0]
MINIMAL = {
    "run": {"name": "a", "storage": "nowhere"},
    "data": {"url": "nowhere"},
    "duration": {"images": 1},
    "denoiser": {"parameterization": "energy_dot"},
}
ROWS = {cells[0]: cells[1:] for line in PAGE.splitlines() if len(cells := re.split(r" *\| *", line)[1:-1]) == 4}

# The members that must exist, row by row, by the words that choose them; more may.
REQUIRED = {
    "processes": (PROCESSES, "ve vp ddpm sub_vp flow_matching cosine edm"),
    "parameterizations": (
        PARAMETERIZATIONS,
        "score noise denoised velocity v edm energy_dot energy_residual energy_norm",
    ),
    "objectives": (
        OBJECTIVES,
        "denoising implicit sliced sliced_vr flow_matching ddpm edm maximum_likelihood contrastive noise_contrastive "
        "recovery_likelihood consistency progressive continuous_consistency mean_flow",
    ),
    "weightings": (
        WEIGHTINGS,
        "sigma2 constant likelihood edm velocity min_snr soft_min_snr adaptive learned",
    ),
    "sigma sampling": (SIGMA_SAMPLINGS, "ladder uniform_t log_normal log_uniform logit_normal likelihood"),
    "networks": (NETWORKS, "mlp unet dit ladder rbm gaussian_rbm"),
    "noise grids": ((*GRIDS, PROCESS_GRID), "karras geometric linear interior process"),
    "inpainting, inverse problems": (set(OPERATORS) - {"inpaint"}, "superresolution gray matrix"),
    "samplers": (
        (*SAMPLERS, GIBBS),
        "gibbs langevin sgld ncsn ncsnv2 baoab cld mala hmc ddpm ddim reverse_sde predictor_corrector euler heun rk45 "
        "edm_sde dpm2 dpmpp_2m dpmpp_2m_sde dpmpp_3m_sde unipc consistency flow_map",
    ),
}
SAMPLER_ROWS = (
    "Langevin, Gibbs", "velocities, acceptance", "ancestral, reverse SDE", "probability-flow ODE", "few steps"
)  # fmt: skip


@pytest.mark.parametrize("group", REQUIRED)
def test_every_member_of_the_list_is_a_word_and_every_word_is_in_a_table(group):
    """In its row's cell, or in the first cells of the table under the row's key (networks: on their page)."""
    words, required = REQUIRED[group]
    assert set(required.split()) <= set(words)
    rows = SAMPLER_ROWS if group == "samplers" else (group,)
    cells = [ROWS[row][0] for row in rows]
    for paragraph in (TEXT + NETWORKS_TEXT).split("\n\n"):
        if any(paragraph.startswith(f"| {key} |") for key in re.findall(r"`\w+\.\w+`", cells[0])):
            cells += re.findall(r"^\| (.*?) \|", paragraph, re.M)
    assert set(words) <= {word for cell in cells for word in re.findall(r"`(\w+)`", cell)}


def test_contrastive_chains_begin_and_move_as_the_page_says():
    hints, named = (
        typing.get_type_hints(ContrastiveObjective),
        re.findall(r"`(\w+)`", ROWS["contrastive divergence"][0]),
    )
    assert set(typing.get_args(hints["start"]) + typing.get_args(hints["chain"])) == set(named)


# Groups of the list, by the rows of the page that they are.
GROUPS = {
    "processes": ["processes"],
    "ladders": ["ladders"],
    "parameterizations": ["parameterizations"],
    "objectives": [
        "objectives",
        "contrastive divergence",
        "noise-contrastive estimation, recovery likelihood",
        "flows",
        "maximum likelihood",
        "maps of few steps",
    ],
    "weightings": ["weightings"],
    "sigma sampling": ["sigma sampling"],
    "networks": ["networks", "RBMs"],
    "samplers": [*SAMPLER_ROWS, "noise grids"],
    "guidance": ["guidance", "inpainting, inverse problems"],
    "likelihood": ["likelihood"],
}
WITHOUT_WORDS = ("likelihood", "bad input", "devices")  # functions, and what holds for all


@pytest.mark.parametrize("row", [row for group in GROUPS.values() for row in group])
def test_every_row_is_chosen_by_a_word(row):
    """A key of a config with its words, or an option of the command; both exist (see below)."""
    keys = re.findall(r"`(?:(\w+)\.(\w+)|(--[\w-]+))`", ROWS[row][0])
    assert bool(keys) != (row in WITHOUT_WORDS)
    for section, key, option in keys:
        assert option or _is_a_key(section, key), f"{section}.{key}"


def _is_a_key(section: str, key: str) -> bool:
    """Whether a config accepts `section.key`, where a section may also be nested in the objective."""
    kinds = {"start": "contrastive", "chain": "contrastive", "teacher": "consistency"}
    words = [f"objective.kind={kinds[key]}"] if key in kinds else []
    prefix = "objective." if section in ("weighting", "sigma_sampling") else ""
    try:
        load_config(MINIMAL, [*words, f"{prefix}{section}.{key}=?"])
    except UserError as error:
        return "unknown key" not in str(error) and f"{section}.{key}" in str(error)
    return True


METHODS = [line.split(" | ")[0][2:] for line in PAGE.split("| method |")[1].splitlines()[2:] if line.startswith("| ")]
WORDS = {
    "process.kind": PROCESSES,
    "denoiser.parameterization": PARAMETERIZATIONS,
    "objective.kind": {*OBJECTIVES, AutoencodingObjective.kind},
    "objective.start": {"persistent"},
    "objective.coupling": {"optimal_transport"},
    "objective.source": {"data"},
    "weighting.kind": WEIGHTINGS,
    "sigma_sampling.kind": SIGMA_SAMPLINGS,
    "network.kind": NETWORKS,
    "network.stds": {"each"},
    "optimizer.kind": {"adamw", "sgld"},
    "--sampler": {*SAMPLERS, GIBBS},
    "--metrics": METRICS,
}
"""Key -> the words that it takes; of those that have no list, the one that a row of the page is about."""


def test_the_methods_of_the_literature_are_all_there():
    assert len(METHODS) == len(set(METHODS)) >= 52
    named = {word for row in METHODS for word in re.findall(r"`(\w+)`", ROWS[row][0])}
    assert set(SAMPLERS) | set(OBJECTIVES) <= named


@pytest.mark.parametrize("row", METHODS)
def test_every_method_is_chosen_by_a_word_that_exists(row):
    parts = ROWS[row][0].split("; ")
    for part in parts:
        key, *words = re.findall(r"`([^`]+)`", part)
        assert set(words) <= set(WORDS[key]) if words else key.startswith(("--", "scoreray ")), part


@pytest.mark.parametrize("row", [row for row in ROWS if row not in ("row", "method", "---")])
def test_every_row_has_a_test_and_every_function_of_the_page_exists(row):
    _, where, tests = ROWS[row]
    assert re.findall(r"`test_\w+\.py::test_\w+`", tests), (
        "a row without a test"
    )  # which exist: tests/docs/test_names.py
    functions = re.findall(r"`(\w+)\.(\w+)`", where)
    assert functions, "a row without a function"
    for module, name in functions:
        files = [file for folder in ("data", "trainer", "sampling") for file in (ROOT / folder).rglob(f"{module}.py")]
        modules = [".".join(["scoreray", *file.relative_to(ROOT).with_suffix("").parts]) for file in files]
        assert any(hasattr(importlib.import_module(one), name) for one in modules), f"{module}.{name}"


def test_the_command_line_has_the_options_of_the_page():
    cli = importlib.import_module("scoreray.cluster.cli.main")
    plain = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    shown = "".join(CliRunner().invoke(cli.app, [verb, "--help"], env=plain).output for verb in ("sample", "evaluate"))
    options = set(re.findall(r"`(--[\w-]+)", PAGE + DRAWING))
    assert options >= {"--sampler", "--guidance", "--autoguide", "--inpaint", "--inverse", "--grid"}
    known = set(re.findall(r"--[\w-]+", shown))
    assert options <= known, options - known
