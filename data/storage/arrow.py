"""The same places as pyarrow's filesystems, for engines that write there themselves (Ray Tune)."""

from __future__ import annotations

from typing import Any

from scoreray.data.storage.store import local_path


def arrow_location(url: str) -> tuple[Any, str]:
    """(filesystem, path) of a URL that `open_store` takes; the filesystem is None for a folder of this machine.

    It holds no credentials, so that none get into what is pickled with it: every process looks them up where AWS's
    (Google's, Azure's) own tools do.
    """
    if (path := local_path(url)) is not None:
        return None, str(path.absolute())
    import os

    from pyarrow import fs

    scheme, _, place = url.partition("://")
    if scheme == "gs":
        return fs.GcsFileSystem(), place
    if scheme == "az":
        return fs.AzureFileSystem(account_name=os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")), place
    from scoreray.data.storage.s3_access import client

    about = client().meta
    kind, _, endpoint = about.endpoint_url.partition("://")
    return fs.S3FileSystem(endpoint_override=endpoint, scheme=kind, region=about.region_name), place
