"""A headless Chromium, Chrome or Edge driven through its debugging pipe, with nothing installed.

The browser reads commands on file descriptor 3 and answers on 4, JSON ended by a zero byte.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time

NAMES = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge",
    "msedge",
)  # fmt: skip
SECONDS = 60
# Puts two descriptors at 3 and 4, wherever they were, and becomes the browser.
START = """
import fcntl, os, sys
two = [fcntl.fcntl(int(word), fcntl.F_DUPFD, 10) for word in sys.argv[1:3]]
for at, one in zip((3, 4), two):
    os.dup2(one, at)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser():
    """The path of a browser, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser with one tab, a context manager.

    Attributes:
        problems: errors and exceptions on the page's console, and requests that failed.
        requests: the URLs asked for.
    """

    def __init__(self, profile):
        self.problems, self.requests, self.answers, self.count = [], [], {}, 0
        self.rest = b""
        to_browser, self.write_to = os.pipe()
        self.read_from, from_browser = os.pipe()
        words = [
            sys.executable, "-c", START, str(to_browser), str(from_browser), find_browser(),
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe",
            f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            words,
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.session = None
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(one["targetId"] for one in targets if one["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.session = None
            self.send("Browser.close")
            self.process.wait(10)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.write_to)
        os.close(self.read_from)

    def send(self, method, **parameters):
        """Run a command and return its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while self.count not in self.answers:
            self.receive(end)
        answer = self.answers.pop(self.count)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def receive(self, end):
        """Read messages until some came; events are noted."""
        ready, _, _ = select.select([self.read_from], [], [], max(0, end - time.monotonic()))
        piece = os.read(self.read_from, 1 << 20) if ready else b""
        if not piece:
            raise RuntimeError("the browser does not answer")
        *messages, self.rest = (self.rest + piece).split(b"\0")
        for text in messages:
            message = json.loads(text)
            if "id" in message:
                self.answers[message["id"]] = message
            else:
                self.note(message["method"], message["params"])

    def note(self, method, event):
        """Keep what a test asks for."""
        if method == "Runtime.exceptionThrown":
            self.problems.append(event["exceptionDetails"].get("exception", {}).get("description"))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning"):
            words = (str(a.get("description", a.get("value"))) for a in event["args"])
            self.problems.append(" ".join(words))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.problems.append(event["entry"]["text"] + " " + event["entry"].get("url", ""))
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])

    def size(self, width, height, *, dark=False, touch=False):
        """Set the size of the window and the colours that the system prefers."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=touch,
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def open(self, url):
        """Load a page."""
        self.send("Page.navigate", url=url)

    def ask(self, expression):
        """The value of a JavaScript expression on the page."""
        found = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def wait(self, expression):
        """Wait until a JavaScript expression is true, and return its value."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            found = self.ask(f"document.readyState === 'complete' && ({expression})")
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"never true: {expression}; problems: {self.problems}")

    def key(self, key):
        """Press and release a key."""
        codes = {"Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        code = {"windowsVirtualKeyCode": codes.get(key, 0)}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, **code)

    def move(self, x, y):
        """Put the mouse at a place in the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path, *, whole=False):
        """Write a PNG of the window, or of the whole page."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        with open(path, "wb") as file:
            file.write(base64.b64decode(shot["data"]))
