"""The page of `anima-fast watch` in a real browser, at the widths of a phone and a desk."""

import os
from itertools import pairwise

import pytest
import watch_run
from browser import Browser, find_browser
from watch_page import (
    CONTRAST,
    DESK,
    LOADED,
    PHONE,
    STICKING_OUT,
    Served,
    follow,
    open_page,
    path_points,
    text,
    visible,
)
from watch_run import FakeRun

if os.name == "nt":
    pytest.skip("the browser's debugging pipe needs POSIX", allow_module_level=True)
if find_browser() is None:
    pytest.skip("no Chromium, Chrome or Edge is installed", allow_module_level=True)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def served(tmp_path):
    found = Served(tmp_path)
    yield found
    found.stop()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_run_is_shown_whole(browser, served, size, dark):
    FakeRun(served.out, steps=200, per_epoch=20).whole(130)
    open_page(browser, served, size, dark)
    assert text(browser, "#title") == "mika_style_v3" and text(browser, "#badge") == "running"
    assert text(browser, "#tile-step") == "130" and "of 200" in text(browser, "#tile-step-more")
    for chart in ("loss", "norm"):
        assert path_points(browser, f"#chart-{chart} path.line") == 130
        assert path_points(browser, f"#chart-{chart} path.faint") == 130
    # The first step reads and compiles: it is left out.
    assert path_points(browser, "#chart-speed path.line") == 129
    assert browser.ask("document.querySelectorAll('#chart-rate path.line').length") == 2
    assert path_points(browser, "#chart-memory path.line") == 130
    assert visible(browser, "#chart-loss circle.dot") == 6
    assert visible(browser, "#chart-sigma .bar-fill") == 10
    assert visible(browser, "#chart-sigma .bar-mark span") == 3
    assert visible(browser, "#chart-loss .flag") == 1
    browser.wait("[...document.images].every((one) => one.loading === 'lazy' || one.complete)")
    assert visible(browser, "#previews-body img") == 9, "three steps with three prompts"
    browser.ask("document.querySelector('#previews').scrollIntoView()")
    browser.wait("document.querySelector('#previews-body img').naturalWidth === 96")
    assert visible(browser, "#log-lines > div") == 11
    assert "out of memory" in text(browser, "#log-lines .bad")
    assert "out of memory" in text(browser, "#events-list")
    assert text(browser, "#dataset-count") == "48 images"
    assert visible(browser, "#dataset tbody tr") == 5 and visible(browser, "#dataset summary") == 3
    assert browser.ask("document.scrollingElement.scrollWidth <= innerWidth")
    assert browser.ask(STICKING_OUT) == []
    ratio, where = browser.ask(CONTRAST)
    assert ratio >= 4.5, where
    lightness = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, lightness.strip("rgb()").split(","))) < 150) == dark
    assert browser.problems == []
    assert all(url.startswith(served.url) for url in browser.requests)


def test_no_unlabelled_control(browser, served):
    FakeRun(served.out, steps=40, per_epoch=10).whole(40)
    open_page(browser, served)
    browser.ask("document.querySelector('#previews-view button:nth-child(2)').click()")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "slider", "checkbox", "image", "progressbar", "log", "dialog", "link"}
    seen = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored") and node.get("role", {}).get("value") in roles
    ]
    assert len(seen) > 15 and [role for role, name in seen if not name.strip()] == []


def test_it_follows_a_run_from_before_its_start_to_its_end(browser, served):
    open_page(browser, served, PHONE)
    assert text(browser, "#badge") == "waiting" and "Waiting for a run" in text(
        browser, "#chart-loss"
    )
    assert visible(browser, "#chart-loss path.line") == 0
    shifts = """new PerformanceObserver((list) => {
      for (const one of list.getEntries()) window.shifted = (window.shifted ?? 0) + one.value;
    }).observe({ type: "layout-shift" })"""
    fake = FakeRun(served.out, steps=60, per_epoch=20)
    fake.say("reading data")
    follow(browser, "document.querySelector('#badge').textContent === 'preparing'")
    fake.run_file()
    fake.advance(10)
    follow(browser, "document.querySelector('#tile-step').textContent === '10'")
    assert text(browser, "#badge") == "running"
    assert path_points(browser, "#chart-loss path.line") == 10
    browser.ask(shifts)
    browser.ask("document.querySelector('#log-lines').scrollTop = 0")
    fake.advance(9)
    for n in range(40):
        fake.say(f"line {n}")
    follow(browser, "document.querySelector('#tile-step').textContent === '19'")
    assert path_points(browser, "#chart-loss path.line") == 19
    log = "document.querySelector('#log-lines')"
    browser.wait(
        f"{log}.scrollTop > 0 && {log}.scrollTop + {log}.clientHeight >= {log}.scrollHeight - 2"
    )
    # Scrolled up, the log stays where the reader is.
    browser.ask(f"{log}.scrollTop = 40")
    browser.wait("!document.querySelector('#log-newest').hidden")
    fake.say("the newest line")
    follow(browser, f"{log}.textContent.includes('the newest line')")
    assert browser.ask(f"{log}.scrollTop") == 40
    browser.ask("document.querySelector('#log-newest').click()")
    browser.wait(f"{log}.scrollTop + {log}.clientHeight >= {log}.scrollHeight - 2")
    assert browser.ask("window.shifted ?? 0") < 0.05
    fake.run_file(state="failed", error="the disk is full: free some space")
    follow(browser, "document.querySelector('#badge').textContent === 'failed'")
    assert "the disk is full" in text(browser, "#banner")
    assert browser.ask("document.title").startswith("failed")
    assert browser.problems == []


