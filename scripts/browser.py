"""Drives headless Chromium by the WebDriver protocol, which chromedriver speaks over HTTP: for pictures and tests."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

DRIVER = "chromedriver"
KEYS = {"ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015", "Tab": "\ue004"}
KEYS |= {"Home": "\ue011", "End": "\ue010", "Escape": "\ue00c", "Enter": "\ue007", "Space": " "}
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars")


def missing() -> str | None:
    """Why there is no browser to drive, and how to get one; `None` if there is."""
    if shutil.which(DRIVER) and (shutil.which("chromium") or shutil.which("google-chrome")):
        return None
    return "no Chromium with its chromedriver: apt-get install chromium chromium-driver"


class Browser:
    """One window of a headless Chromium; a context manager.

    Args:
        size: width and height of the window in pixels.
        offline: nothing can be loaded from the network.
    """

    def __init__(self, size: tuple[int, int] = (1280, 900), *, offline: bool = True) -> None:
        self._home = tempfile.TemporaryDirectory()
        self._driver = subprocess.Popen(
            [DRIVER, "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"HOME": self._home.name},
        )
        self._url = f"http://127.0.0.1:{self._port()}/session"
        options = [*_OPTIONS, f"--window-size={size[0]},{size[1]}"]
        # A proxy that is not there: a request to any host fails, and shows in the console.
        options += ["--proxy-server=127.0.0.1:9"] if offline else []
        wanted = {"goog:chromeOptions": {"args": options}, "goog:loggingPrefs": {"browser": "ALL"}}
        self._url += "/" + self._send("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._send("", method="DELETE")
        finally:
            self._driver.terminate()
            self._driver.wait()
            if self._driver.stdout is not None:
                self._driver.stdout.close()
            self._home.cleanup()

    def open(self, page: Path) -> None:
        """Load the file `page`."""
        self._send("/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the function body `script` returns; it may await, and `arguments` are its own."""
        wrapped = (
            "const done = arguments[arguments.length - 1];"
            f"(async function () {{ {script} }}).apply(null, [...arguments].slice(0, -1))"
            ".then((value) => done({value}), (error) => done({error: String(error)}));"
        )
        answer = self._send("/execute/async", {"script": wrapped, "args": list(arguments)})
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer.get("value")

    def press(self, *keys: str) -> None:
        """Press `keys` one after another, as a person would; names such as "ArrowLeft" or single characters."""
        codes = [KEYS.get(key, key) for key in keys]
        actions = [{"type": kind, "value": code} for code in codes for kind in ("keyDown", "keyUp")]
        self._send("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def point(self, selector: str, *, click: bool = False) -> None:
        """Move the pointer to the middle of the first element that fits `selector`."""
        x, y = self.run(
            "const node = document.querySelector(arguments[0]); node.scrollIntoView({block: 'center'});"
            "const at = node.getBoundingClientRect(); return [at.left + at.width / 2, at.top + at.height / 2];",
            selector,
        )
        actions: list[dict[str, Any]] = [{"type": "pointerMove", "x": int(x), "y": int(y), "duration": 0}]
        if click:
            actions += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._send("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})

    def prefer(self, scheme: str) -> None:
        """Act as on a system whose colours are "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", {"features": features})

    def command(self, name: str, parameters: dict[str, Any]) -> Any:
        """A command of the DevTools protocol."""
        return self._send("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def console(self) -> list[str]:
        """Messages since the last call."""
        return [f"{line['level']}: {line['message']}" for line in self._send("/se/log", {"type": "browser"})]

    def picture(self, path: Path | None = None, *, of: str = "body", margin: int = 24) -> bytes:
        """A PNG of the first element that fits `of`, wherever it is on the page; also written to `path`."""
        area = self.run(
            "const at = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return {x: at.left + scrollX, y: at.top + scrollY, width: at.width, height: at.height};",
            of,
        )
        area = {"x": max(0, area["x"] - margin), "y": max(0, area["y"] - margin), "scale": 1} | {
            side: area[side] + 2 * margin for side in ("width", "height")
        }
        found = self.command("Page.captureScreenshot", {"format": "png", "clip": area, "captureBeyondViewport": True})
        data = base64.b64decode(found["data"])
        if path is not None:
            path.write_bytes(data)
        return data

    def _port(self) -> int:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                return int(found[1])
        raise RuntimeError(f"{DRIVER} did not start, exit code {self._driver.wait()}")

    def _send(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if method == "DELETE" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        # Not by a proxy: the driver is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"].splitlines()[0]) from None
