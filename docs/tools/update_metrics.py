"""Writes docs/metrics.md, the tables of docs/serving.md, Grafana's dashboards and Prometheus' rules.

python docs/tools/update_metrics.py
"""

from __future__ import annotations

import json
from pathlib import Path

import serving_tables
import yaml
from alerts import rules
from catalogue import catalogue, page
from dashboards import dashboard

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = "k8s/base/platform"


def files() -> dict[str, str]:
    """Path in the repository -> text."""
    made = {f"{PLATFORM}/dashboards/{name}.json": json.dumps(dashboard(name), indent=1) + "\n" for name in catalogue()}
    made[f"{PLATFORM}/rules.yaml"] = yaml.safe_dump(rules(), sort_keys=False, width=1000)
    made["docs/metrics.md"] = page()
    made["docs/serving.md"] = serving_tables.page()
    return made


if __name__ == "__main__":
    for name, text in files().items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_text(text)
        print(name)