def test_it_lives_through_a_restart_of_the_server_and_of_the_run(browser, served):
    fake = FakeRun(served.out, steps=60, per_epoch=20)
    fake.run_file()
    fake.advance(5)
    open_page(browser, served)
    served.stop()
    follow(browser, "document.querySelector('#badge').textContent === 'not connected'")
    assert "Start anima-fast watch again" in text(browser, "#banner")
    fake.advance(5)
    served.start()
    follow(browser, "document.querySelector('#tile-step').textContent === '10'")
    assert (
        text(browser, "#badge") == "running" and path_points(browser, "#chart-loss path.line") == 10
    )
    # A fresh run in the same folder.
    os.replace(served.out / "log.jsonl", served.out / "log.previous.jsonl")
    again = FakeRun(served.out, steps=60, per_epoch=20)
    again.run_file(output_name="second")
    again.advance(3)
    follow(browser, "document.querySelector('#title').textContent === 'second'")
    follow(browser, "document.querySelector('#tile-step').textContent === '3'")
    assert path_points(browser, "#chart-loss path.line") == 3


def test_curves_are_read_with_mouse_and_keys(browser, served):
    FakeRun(served.out, steps=200, per_epoch=20).whole(101)
    open_page(browser, served)
    box = "document.querySelector('#chart-loss svg').getBoundingClientRect()"
    left, top, width = browser.ask(f"[{box}.left, {box}.top, {box}.width]")
    # The plot lies between margins of 54 and 14 pixels: its middle is step 51.
    browser.move(left + 54 + (width - 68) / 2, top + 80)
    browser.wait("document.querySelector('#chart-loss .where').textContent === 'step 51'")
    assert text(browser, "#chart-rate .where") == "step 51", "all charts show the same step"
    first = browser.ask("document.querySelector('#chart-loss .legend b').textContent")
    record = served.server.run.log.steps.answer()["columns"]["loss"]["mean"][50]
    assert float(first) == pytest.approx(record, abs=6e-4)
    browser.move(5, 5)
    browser.wait("document.querySelector('#chart-loss .where').textContent === ''")
    browser.ask("document.querySelector('#chart-rate svg').focus()")
    browser.key("ArrowLeft")
    browser.key("ArrowLeft")
    browser.wait("document.querySelector('#chart-loss .where').textContent === 'step 100'")
    assert "unet" in text(browser, "#read-out")
    browser.key("Escape")
    browser.wait("document.querySelector('#chart-loss .where').textContent === ''")


# Left edge, right edge of each number below the curve of the loss.
STEPS = """[...document.querySelectorAll("#chart-loss svg > text")]
  .filter((one) => one.getAttribute("y") > one.ownerSVGElement.clientHeight - 8)
  .map((one) => one.getBoundingClientRect()).map((box) => [box.left, box.right])"""


@pytest.mark.parametrize(
    ("stride", "smoothing"), [(1, "10 steps"), (5, "50 steps"), (550, "1,000 steps")]
)
def test_a_longer_run_is_averaged_over_more_steps(browser, served, stride, smoothing):
    """And the steps below the curve do not run into each other on a phone."""
    run = FakeRun(served.out, steps=91)
    for _ in range(91):
        record = run.record()
        run.log(record | {"step": record["step"] * stride})
    open_page(browser, served, PHONE)
    assert text(browser, "#smooth-text") == smoothing
    places = {"10 steps": "2", "50 steps": "4", "1,000 steps": "8"}
    assert browser.ask("document.querySelector('#smooth').value") == places[smoothing]
    boxes = browser.ask(STEPS)
    assert len(boxes) >= 2
    assert all(a[1] + 4 < b[0] for a, b in pairwise(boxes)), boxes
    assert browser.problems == []


