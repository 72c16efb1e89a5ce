"""How this process reaches S3: clients of boto3 and obstore, for each endpoint and credentials that it is given."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import obstore.store
from botocore.config import Config
from obstore.auth.boto3 import Boto3CredentialProvider

from scoreray.data.errors import UserError
from scoreray.data.storage import clouds

# obstore calls the provider again 5 minutes before this ends; botocore renews a role's credentials 10 before theirs do.
CREDENTIALS_TTL = timedelta(minutes=10)


@dataclass(frozen=True)
class S3Access:
    """What this process uses for one endpoint and its credentials."""

    client: Any  # of boto3
    session: Any  # of botocore: credentials, certificates
    buckets: dict[tuple[str, float], obstore.store.S3Store] = field(default_factory=dict)  # by name and time limit


_clients: dict[tuple[str | None, ...], S3Access] = {}
_lock = threading.Lock()


def _forget_clients() -> None:
    """A forked child has its own connections and locks."""
    global _lock
    _clients.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_clients)


def client() -> Any:
    """This process's S3 client for the endpoint and credentials that the environment names now."""
    return access_now().client


def bucket_of(access: S3Access, name: str, limit_s: float) -> obstore.store.S3Store:
    """obstore's, whose requests may take so long. Raises ValueError where there are no credentials."""
    endpoint = access.client.meta.endpoint_url
    made = clouds.options(endpoint.startswith("http://"), limit_s)
    bundle = access.session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    if bundle:
        made["client_options"]["root_certificate"] = Path(bundle).read_bytes()
    return obstore.store.S3Store(
        name,
        endpoint=endpoint,
        aws_endpoint_url_s3=endpoint,  # or the environment's would take precedence
        region=access.client.meta.region_name,
        credential_provider=Boto3CredentialProvider(access.session, ttl=CREDENTIALS_TTL),
        **made,
    )


def access_now() -> S3Access:
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
             "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION")  # fmt: skip
    key = tuple(os.environ.get(name) for name in names)
    with _lock:
        for name in names[:2]:
            if os.environ.get(name) and "://" not in os.environ[name]:
                raise UserError(f"{name}={os.environ[name]}: an endpoint starts with http:// or https://")
        if key not in _clients:
            session = botocore.session.get_session()
            made = boto3.session.Session(botocore_session=session).client(
                "s3",
                region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
                config=Config(
                    s3={"addressing_style": "path"},
                    retries={"mode": "standard", "total_max_attempts": 4},
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                    connect_timeout=5,
                    read_timeout=20,
                    max_pool_connections=32,
                ),
            )
            _clients[key] = S3Access(made, session)
        return _clients[key]


def renew() -> None:
    """The next request looks at the environment, ~/.aws and the machine's role again."""
    with _lock:
        _clients.clear()
