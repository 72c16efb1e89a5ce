"""Ranged GETs of our own: signed as botocore signs, over kept connections, left to boto3 where not plain."""

from __future__ import annotations

import datetime

import botocore.session
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

import scoreray.data.s3_ranges as s3_ranges
from scoreray.data.errors import StorageError
from scoreray.data.local_s3 import LocalS3
from scoreray.data.s3_ranges import Ranges
from scoreray.data.store import NotFound, open_store


@pytest.mark.parametrize("token", [None, "a-session/token=="])
@pytest.mark.parametrize("key", ["shards/000000.tar", "odd name/ä+b=c&d~e.tar"])
def test_the_signature_is_botocores(token: str | None, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
    if token:
        monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    session = botocore.session.get_session()
    client = session.create_client("s3", region_name="eu-north-1", endpoint_url="https://storage.example:9000")
    ranges = Ranges(client, session)
    path = s3_ranges.quote(f"/bucket/{key}", safe="/-_.~")
    headers = ranges._signed(path, "bytes=5-99")

    now = datetime.datetime.strptime(headers["x-amz-date"], "%Y%m%dT%H%M%SZ")
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda *_, **__: now)
    request = AWSRequest("GET", f"https://storage.example:9000{path}", headers={"range": "bytes=5-99"})
    request.context["payload_signing_enabled"] = True
    credentials = Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", token)
    S3SigV4Auth(credentials, "s3", "eu-north-1").add_auth(request)
    assert headers["authorization"] == request.headers["Authorization"]


def test_ranges_are_slices_over_one_connection(s3_url: str, local_s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    store, data = open_store(s3_url), bytes(range(256)) * 40
    store.put("odd name/ä+b=c&d~e", data)
    monkeypatch.setattr("scoreray.data.store_s3.client", None)  # boto3 is not asked
    made = []
    connect = Ranges._connect
    monkeypatch.setattr(Ranges, "_connect", lambda self: made.append(1) or connect(self))
    for start, end in [(0, 1), (5, 900), (10_000, 20_000), (10_240, 10_300), (0, 10_240)]:
        assert store.get("odd name/ä+b=c&d~e", start, end) == data[start:end]
    assert len(made) <= 1
    with pytest.raises(NotFound, match="no such object"):
        store.get("none", 0, 5)
    with pytest.raises(StorageError, match="bucket 'scoreray-none' does not exist"):
        open_store("s3://scoreray-none").get("key", 0, 5)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"credentials refused \(SignatureDoesNotMatch\)"):
        store.get("odd name/ä+b=c&d~e", 0, 5)


def test_a_connection_that_the_server_closed_is_made_anew(s3_url: str, local_s3: LocalS3) -> None:
    from scoreray.data.store_s3 import _ranges

    store = open_store(s3_url)
    store.put("key", b"0123456789")
    assert store.get("key", 2, 5) == b"234"
    for connection in _ranges()._idle:
        connection.sock.shutdown(2)
    assert store.get("key", 2, 5) == b"234"


def test_a_proxy_is_left_to_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    session = botocore.session.get_session()
    client = session.create_client("s3", region_name="eu-north-1", endpoint_url="http://storage.example")
    monkeypatch.delenv("no_proxy", raising=False)
    assert Ranges(client, session).usable
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    assert not Ranges(client, session).usable
