"""A real headless Chromium, by the WebDriver protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE_S, wait_until

PROGRAMS = [shutil.which("chromium"), shutil.which("chromedriver")]
NEEDED = pytest.mark.skipif(
    None in PROGRAMS, reason="no chromium and chromedriver here (apt-get install chromium chromium-driver)"
)
PHONE = (390, 844)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's name for an element's id


class WebDriverError(Exception):
    """What chromedriver answers instead of a result: a script's error, a page that does not load in time."""


class Browser:
    """A Chromium by the WebDriver protocol: as much of it as these tests need."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/session"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        wanted = {
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
            "timeouts": dict.fromkeys(("script", "pageLoad"), int(1000 * PATIENCE_S)),
        }
        self._url += "/" + self._request("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _request(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:  # its body says what it is, its status only "500"
            raise WebDriverError(f"{path} {data!r}: {error.code} {error.read().decode()[:2000]}") from None

    def clear(self) -> None:
        """An empty page of the window's own size, and nothing in the log. Each service has an origin of its own, so
        nothing that one stored is seen by another's page."""
        self.open("about:blank")
        self.cdp("Emulation.clearDeviceMetricsOverride")
        self.errors()

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 800}
        self.cdp("Emulation.setDeviceMetricsOverride", **metrics)

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self._request("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, url: str) -> None:
        self._request("/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        return self._request("/execute/sync", {"script": script, "args": list(arguments)})

    def element(self, selector: str) -> str:
        return self._request("/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self._request(f"/element/{self.element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        element = self.element(selector)
        self._request(f"/element/{element}/clear", {})
        self._request(f"/element/{element}/value", {"text": text})

    def upload(self, selector: str, file: Path) -> None:
        self._request(f"/element/{self.element(selector)}/value", {"text": str(file)})

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def until(self, script: str) -> Any:
        """Its first true value. An error may pass: the page is still loading, an element is not yet there."""
        last: list[object] = []

        def found() -> Any:
            try:
                return self.run(f"return {script}")
            except (WebDriverError, TimeoutError) as error:
                last[:] = [error]
                return None

        return wait_until(found, lambda: f"{script}; last error: {last}; the page: {self.text('main')}")

    def errors(self) -> list[str]:
        log = self._request("/se/log", {"type": "browser"})
        return [line["message"] for line in log if line["level"] == "SEVERE" and "status of" not in line["message"]]

    def picture(self, file: Path) -> None:
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.cdp("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._request("", method="DELETE")


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([str(PROGRAMS[1]), f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "chromedriver listens")
        browser = Browser(port)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        process.terminate()
        process.wait()
