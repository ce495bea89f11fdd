"""What the tests of the page of `anima-fast watch` ask a browser."""

import threading

from anima_fast.reports.watch.run import WatchedRun
from anima_fast.reports.watch.server import WatchServer

LOADED = "document.documentElement.dataset.loaded === 'yes'"
DESK, PHONE = (1280, 900), (390, 844)


class Served:
    """A server on a thread that can be ended and started again on its port."""

    def __init__(self, out):
        self.out, self.port = out, 0
        self.start()

    def start(self):
        self.server = WatchServer(WatchedRun(self.out), self.port)
        self.port, self.url = self.server.port, self.server.url
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


def open_page(browser, served, size=DESK, dark=False):
    # What the page of the test before still asks its ended server for is no problem of this one.
    browser.open("about:blank")
    browser.wait("location.href === 'about:blank'")
    browser.problems.clear()
    browser.requests.clear()
    browser.size(*size, dark=dark)
    browser.open(served.url)
    browser.wait(LOADED)


def follow(browser, expression):
    """Wait for something that an answer brings, without the two seconds between two questions."""
    # A tab that comes to the front asks at once.
    now = "document.dispatchEvent(new Event('visibilitychange'))"
    return browser.wait(f"({now}, {expression})")


def text(browser, selector):
    return browser.ask(f"document.querySelector({selector!r}).textContent").strip()


def path_points(browser, selector):
    """How many points the line of a chart has."""
    found = browser.ask(f"document.querySelector({selector!r})?.getAttribute('d') ?? ''")
    return found.count("L") + found.count("M")


VISIBLE = """(selector) => [...document.querySelectorAll(selector)].filter((one) => {
  const box = one.getBoundingClientRect();
  return box.width > 0 && box.height > 0 && getComputedStyle(one).visibility === "visible";
}).length"""


def visible(browser, selector):
    return browser.ask(f"({VISIBLE})({selector!r})")


# Elements that stick out of the window, unless they scroll inside a box of their own.
STICKING_OUT = """[...document.querySelectorAll("body *")].filter((one) => {
  const box = one.getBoundingClientRect();
  if (box.width < 2 || box.right <= innerWidth + 1) return false;
  for (let up = one; up; up = up.parentElement)
    if (["auto", "scroll", "hidden", "clip"].includes(getComputedStyle(up).overflowX)) return false;
  return true;
}).map((one) => one.tagName + "#" + one.id + "." + one.className)"""

# The smallest contrast of any text with the colour below it (WCAG 2), and whose it is.
CONTRAST = """(() => {
  const paint = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
    .getContext("2d", { willReadFrequently: true });
  const rgb = (colors) => {
    paint.clearRect(0, 0, 1, 1);
    for (const color of colors) { paint.fillStyle = color; paint.fillRect(0, 0, 1, 1); }
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (c) => c.map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const under = (one) => {
    const colors = [];
    for (let up = one; up; up = up.parentElement)
      colors.unshift(getComputedStyle(up).backgroundColor);
    return colors;
  };
  let worst = [99, ""];
  for (const one of document.querySelectorAll("main *, header *, footer *")) {
    const own = [...one.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !one.checkVisibility()) continue;
    if (one.closest(".skip, .visually-hidden, :disabled")) continue;
    const style = getComputedStyle(one);
    const back = under(one);
    const front = one instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(rgb(back)), light(rgb([...back, front]))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const name = `${one.tagName}.${one.className?.baseVal ?? one.className}`;
    if (ratio < worst[0]) worst = [ratio, name];
  }
  return worst;
})()"""
