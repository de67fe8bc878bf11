"""A headless Chromium for tests, by the DevTools protocol over a pipe: no dependency but the browser itself.

    with Browser() as browser:
        page = browser.open(path.as_uri(), width=360, dark=True)
        page.click("#text .token:nth-child(3)")
        assert page.run("state.token") == 2 and not page.problems
"""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

PATH = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHY = "needs a Chromium: apt-get install chromium"
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync",
         "--disable-component-update", "--disable-background-networking", "--remote-debugging-pipe"]
PATIENCE = 30  # seconds for an answer
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Enter": 13, "Escape": 27,
        "Home": 36, "End": 35}


class Browser:
    """The process. It reads commands from its file descriptor 3, and writes answers to 4, each ended by a NUL."""

    def __enter__(self):
        self.folder = tempfile.mkdtemp()
        (its_end, self.write), (self.read, its_other) = os.pipe(), os.pipe()

        def place():  # in the child: from above, so that neither is overwritten before it is copied
            high = [os.dup(its_end), os.dup(its_other)]
            for fd, wanted in zip(high, (3, 4)):
                os.dup2(fd, wanted)

        self.process = subprocess.Popen([PATH, *FLAGS, f"--user-data-dir={self.folder}"], preexec_fn=place,
                                        pass_fds=(3, 4), stderr=subprocess.DEVNULL)
        os.close(its_end)
        os.close(its_other)
        self.numbers, self.rest, self.events = itertools.count(1), b"", []
        return self

    def __exit__(self, *error):
        with contextlib.suppress(Exception):
            self.ask("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.process.kill()
        os.close(self.write)
        os.close(self.read)
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, method, session=None, **parameters):
        """The result of a command, a dict. What happened meanwhile goes to `events`."""
        number = next(self.numbers)
        command = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self.write, json.dumps(command).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def message(self):
        until = time.monotonic() + PATIENCE
        while b"\0" not in self.rest:
            assert select.select([self.read], [], [], max(0, until - time.monotonic()))[0], "the browser is silent"
            data = os.read(self.read, 1 << 20)
            assert data, "the browser has ended"
            self.rest += data
        text, self.rest = self.rest.split(b"\0", 1)
        return json.loads(text)

    def open(self, address, width=1200, height=900, dark=False, touch=False, before=""):
        """A Page in a tab of its own, once it has loaded. before: a script that runs before those of the page."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.ask(f"{domain}.enable")
        page.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=touch)
        page.ask("Emulation.setTouchEmulationEnabled", enabled=touch)
        page.ask("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        page.ask("Page.addScriptToEvaluateOnNewDocument", source=before)
        page.ask("Page.navigate", url=address)
        page.until("location.href !== 'about:blank' && document.readyState === 'complete'")
        return page


class Page:
    def __init__(self, browser, session):
        self.browser, self.session = browser, session

    def ask(self, method, **parameters):
        return self.browser.ask(method, self.session, **parameters)

    def run(self, script):
        """The value of a JavaScript expression, awaited if it is a promise."""
        done = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, script):
        """Waits until an expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.01)

    def point(self, selector):
        """Moves the mouse to the middle of an element, which is scrolled into sight; returns its place."""
        place = self.run(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "center"}});
            const box = element.getClientRects()[0];
            return {{x: box.x + box.width / 2, y: box.y + box.height / 2}};
        }})()""")
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", **place)
        return place

    def click(self, selector):
        place = self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def press(self, *keys):
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key],
                         **({"text": "\r"} if key == "Enter" and kind == "keyDown" else {}))

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def picture(self, path):
        """Writes a PNG of what is in sight."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    def happened(self, method):
        """The parameters of each such event so far."""
        self.run("0")  # takes in what waits
        return [event["params"] for event in self.browser.events
                if event.get("sessionId") == self.session and event["method"] == method]

    @property
    def problems(self):
        """What the page wrote to its console, threw, or was refused."""
        return [*self.happened("Runtime.consoleAPICalled"), *self.happened("Runtime.exceptionThrown"),
                *self.happened("Log.entryAdded")]

    @property
    def requests(self):
        """The addresses that the page asked for."""
        return [event["request"]["url"] for event in self.happened("Network.requestWillBeSent")]
