"""Alerts for Prometheus: which conditions, who must act how soon, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alert:
    """when: PromQL; lasts: for how long it must hold. severity: page (now) or ticket (today)."""

    name: str
    when: str
    lasts: str
    severity: str
    summary: str
    remedy: str


SERVED = '{deployment=~"model|ingress"}'
STATUS = f"min by (deployment) (ray_serve_deployment_status{SERVED})"  # 0 to 2: unknown, failed, unhealthy
HEALTHY = f"count by (deployment) (ray_serve_deployment_replica_healthy{SERVED} == 1)"
WANTED = f"max by (deployment) (ray_serve_autoscaling_target_replicas{SERVED})"  # also without autoscaling


def grown(gauge: str, window: str) -> str:
    """PromQL: by how much a gauge that is always there grew, in whole steps; `delta` extrapolates, to more or less."""
    return f"max by (run) ({gauge} - min_over_time({gauge}[{window}]))"


ALERTS = (
    Alert(
        "ScorerayNoCommit",
        # and it was there an hour ago: a run that goes on after a week has an old commit, and nothing is wrong
        "max by (run) (ray_scoreray_last_commit_age_s) > 3600 "
        "and max by (run) (last_over_time(ray_scoreray_last_commit_age_s[30m] offset 1h))",
        "5m",
        "page",
        "Run {{ $labels.run }} has not committed a checkpoint for {{ $value | humanizeDuration }}",
        "Look whether workers run (restarts), whether the storage can be written, and at checkpoint.every_images",
    ),
    Alert(
        "ScoreraySilent",
        "max by (run) (ray_scoreray_progress_age_s) > 600",
        "1m",
        "page",
        "Run {{ $labels.run }} says nothing for {{ $value | humanizeDuration }}",
        "A rank that hangs, storage or data that does not answer, or no room for the workers: its log and `ray status`",
    ),
    Alert(
        "ScorerayDataStalled",
        "max by (run) (ray_scoreray_data_stall) > 0.5",
        "10m",
        "ticket",
        "Run {{ $labels.run }} waits for data {{ $value | humanizePercentage }} of the time",
        "Set data.cache_dir, more data.prefetch_batches, or look at the storage",
    ),
    Alert(
        "ScorerayLossNotFinite",
        f"{grown('ray_scoreray_skipped_steps', '15m')} > 0 "
        "or max by (run) (max_over_time(ray_scoreray_stopped_nonfinite[15m])) > 0",
        "0m",
        "page",
        "Loss or gradient of run {{ $labels.run }} was not finite",
        "The log names sigma and sample: lower the learning rate, or look at that sample",
    ),
    Alert(
        "ScorerayRestarts",
        f"{grown('ray_scoreray_restarts', '1h')} >= 3",
        "0m",
        "ticket",
        "The workers of run {{ $labels.run }} were started again {{ $value }} times within an hour",
        "The log has each reason: nodes that go away, memory, a worker that hangs",
    ),
    Alert(
        "ScorerayShedding",
        "sum(rate(scoreray_sheds_total[5m])) / sum(rate(scoreray_requests_total[5m])) > 0.05",
        "5m",
        "page",
        "{{ $value | humanizePercentage }} of the requests for samples are turned away",
        "More replicas (--replicas MIN,MAX), or one token that asks for too much",
    ),
    Alert(
        "ScorerayReplicaDown",
        f"{STATUS} <= 2",
        "3m",
        "page",
        "A replica of {{ $labels.deployment }} is gone and no other one has taken its place",
        "Its log says why it ended, and `ray status` whether there is room for another; the others answer, more slowly",
    ),
    Alert(
        "ScorerayReplicasDie",
        f"changes(({STATUS} <= bool 2)[30m:15s]) >= 6",
        "0m",
        "page",
        "Replicas of {{ $labels.deployment }} died three times within half an hour",
        "Their logs say why: memory, a device, a checkpoint that can't be read",
    ),
    Alert(
        "ScorerayFewReplicas",
        f"({HEALTHY} or 0 * {WANTED}) < {WANTED}",
        "10m",
        "ticket",
        "{{ $labels.deployment }} has {{ $value }} healthy replicas, fewer than are wanted",
        "`ray status` shows what they wait for: nodes, GPUs, or a lower --replicas MAX",
    ),
)


def rules() -> dict[str, Any]:
    """A Prometheus rule file."""
    return {
        "groups": [
            {
                "name": "scoreray",
                "rules": [
                    {
                        "alert": alert.name,
                        "expr": alert.when,
                        "for": alert.lasts,
                        "labels": {"severity": alert.severity},
                        "annotations": {"summary": alert.summary, "description": alert.remedy},
                    }
                    for alert in ALERTS
                ],
            }
        ]
    }
