"""The report of a run in a real browser, at the widths of a phone and a desk."""

import os

import pytest
from browser import Browser, find_browser
from watch_page import DESK, PHONE, STICKING_OUT
from watch_run import FakeRun

from anima_fast.reports.run_page import write_report

if os.name == "nt":
    pytest.skip("the browser's debugging pipe needs POSIX", allow_module_level=True)
if find_browser() is None:
    pytest.skip("no Chromium, Chrome or Edge is installed", allow_module_level=True)

# The smallest letters of the charts in pixels, and texts that leave their chart.
LETTERS = """(() => {
  let smallest = 99;
  const outside = [];
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      const size = parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a;
      smallest = Math.min(smallest, size);
      if (box.left < frame.left || box.right > frame.right || box.bottom > frame.bottom)
        outside.push(text.textContent);
    }
  }
  return { smallest, outside };
})()"""


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_it_is_legible(tmp_path, size):
    run = FakeRun(tmp_path / "out", steps=200, per_epoch=20).whole(130)
    path = write_report(
        tmp_path / "report.html",
        title="mika",
        facts={"base model": "anima-base-v1.0.safetensors"},
        log=run.out / "log.jsonl",
    )
    with Browser(tmp_path / "profile") as browser:
        browser.size(*size)
        browser.open(path.as_uri())
        browser.wait("document.images.length === 12")
        found = browser.ask(LETTERS)
        assert found["smallest"] >= 10 and found["outside"] == []
        assert browser.ask(STICKING_OUT) == [] and browser.problems == []
