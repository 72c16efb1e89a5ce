"""One catalogue: the code, the page, the dashboards and the alerts agree, and Prometheus sees all of it."""

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
from alerts import ALERTS
from catalogue import catalogue
from waiting import PATIENCE_S

from scoreray.sampling.service.metrics import REPLICA_METRICS, SERVICE_METRICS
from scoreray.trainer.monitoring.metrics import CATALOGUE

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
        assert (ROOT / name).read_text() == text, f"{name} is old: python docs/tools/update_metrics.py"


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
        "ray_serve_deployment_replica_healthy",
        "ray_serve_deployment_status",
        "ray_serve_autoscaling_target_replicas",
    }
    for alert in ALERTS:
        assert set(re.findall(r"\b(?:ray_)?(?:scoreray|serve)_\w+", alert.when)) <= known, alert.name


HEALTHY = 'ray_serve_deployment_replica_healthy{{application="scoreray",deployment="model",replica="{}"}}'
STATUS = 'ray_serve_deployment_status{application="scoreray",deployment="model"}'
WANTED = 'ray_serve_autoscaling_target_replicas{application="scoreray",deployment="model"}'
LOST = [  # as scraped each 15 s from a service of two whose replica was killed, with no room for another
    (WANTED, "2x200"),
    (HEALTHY.format("x"), "1x200"),
    (HEALTHY.format("y"), "1x41 0 stale"),
    (STATUS, "6x40 2x160"),
]
FIRES: dict[str, tuple[list[tuple[str, str]], str, dict[str, str]]] = {
    # alert -> series each 15 s, when it is evaluated, its labels
    "ScorerayNoCommit": ([('ray_scoreray_last_commit_age_s{run="a"}', "2+15x290")], "67m", {"run": "a"}),
    "ScoreraySilent": ([('ray_scoreray_progress_age_s{run="a"}', "1x40 0+15x60")], "22m", {"run": "a"}),
    "ScorerayDataStalled": ([('ray_scoreray_data_stall{run="a"}', "0.7x80")], "11m", {"run": "a"}),
    "ScorerayLossNotFinite": ([('ray_scoreray_skipped_steps{run="a"}', "2x20 3x80")], "8m", {"run": "a"}),
    "ScorerayRestarts": (
        [('ray_scoreray_restarts{run="a"}', "0x40 1x40 2x40 3x120")],
        "32m",
        {"run": "a"},
    ),
    "ScorerayShedding": (
        [
            ('scoreray_sheds_total{code="overloaded"}', "0+15x120"),
            ('scoreray_requests_total{code="ok"}', "0+15x120"),
            ('scoreray_requests_total{code="overloaded"}', "0+15x120"),
        ],
        "15m",
        {},
    ),
    "ScorerayReplicaDown": (LOST, "15m", {"deployment": "model"}),
    "ScorerayReplicasDie": (
        [(STATUS, "6x10 2x1 6x30 2x2 6x30 2x1 6x100")],  # back within half a minute each time
        "22m",
        {"deployment": "model"},
    ),
    "ScorerayFewReplicas": (LOST, "23m", {"deployment": "model"}),
}
MORE = {
    "stopped, and gone soon": (
        "ScorerayLossNotFinite",
        [('ray_scoreray_stopped_nonfinite{run="a"}', "0x20 1x2 stale")],
        "8m",
        {"run": "a"},
    ),
    "a driver that dies again and again": (  # its monitor knows when the last start's checkpoint was written
        "ScorerayNoCommit",
        [('ray_scoreray_last_commit_age_s{run="a"}', "0+15x120 stale _x20 2115+15x200")],
        "67m",
        {"run": "a"},
    ),
    "the only replica, with its node": (
        "ScorerayFewReplicas",
        [(WANTED, "1x200"), (HEALTHY.format("x"), "1x40 stale"), (STATUS, "6x200")],
        "23m",
        {"deployment": "model"},
    ),
    "a service that never came up": ("ScorerayReplicaDown", [(STATUS, "3x20 1x100")], "10m", {"deployment": "model"}),
}
GOOD = {
    "a run and a service that go on": [
        ('ray_scoreray_last_commit_age_s{run="a"}', "0+15x200 0+15x160"),
        ('ray_scoreray_progress_age_s{run="a"}', "1x360"),
        ('ray_scoreray_data_stall{run="a"}', "0.1x360"),
        ('ray_scoreray_skipped_steps{run="a"}', "2x360"),
        ('ray_scoreray_stopped_nonfinite{run="a"}', "0x360"),
        ('ray_scoreray_restarts{run="a"}', "0x80 1x80 2x200"),
        ('scoreray_sheds_total{code="overloaded"}', "0+1x360"),
        ('scoreray_requests_total{code="ok"}', "0+100x360"),
        (WANTED, "2x360"),
        (HEALTHY.format("x"), "1x360"),
        (HEALTHY.format("y"), "1x360"),
        (STATUS, "6x360"),
    ],
    "one week later the run goes on, a driver's count begins again": [
        ('ray_scoreray_last_commit_age_s{run="a"}', "_x10 604800+15x180 0+15x170"),
        ('ray_scoreray_skipped_steps{run="a"}', "5x20 4x340"),
        ('ray_scoreray_restarts{run="a"}', "4x10 stale _x10 0x340"),
        ('ray_scoreray_progress_age_s{run="a"}', "0+15x30 0x330"),  # a slow start
    ],
    "replicas come and go with the load, one dies and is replaced": [
        (WANTED, "1x100 3x100 1x160"),
        (HEALTHY.format("x"), "1x360"),
        (HEALTHY.format("y"), "_x120 1x80 0 stale"),
        (HEALTHY.format("z"), "_x110 1x40 0 stale"),
        (HEALTHY.format("w"), "_x154 1x46 0 stale"),
        (STATUS, "6x100 4x20 6x30 2x4 6x46 5x4 6x156"),
    ],
}


def promtool(folder: Path, tests: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    shutil.copy(PLATFORM / "rules.yaml", folder / "rules.yaml")
    file = folder / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}))
    return subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=PATIENCE_S)


def series(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"series": name, "values": values} for name, values in pairs]


def firing(name: str, when: str, labels: dict[str, str]) -> dict[str, Any]:
    chosen = "".join(f',{key}="{value}"' for key, value in labels.items())
    query = f'count(ALERTS{{alertname="{name}",alertstate="firing"{chosen}}})'
    return {"expr": query, "eval_time": when, "exp_samples": [{"labels": "{}", "value": 1}]}


def queried(pairs: list[tuple[str, str]], **checks: Any) -> dict[str, Any]:
    return {"interval": "15s", "input_series": series(pairs), **checks}


def test_each_alert_fires(tmp_path: Path) -> None:
    assert FIRES.keys() == {alert.name for alert in ALERTS}
    cases = [(name, *case) for name, case in FIRES.items()] + list(MORE.values())
    done = promtool(tmp_path, [queried(pairs, promql_expr_test=[firing(name, *when)]) for name, pairs, *when in cases])
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_alert_fires_while_all_is_well(tmp_path: Path) -> None:
    minutes = range(1, 90)
    checks = [{"eval_time": f"{m}m", "alertname": alert.name, "exp_alerts": []} for alert in ALERTS for m in minutes]
    done = promtool(tmp_path, [queried(pairs, alert_rule_test=checks) for pairs in GOOD.values()])
    assert done.returncode == 0, done.stdout + done.stderr
