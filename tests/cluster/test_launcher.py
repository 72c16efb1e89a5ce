"""The files for Ray's cluster launcher are what Ray takes, hold no keys, and ask for a token on every node."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "cluster"
FILES = ("aws.yaml", "machines.yaml")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def schema() -> dict[str, Any]:
    import ray

    return json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_cluster_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    jsonschema.validate(read(name), schema())
    validate_config(prepare_config(read(name)))


def test_the_schema_refuses_a_typo() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read("aws.yaml") | {"max_worker": 3}, schema())


@pytest.mark.parametrize("name", FILES)
def test_no_keys_and_a_token_on_every_node(name: str) -> None:
    config, text = read(name), (FOLDER / name).read_text()
    assert not re.search(r"AKIA|aws_access_key|aws_secret|private_key|PRIVATE KEY|password", text, re.I)
    assert "ssh_private_key" not in config["auth"]
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        for command in commands:
            assert "ray start" not in command or "RAY_AUTH_MODE=token" in command, command
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


@pytest.mark.parametrize("name", FILES)
def test_ray_start_takes_the_options(name: str) -> None:
    from ray.scripts.scripts import start

    known = {option for param in start.params for option in param.opts}
    config = read(name)
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        for option in re.findall(r"(--[a-z-]+)", command.partition("ray start")[2]):
            assert option in known, option


def test_on_aws_rights_are_roles_and_workers_are_spot() -> None:
    kinds = read("aws.yaml")["available_node_types"]
    assert all(kind["node_config"]["IamInstanceProfile"]["Name"].startswith("scoreray-") for kind in kinds.values())
    assert all(kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for kind in kinds.values())
    assert kinds["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in kinds["head"]["node_config"], "the head, with the driver, is on demand"
    assert kinds["head"]["resources"] == {"CPU": 0}


@pytest.mark.parametrize("name", FILES)
def test_an_older_python_is_refused_before_anything_is_installed(name: str) -> None:
    first = read(name)["setup_commands"][0]
    assert subprocess.run(first, shell=True).returncode == 0
    older = first.replace("(3, 11)", "(99, 0)")
    refused = subprocess.run(older, shell=True, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "is needed" in refused.stderr


def test_on_aws_the_image_is_ones_own_to_name() -> None:
    """Ray's default is an image of Ubuntu 18.04 with Python 3.6."""
    assert all(kind["node_config"]["ImageId"] for kind in read("aws.yaml")["available_node_types"].values())
