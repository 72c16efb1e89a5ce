"""A stand-in of the Hugging Face Hub on this machine: its commits hold files inline, without LFS and Xet."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

SHA = "0" * 40
TOKEN = "hf_stand_in"


class Hub(BaseHTTPRequestHandler):
    """The requests of huggingface_hub that commit a folder and download it again."""

    repositories: ClassVar[dict[str, dict[str, bytes]]]
    private: ClassVar[dict[str, bool]]

    def log_message(self, *words: Any) -> None:
        pass

    def _answer(self, body: Any = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories.setdefault(name, {})
            self.private[name] = asked.get("private", False) or asked.get("visibility") == "private"
            self._answer({"url": f"http://{self.headers['Host']}/{name}"})
        elif "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            files = self.repositories[self._name()]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            self._answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/{self._name()}/commit/{SHA}",
                    "commitOid": SHA,
                    "success": True,
                }
            )
        elif self.path.startswith("/api/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
        else:
            self._answer({}, 404)

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self._answer(
                {"name": "me", "type": "user"} if known else {"error": "Invalid user token."}, 200 if known else 401
            )
            return
        files = self.repositories.get(self._name())
        if files is None:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files.items()
            ]
            self._answer(listed)
        elif "/resolve/" in self.path:
            data = files.get(self.path.split("/", 5)[5])
            if data is None:
                self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            else:
                self._answer(data, 200, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": SHA})
        else:
            self._answer({"id": self._name(), "sha": SHA, "siblings": [{"rfilename": path} for path in files]})

    do_HEAD = do_GET

    def _name(self) -> str:
        found = re.match(r"(?:/api/models)?/([\w-]+/[\w-]+)", self.path)
        return found[1] if found else ""


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The endpoint that HF_ENDPOINT would name, which huggingface_hub reads when it is imported."""

    class Fresh(Hub):
        repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
        private: ClassVar[dict[str, bool]] = {}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield Fresh
    server.shutdown()
    server.server_close()
