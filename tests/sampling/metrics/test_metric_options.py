"""Options of metrics: where they are declared, what is refused, what the record has of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor

from scoreray.cluster.cli.models import EvaluateOptions
from scoreray.data.errors import UserError
from scoreray.data.yaml_text import parse_metric_options
from scoreray.sampling.evaluation.compare import differences
from scoreray.sampling.measures.distances import precision_recall
from scoreray.sampling.metrics import registry
from scoreray.sampling.metrics.record import EvaluationRecord
from scoreray.sampling.metrics.registry import METRICS, all_options, checked_options, metric_of
from scoreray.sampling.metrics.sample_metrics import precision_recall as pr
from scoreray.sampling.samplers.options import Range, options_of

DOCS = Path(__file__).parents[3] / "docs" / "evaluation.md"


def test_options_are_the_keyword_only_parameters_and_all_are_in_the_docs() -> None:
    page, found = DOCS.read_text(), {name: options_of(metric.compute) for name, metric in METRICS.items()}
    assert found["pr"]["k"].default == 3
    for name, options in found.items():
        for key, option in options.items():
            assert not option.is_unbounded, f"{name}.{key}"
            about = [row for row in page.splitlines() if row.startswith("| `") and f"`{name}" in row]
            assert any(f"`{word}`" in row for row in about for word in (f"{name}.{key}", f".{key}", key)), (name, key)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pr": {"kk": 2}}, "metric 'pr' has no option 'kk': did you mean 'k'"),
        ({"pr": {"k": 0}}, r"k = 0: must be an integer in \[1, 1000\]"),
        ({"pr": {"k": "many"}}, "k = 'many': must be an integer"),
        ({"fid": {"k": 2}}, "metric 'fid' has no option 'k': it takes none"),
        ({"prr": {"k": 2}}, "unknown metric 'prr'; did you mean 'pr'"),
        ({"nn": {"threshold": 0.5}}, "options of metric 'nn', which is not measured; measured: pr, fid"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_nearest(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        checked_options(given, ("pr", "fid"))
    assert "\n" not in str(error.value)


def test_defaults_are_left_out_so_that_a_record_is_the_one_without_options() -> None:
    assert checked_options({"pr": {"k": 3.0}, "nn": {"threshold": 0.25}}, ("pr", "nn")) == {"nn": {"threshold": 0.25}}
    assert all_options("pr", {}) == {"k": 3}
    assert all_options("pr", {"pr": {"k": 7}}) == {"k": 7}


def test_words_of_a_command_line_are_split_at_the_last_dot() -> None:
    words = ["kde.kernel=tophat", "kde.bandwidth=1e-1", "pkg.mod:Fn.key=[1, 2]"]
    assert parse_metric_options(words) == {"kde": {"kernel": "tophat", "bandwidth": 0.1}, "pkg.mod:Fn": {"key": [1, 2]}}
    for word in ("kernel=tophat", "kde.kernel", ".k=1", "kde.=1"):
        with pytest.raises(UserError, match=r"--metric-option .*: write METRIC.NAME=VALUE"):
            parse_metric_options([word])


def test_the_option_reaches_the_function() -> None:
    a, b = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 80).view(40, 2)
    stored: Any = SimpleNamespace(both=lambda name: (a, b))
    assert pr(stored, k=9).estimate == precision_recall(a, b, 9)[0] != pr(stored).estimate


def measured(rows: Tensor, reference: Tensor, *, power: Annotated[float, Range(1, 4)] = 2.0) -> dict[str, float]:
    return {"moment": float(rows.abs().pow(power).mean())}


def test_a_metric_of_somebody_elses_declares_options_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "instance", lambda name, what: measured)
    given = {"pkg.mod:measured": {"power": 3}}
    assert checked_options(given, tuple(given)) == given
    with pytest.raises(UserError, match=r"metric 'pkg\.mod:measured' has no option 'pwoer': did you mean 'power'"):
        checked_options({"pkg.mod:measured": {"pwoer": 3}}, ("pkg.mod:measured",))


def test_records_of_other_options_are_not_compared_and_those_of_before_are() -> None:
    """A record from before there were options has none of them, as one of today where all are defaults."""
    subject = {"checkpoint": {"url": "u", "sha256": "", "images_seen": 1, "ema": "none"},
               "sampling": {"sampler": "heun", "steps": 4, "grid": None, "sigma_range": [0.1, 1.0], "seed": 0,
                            "guidance": 1.0, "options": {}}}  # fmt: skip
    old = EvaluationRecord.model_validate(
        {"subject": subject, "protocol": {"version": 1, "pr": {"k": 3, "rows": 100}}, "versions": {},
         "numerics": {"device": "cpu", "threads": 1, "batch_size": 8}, "warnings": [],
         "metrics": {"pr": {"value": 0.5, "std_error": 0.1}, "fid": {"value": 0.5, "std_error": 0.1}}}
    )  # fmt: skip
    new = old.model_copy(update={"protocol": old.protocol | {"pr": {"k": 5, "rows": 100}}})
    assert differences("pr", old, old) == []
    assert differences("pr", old, new) == ["pr.k: 3 in the first, 5 in the second"]
    other = old.model_copy(update={"protocol": old.protocol | {"fid": {"fraction": 0.5}}})
    assert differences("fid", old, other)  # also of a metric that had no settings of its own before
    assert metric_of("fid").parts("fid")[-1] == "fid"


def test_the_command_line_takes_them_again_and_again() -> None:
    options = EvaluateOptions(reference="y", metric_option=["pr.k=5", "nn.threshold=0.25", "pr.k=7"])
    assert options.settings("x", 1).metric_options == {"pr": {"k": 7}, "nn": {"threshold": 0.25}}
    with pytest.raises(UserError, match=r"--metric-option pr: write METRIC\.NAME=VALUE"):
        EvaluateOptions(reference="y", metric_option=["pr=1"]).settings("x", 1)
