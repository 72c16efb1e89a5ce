"""Where everybody opens objects under a URL: `open_store("s3://bucket/prefix")`, `open_store("some/folder")`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

from scoreray.data.errors import UserError
from scoreray.data.storage.interface import NotFound, Store, check_key
from scoreray.data.storage.paths import PathStore

__all__ = ["NotFound", "PathStore", "Store", "local_path", "open_store"]

REMOTE = re.compile(r"(s3|gs|az)://([^/]*)(.*)", re.DOTALL)
BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
ACCEPTED = "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, file:///PATH or a path"


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store at `s3://bucket/prefix`, `gs://...`, `az://...`, `file:///folder` or a path. Does not touch it yet.

    S3's endpoint, region and credentials come from where every AWS tool takes them: AWS_ENDPOINT_URL[_S3], AWS_REGION,
    AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile in ~/.aws, or the machine's role; Google's and Azure's from
    GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME and _KEY, or the machine's identity. Raises UserError.
    """
    text = os.fspath(url)
    if not (remote := REMOTE.fullmatch(text)):
        return PathStore(os.path.abspath(_local_path(text)))
    scheme, bucket, path = remote.groups()
    if not BUCKET_NAME.fullmatch(bucket):
        raise UserError(
            f"'{text}': '{bucket}' can't be a bucket's name (3 to 63 of a-z, 0-9, '-', '_' and '.'); "
            f"write {scheme}://BUCKET/PREFIX"
        )
    prefix = "/".join(part for part in path.split("/") if part)
    root = f"{scheme}://{bucket}/{check_key(prefix)}" if prefix else f"{scheme}://{bucket}"
    if scheme == "s3":
        from scoreray.data.storage.s3 import S3Store  # boto3 takes 0.2 s to import: only for those who need it

        return S3Store(root)
    from scoreray.data.storage.clouds import CloudStore

    return CloudStore(root)


def local_path(url: str | os.PathLike[str]) -> Path | None:
    """The path that a plain path or `file:///...` names; None for a remote URL. Raises UserError for any other."""
    text = os.fspath(url)
    return None if REMOTE.fullmatch(text) else Path(_local_path(text))


def _local_path(text: str) -> str:
    path = text
    if text[:7].lower() == "file://":  # RFC 8089: no other host than this one, odd characters as %XX
        host, slash, rest = text[7:].partition("/")
        path = os.fsdecode(unquote_to_bytes(slash + rest)) if host.lower() in ("", "localhost") else ""
    if not path or "\0" in path or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path):
        raise UserError(f"'{text}' is no URL that can be opened; accepted: {ACCEPTED}")
    return os.path.expanduser(path)