def test_tools_change_the_curves(browser, served):
    FakeRun(served.out, steps=200, per_epoch=20).whole(101)
    open_page(browser, served)
    line = "document.querySelector('#chart-loss path.line').getAttribute('d')"
    before = browser.ask(line)
    slide = (
        "Object.assign(document.querySelector('#smooth'), {value: %d})"
        ".dispatchEvent(new Event('input'))"
    )
    browser.ask(slide % 0)
    assert (
        text(browser, "#smooth-text") == "off" and visible(browser, "#chart-loss path.faint") == 0
    )
    browser.ask(slide % 7)
    assert text(browser, "#smooth-text") == "500 steps" and browser.ask(line) != before
    browser.ask("document.querySelector('#raw').click()")
    assert visible(browser, "#chart-loss path.faint") == 0
    linear = browser.ask(line)
    browser.ask("document.querySelector('#logarithm').click()")
    assert browser.ask(line) != linear
    browser.ask("document.querySelector('[data-part=\"0.1\"]').click()")
    labels = "[...document.querySelectorAll('#chart-loss text')].map((one) => one.textContent)"
    assert "100" in browser.ask(labels) and "20" not in browser.ask(labels)
    browser.open(served.url)
    browser.wait(LOADED)
    assert text(browser, "#smooth-text") == "500 steps", "the choice is kept"
    browser.ask("localStorage.clear()")
    theme = "document.documentElement.dataset.theme ?? 'system'"
    for expected in ("light", "dark", "system"):
        browser.ask("document.querySelector('#theme').click()")
        assert browser.ask(theme) == expected
    browser.ask("localStorage.clear()")
    assert browser.problems == []


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_previews_over_time_and_large(browser, served, size):
    fake = FakeRun(served.out, steps=200, per_epoch=20).whole(130)
    open_page(browser, served, size)
    heads = "[...document.querySelectorAll('#previews-body h3')].map((one) => one.textContent)"
    newest = ["step 120, epoch 6", "step 80, epoch 4", "step 40, epoch 2"]
    assert browser.ask(heads) == newest
    browser.ask("document.querySelector('#previews-body > .plain').click()")
    assert browser.ask(heads) == [*newest, "before training"]
    browser.ask("document.querySelector('#previews-view button:nth-child(2)').click()")
    assert browser.ask("document.querySelectorAll('#previews-body input').length") == 3
    slot = "document.querySelector('#previews-body figure')"
    browser.ask(f"{slot}.querySelector('img').src").index("e000006_00")
    slide = f"Object.assign({slot}.querySelector('input'), {{value: 1}})"
    browser.ask(f"{slide}.dispatchEvent(new Event('input'))")
    assert browser.ask(f"{slot}.querySelector('output').textContent") == "step 40, epoch 2"
    fake.advance(10)
    fake.preview("000140")
    follow(browser, f"{slot}.querySelector('input').max === '4'")
    # What the reader chose stays, the other prompts go on to the newest.
    assert browser.ask(f"{slot}.querySelector('output').textContent") == "step 40, epoch 2"
    other = "document.querySelectorAll('#previews-body figure')[1]"
    assert "step 140" in browser.ask(f"{other}.querySelector('output').textContent")

    browser.ask(f"{slot}.querySelector('button').click()")
    browser.wait("document.querySelector('#viewer').open")
    browser.wait("document.querySelector('#viewer-image').naturalWidth === 96")
    title = "document.querySelector('#viewer-title').textContent"
    assert browser.ask(title) == "step 40, epoch 2, seed 41, 96 × 96"
    browser.key("ArrowRight")
    assert browser.ask(title).startswith("step 80, epoch 4")
    browser.key("ArrowDown")
    assert browser.ask(title) == "step 80, epoch 4, seed 42, 64 × 96"
    assert "silver hair" in text(browser, "#viewer-prompt")
    for _ in range(9):
        browser.key("ArrowLeft")
    assert browser.ask(title).startswith("before training")
    assert browser.ask("document.querySelector('#viewer-older').disabled")
    box = "document.querySelector('#viewer-image').getBoundingClientRect()"
    left, top, right, bottom = browser.ask(f"[{box}.left, {box}.top, {box}.right, {box}.bottom]")
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    browser.key("Escape")
    browser.wait("!document.querySelector('#viewer').open")
    assert browser.ask("document.scrollingElement.scrollWidth <= innerWidth")
    assert browser.problems == []


