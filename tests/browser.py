"""A real browser, driven over its own debugging pipe: JSON that ends in a null byte, on file descriptors 3 and 4.

Nothing is installed for it but the browser: playwright is 53 MB to download, selenium 12 MB and a driver.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_PATIENCE: Final = 60.0


class BrowserSaidNo(AssertionError):
    """The browser refused a command, or went away."""


class Browser:
    """Chromium without a window, with a profile of its own that is thrown away."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        hears, self._says = os.pipe()
        self._hears, says = os.pipe()
        # The pipes may have got the very numbers 3 and 4: then one would be overwritten before it is copied.
        ours = [hears, says, *(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 5) for descriptor in (hears, says))]
        *_, hears, says = ours
        actions = [(os.POSIX_SPAWN_DUP2, hears, 3), (os.POSIX_SPAWN_DUP2, says, 4), (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        self._process = os.posix_spawn(
            CHROMIUM, [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"], os.environ, file_actions=actions, setpgroup=0
        )
        for descriptor in ours:
            os.close(descriptor)
        self._numbers = itertools.count(1)
        self._unread = b""
        self._events: list[dict[str, Any]] = []
        self._session = ""

    def __enter__(self) -> Self:
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Accessibility", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(BrowserSaidNo):
            self._session = ""
            self.ask("Browser.close")
        os.close(self._says)
        os.close(self._hears)
        os.waitpid(self._process, 0)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        os.write(self._says, json.dumps(message).encode() + b"\0")
        for heard in self._heard():
            if heard.get("id") == number:
                if "error" in heard:
                    raise BrowserSaidNo(f"{method}: {heard['error']['message']}")
                answer: dict[str, Any] = heard["result"]
                return answer
            self._events.append(heard)
        raise BrowserSaidNo(f"no answer to {method}")

    def _heard(self) -> Iterator[dict[str, Any]]:
        end = time.monotonic() + _PATIENCE
        while True:
            line, separator, rest = self._unread.partition(b"\0")
            if separator:
                self._unread = rest
                yield json.loads(line)
                continue
            ready, _, _ = select.select([self._hears], [], [], max(0.0, end - time.monotonic()))
            more = os.read(self._hears, 1 << 20) if ready else b""
            if not more:
                return
            self._unread += more

    def _await_event(self, method: str) -> None:
        if not any(event["method"] == method for event in self._events):
            for heard in self._heard():
                self._events.append(heard)
                if heard.get("method") == method:
                    return
            raise BrowserSaidNo(f"no {method}")

    def open(self, path: Path, *, width: int = 1280, height: int = 800, scheme: str = "light", media: str = "screen") -> None:
        """Show a file; `complaints` then holds what went wrong with it."""
        self.resize(width, height)
        self.pretend(scheme, media)
        self._events.clear()
        self.ask("Page.navigate", url=path.as_uri())
        self._await_event("Page.loadEventFired")

    def resize(self, width: int, height: int) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def pretend(self, scheme: str = "light", media: str = "screen") -> None:
        """Prefer light or dark, show as on a screen or in print."""
        self.ask("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])

    @property
    def complaints(self) -> list[str]:
        """What the browser logged, every exception, and every request for anything but the page itself."""
        self.evaluate("0")
        said = {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening"}
        found = [json.dumps(event["params"]) for event in self._events if event["method"] in said]
        requests = [event["params"]["request"]["url"] for event in self._events if event["method"] == "Network.requestWillBeSent"]
        return found + requests[1:]

    def evaluate(self, script: str) -> Any:
        """What an expression gives."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserSaidNo(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until an expression holds; the browser says when it has painted anew, so that nobody sleeps."""
        turns = f"for (let turn = 0; turn < 300 && !({condition}); turn++) await new Promise(requestAnimationFrame)"
        if not self.evaluate(f"(async () => {{ {turns}; return {condition} }})()"):
            raise BrowserSaidNo(f"it never came to pass: {condition}")

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"Enter": "\r"}.get(key)
        self.ask("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **({"text": text} if text else {}))
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def click(self, selector: str) -> None:
        """Scroll to the first element that fits, and click its middle."""
        where = "it.scrollIntoView({block: 'center', inline: 'center'}); const r = it.getBoundingClientRect()"
        script = f"const it = document.querySelector({json.dumps(selector)}); {where}; [r.x + r.width / 2, r.y + r.height / 2]"
        x, y = self.evaluate(f"{{ {script} }}")
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def accessible(self) -> list[dict[str, Any]]:
        """What a screen reader gets to know: role and name of all that it is not to ignore."""
        nodes = self.ask("Accessibility.getFullAXTree")["nodes"]
        return [
            {"role": node["role"]["value"]} | {what: node.get(what, {}).get("value", "") for what in ("name", "description")}
            for node in nodes
            if not node.get("ignored")
        ]

    def screenshot(self, *, whole: bool = False) -> bytes:
        """The page as a PNG."""
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])
