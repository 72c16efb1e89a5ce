"""Fixtures that several parts' tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from scoreray.data.local_s3 import LocalS3

os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 lets its workers starve on a busy machine


@pytest.fixture(scope="session")
def local_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """A real S3 server (SeaweedFS) on loopback; the environment points at it for the rest of the session."""
    with LocalS3(tmp_path_factory.mktemp("s3")) as server:
        before = {name: os.environ.get(name) for name in server.env}
        os.environ.update(server.env)
        server.create_bucket("scoreray-tests")
        yield server
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@pytest.fixture
def s3_url(local_s3: LocalS3, request: pytest.FixtureRequest) -> str:
    """A prefix of its own for this test: s3://scoreray-tests/<test>."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return f"s3://scoreray-tests/{os.getpid()}-{name}"


@pytest.fixture(scope="session")
def ray_cluster(local_s3: LocalS3) -> Iterator[None]:
    """One embedded Ray cluster for the session; its workers see the S3 server."""
    from scoreray.cluster.local_ray import connected

    with connected(num_cpus=4):
        yield
