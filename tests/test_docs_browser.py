"""The built pages: links inside them, the texts of their pictures, and what a browser makes of them.

`make docs-check` builds the pages and names their folder in DOCS_HTML. The browser is Debian's Chromium, or Chrome; it is
given no network. It leaves a picture of each page at each width in ``screenshots`` beside that folder.
"""

import base64
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = {1280: 800, 390: 844}  # pixels, with the heights of a desktop's and a phone's window
TALLEST = 12_000  # pixels of a page in its picture

# Run in a page: everything that is asserted of what it looks like.
LOOK = r"""
(async () => {
  if (window.MathJax) await MathJax.startup.promise;
  await document.fonts.ready;
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));

  const root = document.documentElement;
  const right = e => Math.round(e.getBoundingClientRect().right);
  const name = e => [e.tagName.toLowerCase(), ...e.classList].join(".");
  const apart = e => e !== null && e !== root  // in a box that scrolls, or outside of the flow
    && (getComputedStyle(e).overflowX !== "visible" || getComputedStyle(e).position === "fixed" || apart(e.parentElement));
  const wide = [...document.body.querySelectorAll("*")]
    .filter(e => right(e) > innerWidth && getComputedStyle(e).position !== "fixed" && !apart(e.parentElement));

  const unset = e => !e.querySelector("mjx-container") || e.querySelector("mjx-merror, [data-mjx-error]");
  const raw = [], texts = document.createTreeWalker(document.querySelector("article") ?? document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const {data, parentElement} = texts.currentNode;
    if (/\$[^$]+\$|\\[([]|\\begin/.test(data) && !parentElement.closest("pre, code, script, style, mjx-container")) raw.push(data);
  }

  const formulas = [...document.querySelectorAll(".math")];
  return {
    inner: innerWidth,
    width: root.scrollWidth,
    height: root.scrollHeight,
    widest: wide.sort((a, b) => right(b) - right(a)).slice(0, 3).map(e => `${name(e)} to ${right(e)}`).join(", "),
    formulas: formulas.length,
    faults: {
      "picture not loaded": [...document.images].filter(i => !i.naturalWidth).map(i => i.src),
      "formula not set": formulas.filter(unset).map(e => e.textContent),
      "formula in words": raw,
    },
  };
})()
"""


