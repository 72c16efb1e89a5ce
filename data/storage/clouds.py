"""Objects in Google Cloud Storage (gs://) and Azure Blob Storage (az://), through obstore; its errors in one line.

S3 takes its ranged reads and their errors from here too (`s3.py`). Endpoints, accounts and credentials are found as
obstore finds them: environment variables (GOOGLE_*, AZURE_*) or the machine's identity.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import obstore
import obstore.store
from obstore.exceptions import AlreadyExistsError, BaseError, UnauthenticatedError

from scoreray.data.errors import StorageError, Unanswered, shortened
from scoreray.data.storage.interface import PROBE, NotFound, Store, StoredObject, UnfinishedWrite, check_key
from scoreray.data.storage.retries import Refusal, brief, explain_refusal, retried

CONNECT_S = 5.0
READ_S = 20.0  # for the beginning of an answer, and between two pieces of it
OBJECT_S = 3600.0  # for a whole object or a part of an upload
ERRORS = (BaseError, FileNotFoundError)  # of obstore, a refusal or a failure of the network
SETTINGS = {"gs": "GOOGLE_APPLICATION_CREDENTIALS", "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY"}
ENDPOINTS = {"gs": ("GOOGLE_BASE_URL", "Google Cloud Storage"), "az": ("AZURE_STORAGE_ENDPOINT", "Azure")}

T = TypeVar("T")
_first_process: int | None = None


def usable_here() -> bool:
    """Whether obstore works in this process: a call would wait for ever in a fork of one that has used it, as the
    threads of its runtime are not forked along (seen with 0.12.1)."""
    global _first_process
    _first_process = _first_process or os.getpid()
    return _first_process == os.getpid()


def options(allow_http: bool, request_s: float) -> dict[str, Any]:
    """Of an obstore client. Retries are ours (`retries.py`), so that they are counted and end by one rule."""
    seconds = {"connect_timeout": CONNECT_S, "read_timeout": READ_S, "timeout": request_s}
    return {
        "client_options": {"allow_http": allow_http, **{k: timedelta(seconds=s) for k, s in seconds.items()}},
        "retry_config": {"max_retries": 0},
    }


def refusal_of(error: Exception) -> Refusal | None:
    """What the server answered, or None where no answer came. obstore has it in its message only."""
    found = re.search(r"status code: (\d{3})[^:]*: ?(.*?)(?:\n\nDebug source|\Z)", str(error), re.DOTALL)
    if found is None:
        return None
    fields = {name: re.search(f"<{name}>([^<]*)</{name}>", found[2]) for name in ("Code", "Message")}
    code, message = (match[1] if match else "" for match in fields.values())
    if not code:  # no XML: JSON of a service before the store, or nothing
        code, message = "404" if found[1] == "404" else "", shortened(found[2], 200)
    return Refusal(found[1], code, message)


def explain(url: str, endpoint: str, settings: str, error: Exception) -> StorageError | None:
    """The one-line error for what obstore raised, or None for anything else."""
    if not isinstance(error, ERRORS) or getattr(error, "errno", None) is not None:  # an errno: of a local file
        return None
    text = str(error)
    if "token request" in text or isinstance(error, UnauthenticatedError):
        return StorageError(f"{url}: no usable credentials found for {endpoint}; set {settings}")
    if refusal := refusal_of(error):
        return explain_refusal(url, endpoint, refusal, settings)
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{url}: no such object")
    if "Certificate" in text:
        return StorageError(f"{url}: no trusted TLS connection to {endpoint}; check its certificate, AWS_CA_BUNDLE")
    if re.search(r"kind: Connect,|ConnectError", text):
        return Unanswered(f"{url}: the endpoint {endpoint} is not reachable; check its URL and the network")
    if "HTTP error" in text or "Requested" in text:  # a range other than the requested one came
        return Unanswered(f"{url}: the connection to {endpoint} broke off ({text.splitlines()[0][-60:]})")
    return StorageError(f"{url}: {' '.join(text.split('Debug source')[0].split())}; check {settings}")


class CloudStore(Store):
    """Objects of gs://bucket/prefix or az://container/prefix.

    Not tested with the clouds themselves. Tried: Azure against Azurite; Google against fake-gcs-server, which can't
    take uploads in the form that obstore sends.
    """

    is_remote: ClassVar[bool] = True

    def _request(self, url: str, call: Callable[[Any], T]) -> T:
        if not usable_here():
            raise StorageError(
                f"{url}: can't be used in a fork of a process that has used such a URL; start processes by spawn"
            )
        scheme = self.root[:2]
        variable, name = ENDPOINTS[scheme]
        endpoint = os.environ.get(variable) or name

        def explained(url: str, error: Exception) -> StorageError | None:
            return explain(url, endpoint, SETTINGS[scheme], error)

        return retried(url, lambda: call(_bucket(self.root, _environment())), explained, _bucket.cache_clear)

    def _at(self, key: str) -> str:
        return "/".join([*self.root.split("/")[3:], check_key(key)])

    def check_writable(self) -> None:
        brief().run(super().check_writable)

    def check_reachable(self) -> None:
        brief().run(self.exists, PROBE)

    def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        at, first = self._at(key), start or 0
        if end is not None and end <= first:
            return b""

        def read(bucket: Any) -> bytes:
            try:
                if end is not None:
                    return obstore.get_range(bucket, at, start=first, end=end).to_bytes()
                wanted: Any = {"range": {"offset": first}} if first else None
                return obstore.get(bucket, at, options=wanted).bytes().to_bytes()
            except ERRORS as error:
                if is_beyond_the_end(error):
                    return b""
                raise

        return self._request(self.url(key), read)

    def put(self, key: str, data: bytes | Path) -> None:
        self._request(self.url(key), lambda bucket: obstore.put(bucket, self._at(key), data))

    def put_new(self, key: str, data: bytes) -> bool:
        def write(bucket: Any) -> bool:
            try:
                obstore.put(bucket, self._at(key), data, mode="create")
            except AlreadyExistsError:
                return False
            return True

        return self._request(self.url(key), write)

    def size(self, key: str) -> int:
        return self._request(self.url(key), lambda bucket: obstore.head(bucket, self._at(key))["size"])

    def _listed(self, prefix: str) -> list[tuple[str, Any]]:
        """obstore's prefixes are whole folders, ours any beginning of a key."""
        folder = self.root.split("/", 3)[3] + "/" if self.root.count("/") > 2 else ""
        within = (folder + prefix).rpartition("/")[0]

        def pages(bucket: Any) -> list[tuple[str, Any]]:
            found = [item for page in obstore.list(bucket, within or None) for item in page]
            return [(item["path"][len(folder) :], item) for item in found if item["path"].startswith(folder + prefix)]

        return self._request(self.url(), pages)

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        return sorted((key, item["size"]) for key, item in self._listed(prefix))

    def objects(self, prefix: str = "") -> Sequence[StoredObject]:
        found = self._listed(prefix)
        return sorted(StoredObject(key, item["size"], item["last_modified"].timestamp()) for key, item in found)

    def unfinished(self, prefix: str = "") -> Sequence[UnfinishedWrite]:
        """None: neither cloud lists them, and both remove them after a week."""
        return []

    def abandon(self, writes: Iterable[UnfinishedWrite]) -> None:
        pass

    def stamps(self) -> dict[str, str]:
        return {key: (item["e_tag"] or str(item["last_modified"])).strip('"') for key, item in self._listed("")}

    def delete(self, keys: Iterable[str]) -> None:
        for at in map(self._at, keys):  # one by one: a bulk request ends at the first key that is already gone
            with contextlib.suppress(NotFound):
                self._request(self.url(), partial(obstore.delete, paths=at))

    def clear_unfinished(self, prefix: str, but: str) -> None:
        """Both clouds remove what an upload left unfinished after a week."""


def is_beyond_the_end(error: Exception) -> bool:
    """Whether the range that was requested begins after the object's last byte, for which a slice is empty."""
    refusal = refusal_of(error)
    return "Wanted range starting at" in str(error) or (refusal is not None and refusal.status == "416")


def _environment() -> tuple[tuple[str, str], ...]:
    """The variables that obstore reads, so that a store is made again once one of them changes."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(("GOOGLE_", "AZURE_"))))


@lru_cache(maxsize=16)
def _bucket(root: str, environment: tuple[tuple[str, str], ...]) -> Any:
    plain = any(value.startswith("http://") or name == "AZURE_STORAGE_USE_EMULATOR" for name, value in environment)
    return obstore.store.from_url("/".join(root.split("/")[:3]), **options(plain, OBJECT_S))
