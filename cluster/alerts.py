"""Alerts for Prometheus: what somebody should be told of, when, and what to do then."""

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
    mend: str


ALERTS = (
    Alert(
        "ScorerayNoCommit",
        "max by (run) (ray_scoreray_last_commit_age_s) > 3600",
        "5m",
        "page",
        "Run {{ $labels.run }} has not committed a checkpoint for {{ $value | humanizeDuration }}",
        "Look whether workers run (restarts), whether the storage can be written, and at checkpoint.every_images",
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
        "max by (run) ((ray_scoreray_loss != ray_scoreray_loss) or (abs(ray_scoreray_loss) == Inf) "
        "or (delta(ray_scoreray_skipped_steps[15m]) > 0))",
        "0m",
        "page",
        "Loss or gradient of run {{ $labels.run }} was not finite",
        "The log names sigma and sample: lower the learning rate, or look at that sample",
    ),
    Alert(
        "ScorerayRestarts",
        "max by (run) (delta(ray_scoreray_restarts[1h])) >= 3",
        "0m",
        "ticket",
        "The workers of run {{ $labels.run }} were started again {{ $value }} times within an hour",
        "The log tells each reason: nodes that go away, memory, a worker that hangs",
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
        'min by (deployment) (ray_serve_deployment_replica_healthy{deployment=~"model|ingress|ledger"}) == 0',
        "1m",
        "page",
        "A replica of {{ $labels.deployment }} is not healthy",
        "Its log says why it ended; the others answer, more slowly",
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
                        "annotations": {"summary": alert.summary, "description": alert.mend},
                    }
                    for alert in ALERTS
                ],
            }
        ]
    }