class Page(HTMLParser):
    """One HTML file: its language, what can be jumped to, what it refers to, and its pictures."""

    def __init__(self, path: Path):
        super().__init__()
        self.lang, self.ids, self.targets, self.links, self.images = None, {""}, [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "html":
            self.lang = found.get("lang")
        if tag == "img":
            self.images.append((found.get("src"), found.get("alt") or ""))
        self.ids.update(filter(None, (found.get("id"), found.get("name") if tag == "a" else None)))
        self.targets += [found[key] for key in ("href", "src") if found.get(key)]
        self.links += [found.get("href") or ""] if tag == "a" else []


class Browser:
    """Chromium, told what to do in DevTools' protocol through two pipes: JSON, a zero byte after each message."""

    def __init__(self, profile: Path):
        (orders, self.orders), (self.answers, answers) = os.pipe(), os.pipe()
        flags = (
            "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking hide-scrollbars"
        )
        flags += " disable-component-update disable-sync remote-debugging-pipe"
        options = [f"--{flag}" for flag in flags.split()]
        options += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND"]  # no network
        # it reads from descriptor 3 and writes to 4
        command = ["bash", "-c", f'exec "$@" 3<&{orders} 4>&{answers}', "bash", CHROMIUM, *options]
        self.process = subprocess.Popen(command, pass_fds=(orders, answers), stderr=subprocess.DEVNULL)
        os.close(orders), os.close(answers)
        self.rest, self.sent, self.session, self.events = b"", 0, {}, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def close(self) -> None:
        os.close(self.orders)  # whereupon it ends
        self.process.wait()
        os.close(self.answers)

    def read(self) -> dict:
        while b"\0" not in self.rest:
            part = os.read(self.answers, 1 << 20)
            if not part:
                raise RuntimeError(f"{CHROMIUM} ended")
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def __call__(self, method: str, **params) -> dict:
        """The answer to a command; events that come before it are kept."""
        self.sent += 1
        os.write(
            self.orders,
            json.dumps({"id": self.sent, "method": method, "params": params, **self.session}).encode() + b"\0",
        )
        while (message := self.read()).get("id") != self.sent:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def wait(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self.read())

    def look(self, path: Path, width: int) -> dict:
        """A page in a window of that width: what LOOK measures, and what went wrong on the way."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=WIDTHS[width], deviceScaleFactor=1, mobile=False)
        self.events = []
        self("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")
        answer = self("Runtime.evaluate", expression=LOOK, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{path}: {answer['exceptionDetails']}")
        seen = answer["result"]["value"]
        errors = seen["faults"]["error"] = []
        asked = seen["faults"]["asked of a network"] = []
        for event in self.events:
            about = event.get("params", {})
            match event.get("method"):
                case "Runtime.exceptionThrown":
                    errors.append(about["exceptionDetails"].get("exception", {}).get("description", "an exception"))
                case "Runtime.consoleAPICalled" if about["type"] == "error":
                    errors.append(str([part.get("value") for part in about["args"]]))
                case "Log.entryAdded" if about["entry"]["level"] == "error":
                    errors.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
                case "Network.requestWillBeSent" if not about["request"]["url"].startswith(("file:", "data:")):
                    asked.append(about["request"]["url"])
        return seen

    def picture(self, file: Path, width: int, height: int) -> None:
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, TALLEST), "scale": 1}
        shot = self("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="module")
def html() -> Path:
    folder = os.environ.get("DOCS_HTML")
    if not folder:
        pytest.skip("no built pages (DOCS_HTML): make docs-check")
    return Path(folder).resolve()


@pytest.fixture(scope="module")
def pages(html: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(html.rglob("*.html")) if "_static" not in path.parts}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    if not CHROMIUM:
        pytest.skip("no Chromium or Chrome on the PATH: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def test_every_link_inside_leads_somewhere(html, pages):
    broken, checked = [], 0
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            checked += 1
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not (file.is_file() and file.is_relative_to(html)):
                broken.append(f"{path.relative_to(html)}: {target}")
            elif file in pages and unquote(parts.fragment) not in pages[file].ids:
                broken.append(f"{path.relative_to(html)}: {target}, no such place")
    assert not broken, "\n".join(broken)
    assert checked > 1000


def test_every_picture_has_a_text(html, pages):
    pictures = {
        (path.relative_to(html).as_posix(), src): alt for path, page in pages.items() for src, alt in page.images
    }
    silent = {key: alt for key, alt in pictures.items() if len(alt) < 8 or Path(unquote(key[1])).name in alt}
    assert not silent
    assert len(pictures) > 30


def test_pages_say_their_language(html, pages):
    for path, page in pages.items():
        chinese = path.relative_to(html).parts[0] == "zh"
        assert page.lang == ("zh-Hans" if chinese else "en"), path
        other = html / ("course" if chinese else "zh") / path.name
        if path.parent.name in ("course", "zh") and other in pages:  # each of the two leads to the other
            assert any((path.parent / target).resolve() == other for target in page.links), path


@pytest.mark.timeout(600)
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_in_a_browser(browser, html, pages, width):
    faults, formulas = [], 0
    for path in pages:
        page = path.relative_to(html)
        seen = browser.look(path, width)
        browser.picture((html.parent / "screenshots" / str(width) / page).with_suffix(".png"), width, seen["height"])
        assert seen["inner"] == width
        formulas += seen["formulas"]
        if seen["width"] > width:
            faults.append(f"{page}: {seen['width']} pixels wide: {seen['widest']}")
        faults += [f"{page}: {what}: {item}" for what, items in seen["faults"].items() for item in items]
    assert not faults, "\n".join(faults)
    assert formulas > 200
