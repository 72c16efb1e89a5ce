"""One catalogue: the code, the page, the dashboards and the alerts tell the same, and Prometheus sees all of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from scoreray.cluster.alerts import ALERTS
from scoreray.cluster.catalogue import catalogue
from scoreray.sampling.serve_metrics import REPLICA_METRICS, SERVICE_METRICS
from scoreray.trainer.metrics import CATALOGUE

ROOT = Path(__file__).parents[2]
PLATFORM = ROOT / "k8s" / "base" / "platform"


def test_the_catalogue_has_every_metric_of_the_code_once() -> None:
    metrics = [metric for shown in catalogue().values() for metric in shown]
    names = [metric.name for metric in metrics]
    assert len(names) == len(set(names))
    ours = len(CATALOGUE) + len(REPLICA_METRICS) + len(SERVICE_METRICS)
    assert sum("scoreray_" in name for name in names) == ours
    assert all(metric.unit and metric.meaning for metric in metrics)


def test_page_dashboards_and_rules_are_made_of_the_code() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from update_metrics import files
    finally:
        sys.path.pop(0)
    for name, text in files().items():
        assert (ROOT / name).read_text() == text, f"{name} is old: python docs/update_metrics.py"


def expressions(of: Any) -> list[str]:
    if isinstance(of, dict):
        return [v for k, v in of.items() if k == "expr"] + [e for v in of.values() for e in expressions(v)]
    return [e for one in of for e in expressions(one)] if isinstance(of, list) else []


def test_every_metric_is_on_the_dashboard_that_its_entry_names() -> None:
    for name in catalogue():
        board = json.loads((PLATFORM / "dashboards" / f"{name}.json").read_text())
        shown = " ".join(expressions(board["panels"]))
        for dashboard, metrics in catalogue().items():
            for metric in metrics:
                assert (re.search(rf"\b{metric.name}(_bucket)?\b", shown) is not None) == (dashboard == name)
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]}
        assert len(places) == len(board["panels"]), "panels lie on each other"


def test_alerts_ask_for_metrics_that_exist() -> None:
    known = {metric.name for shown in catalogue().values() for metric in shown} | {
        "ray_serve_deployment_replica_healthy"
    }
    for alert in ALERTS:
        assert set(re.findall(r"\b(?:ray_)?(?:scoreray|serve)_\w+", alert.when)) <= known, alert.name


FIRES: dict[str, tuple[list[tuple[str, str]], str, dict[str, str]]] = {
    # alert -> series by minute, when it is asked, its labels
    "ScorerayNoCommit": ([('ray_scoreray_last_commit_age_s{run="a"}', "3700+60x10")], "6m", {"run": "a"}),
    "ScorerayDataStalled": ([('ray_scoreray_data_stall{run="a"}', "0.7x20")], "11m", {"run": "a"}),
    "ScorerayLossNotFinite": ([('ray_scoreray_skipped_steps{run="a"}', "0x5 3x20")], "8m", {"run": "a"}),
    "ScorerayRestarts": ([('ray_scoreray_restarts{run="a"}', "0x20 4x60")], "61m", {"run": "a"}),
    "ScorerayShedding": (
        [
            ('scoreray_sheds_total{code="overloaded"}', "0+60x30"),
            ('scoreray_requests_total{code="ok"}', "0+60x30"),
            ('scoreray_requests_total{code="overloaded"}', "0+60x30"),
        ],
        "15m",
        {},
    ),
    "ScorerayReplicaDown": (
        [
            ('ray_serve_deployment_replica_healthy{deployment="model",replica="x"}', "1x30"),
            ('ray_serve_deployment_replica_healthy{deployment="model",replica="y"}', "1x5 0x30"),
        ],
        "8m",
        {"deployment": "model"},
    ),
}
QUIET = [
    ('ray_scoreray_last_commit_age_s{run="a"}', "0+60x50"),
    ('ray_scoreray_data_stall{run="a"}', "0.1x90"),
    ('ray_scoreray_skipped_steps{run="a"}', "2x90"),
    ('ray_scoreray_loss{run="a"}', "0.2x90"),
    ('ray_scoreray_restarts{run="a"}', "0x20 1x70"),
    ('scoreray_sheds_total{code="overloaded"}', "0+1x90"),
    ('scoreray_requests_total{code="ok"}', "0+100x90"),
    ('ray_serve_deployment_replica_healthy{deployment="model",replica="x"}', "1x90"),
]


def promtool(folder: Path, tests: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    shutil.copy(PLATFORM / "rules.yaml", folder / "rules.yaml")
    file = folder / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}))
    return subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=60)


def series(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"series": name, "values": values} for name, values in pairs]


def firing(name: str, when: str, labels: dict[str, str]) -> dict[str, Any]:
    chosen = "".join(f',{key}="{value}"' for key, value in labels.items())
    query = f'count(ALERTS{{alertname="{name}",alertstate="firing"{chosen}}})'
    return {"expr": query, "eval_time": when, "exp_samples": [{"labels": "{}", "value": 1}]}


@pytest.mark.parametrize("name", [alert.name for alert in ALERTS])
def test_each_alert_fires(tmp_path: Path, name: str) -> None:
    pairs, when, labels = FIRES[name]
    test = {"interval": "1m", "input_series": series(pairs), "promql_expr_test": [firing(name, when, labels)]}
    done = promtool(tmp_path, [test])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("value", ["Inf", "-Inf"])
def test_a_loss_that_is_infinite_fires_at_once(tmp_path: Path, value: str) -> None:
    inputs = series([('ray_scoreray_loss{run="a"}', f"0.2x3 {value} {value} {value} {value}")])
    test = {
        "interval": "1m",
        "input_series": inputs,
        "promql_expr_test": [firing("ScorerayLossNotFinite", "6m", {"run": "a"})],
    }
    done = promtool(tmp_path, [test])
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_alert_fires_while_all_is_well(tmp_path: Path) -> None:
    checks = [{"eval_time": f"{m}m", "alertname": alert.name, "exp_alerts": []} for alert in ALERTS for m in (30, 50)]
    done = promtool(tmp_path, [{"interval": "1m", "input_series": series(QUIET), "alert_rule_test": checks}])
    assert done.returncode == 0, done.stdout + done.stderr