def test_a_picture_over_time_has_its_own_prompt(browser, served, monkeypatch):
    """The file of prompts may change during a run."""
    run = FakeRun(served.out, steps=40, per_epoch=20, sizes=((64, 64),))
    run.preview("e000000")
    run.advance(20)
    monkeypatch.setattr(watch_run, "PROMPTS", ("a heron",))
    run.preview()
    open_page(browser, served)
    browser.ask("document.querySelector('#previews-view button:nth-child(2)').click()")
    assert text(browser, "#previews-body figcaption") == "a heron"
    browser.ask(
        "Object.assign(document.querySelector('#previews-body input'), {value: 0})"
        ".dispatchEvent(new Event('input'))"
    )
    assert "astronaut" in text(browser, "#previews-body figcaption")


def test_strange_files_do_no_harm(browser, served):
    """Texts are shown as texts, odd values and long words break nothing."""
    evil = "<img src=x onerror=alert(1)>&amp;" + "W" * 300
    fake = FakeRun(served.out, steps=40, per_epoch=10)
    fake.run_file(output_name=evil, method=evil, base_model=evil, device=evil, error=evil)
    fake.advance(12)
    fake.say(evil)
    fake.log({"kind": "event", "step": 5, "text": evil})
    fake.log({"kind": "sigma_bins", "step": 13, "means": [None, 0.1], "counts": []})
    fake.log({"kind": "step", "step": 13, "loss": None, "lr": {evil: 1e-4}, "step_s": None})
    fake.facts["output_name"] = "<b>& %41 #?"
    fake.preview()
    (served.out / "dataset.json").write_text(
        '{"images": null, "buckets": 7, "captions": {"missing": "x"}, "tags": [["a", 1]], '
        '"problems": [{"kind": "W%s", "file": null, "text": 3}]}' % ("w" * 300)
    )
    for size in (DESK, PHONE):
        open_page(browser, served, size)
        assert text(browser, "#title") == evil
        assert "<img src=x" in text(browser, "#log-lines") and "not finite" in text(
            browser, "#tile-loss-more"
        )
        assert visible(browser, "#dataset .tags li") == 1
        assert browser.ask("document.scrollingElement.scrollWidth <= innerWidth")
        assert browser.ask(STICKING_OUT) == []
        assert browser.problems == []


def test_a_loss_that_never_changes_is_drawn(browser, served):
    """Its smoothed values differ in their last bits, which is no range for an axis."""
    fake = FakeRun(served.out)
    fake.log(*({"kind": "step", "step": i, "loss": 0.1, "lr": {"unet": 1e-4}} for i in range(60)))
    open_page(browser, served)
    assert path_points(browser, "#chart-loss path.line") == 60
    assert path_points(browser, "#chart-rate path.line") == 60
    assert browser.problems == []


def test_the_axis_of_a_short_run_has_whole_steps(browser, served):
    FakeRun(served.out).advance(2)
    open_page(browser, served)
    marks = browser.ask(
        "[...document.querySelectorAll('#chart-loss text:not([text-anchor=end])')]"
        ".map((one) => one.textContent)"
    )
    assert marks and all(mark.isdigit() for mark in marks)


@pytest.mark.parametrize(
    "content",
    [
        '{"captions": null, "subsets": [null, 3], "tags": [1, null, ["a"]], "problems": [null]}',
        '{"captions": [], "buckets": [1, null, {"width": "<b>"}], "tags": "x"}',
        '{"problems": [{"kind": ["x"], "file": 7, "text": {}}], "images": "<b>", "uses": -1}',
    ],
)
def test_an_odd_dataset_file_is_shown_as_far_as_it_goes(browser, served, content):
    served.out.mkdir(exist_ok=True)
    (served.out / "dataset.json").write_text(content)
    open_page(browser, served)
    assert visible(browser, "#dataset .dataset") == 1 and browser.problems == []


def test_a_long_log_is_drawn_in_few_points(browser, served):
    fake = FakeRun(served.out, steps=20_000, per_epoch=1000)
    fake.run_file()
    fake.log(*(fake.record() for _ in range(9000)))
    open_page(browser, served)
    browser.wait("document.querySelector('#tile-step').textContent === '9,000'")
    assert 1000 <= path_points(browser, "#chart-loss path.line") <= 2000
    assert visible(browser, "#chart-loss path.band") == 1
    fake.advance(3)
    browser.wait("document.querySelector('#tile-step').textContent === '9,003'")
    assert browser.problems == []
