"""The report page: curves, facts and pictures in one file that needs nothing else."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from anima_fast.reports.charts import MOST_POINTS, Series, axis_number, chart, ticks
from anima_fast.reports.reading import read_log
from anima_fast.reports.run_page import preview_table, report_run, write_report
from anima_fast.sampling.pictures import save_png


def log_file(path, count=30):
    lines = [
        {
            "kind": "step", "step": step, "epoch": 1, "loss": 1 / step, "loss_avg": 1 / step,
            "lr": {"unet": 1e-4 * step, "text_encoder": 1e-5}, "step_s": 0.5, "wait_s": 0.2,
            "memory_mib": 100.0,
        }
        for step in range(1, count + 1)
    ]  # fmt: skip
    lines[3]["loss"] = None
    lines.append({"kind": "validation", "step": count, "epoch": 1, "loss": 0.2})
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"kind": "step", "st'
    path.write_text(text, encoding="utf-8")
    return path


def page(tmp_path, **changes):
    values = {"title": "a < b", "facts": {"LoRA": "x & y"}, "log": log_file(tmp_path / "log.jsonl")}
    path = write_report(tmp_path / "report.html", **{**values, **changes})
    return path.read_text(encoding="utf-8")


def svgs(text):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]


def test_one_chart_for_loss_rate_speed_and_memory(tmp_path):
    charts = svgs(page(tmp_path))
    titles = [chart.attrib["aria-label"] for chart in charts]
    assert titles == ["Loss", "Learning rate", "Seconds per step", "Peak memory in MiB"]
    loss, rate, seconds, _ = charts
    assert len(loss.findall("polyline")) == 2 and len(loss.findall("circle")) == 1
    words = [text.text for text in rate.findall("text")]
    assert {"unet", "text_encoder"} <= set(words)
    # One loss is not known, and the first step's time is left out.
    assert len(loss.find("polyline").attrib["points"].split()) == 29
    steps = [line.attrib["points"].split() for line in seconds.findall("polyline")]
    assert list(map(len, steps)) == [29, 29]


def test_the_page_needs_nothing_else(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg")
    pictures = {'"quoted" <b>': tmp_path / "a.png", "b": tmp_path / "b.jpg"}
    text = page(tmp_path, galleries={"Before": pictures})
    found = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag not in ("script", "link", "iframe")
            found.extend(v for k, v in attributes if k in ("src", "href"))

    Links().feed(text)
    assert [link.split(";")[0] for link in found] == ["data:image/png", "data:image/jpeg"]
    assert "url(" not in text and "@import" not in text


def test_text_is_escaped(tmp_path):
    text = page(tmp_path, lead="<script>")
    assert "a &lt; b" in text and "x &amp; y" in text and "<script>" not in text


def test_a_cut_off_line_is_left_out(tmp_path):
    assert len(read_log(log_file(tmp_path / "log.jsonl"))) == 31
    assert read_log(tmp_path / "absent.jsonl") == []
    assert "No step was logged" in page(tmp_path, log=tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe", b'{"kind": "step", "step": "3"}', b'{"kind": "step", "step": NaN}',
     b'{"kind": "step", "step": true}', b"[" * 5000, b'{"kind": "step", "step": null}'],
)  # fmt: skip
def test_a_line_that_makes_no_sense_is_left_out(tmp_path, line):
    log = log_file(tmp_path / "log.jsonl")
    log.write_bytes(line + b"\n" + log.read_bytes())
    assert len(read_log(log)) == 31 and "<polyline" in page(tmp_path, log=log)


def test_long_names_make_the_legend_higher_and_leave_the_lines_their_room():
    few, many = (
        ElementTree.fromstring(chart("t", [Series(f"group {i}", [(1, 1), (2, 3)]) for i in names]))
        for names in (range(2), range(9))
    )
    heights = [float(svg.attrib["viewBox"].split()[3]) for svg in (few, many)]
    spans = []
    for svg in (few, many):
        ends = svg.find("polyline").attrib["points"].replace(",", " ").split()
        spans.append(float(ends[1]) - float(ends[3]))
        assert max(float(t.attrib["y"]) for t in svg.findall("text")) < heights[len(spans) - 1]
    assert spans[0] == spans[1] and heights[0] < heights[1]


def test_memory_of_a_card_is_in_gib_and_starts_at_nothing(tmp_path):
    steps = [{"kind": "step", "step": i, "memory_mib": 11_240 + i} for i in (1, 2)]
    log = tmp_path / "card.jsonl"
    log.write_text("\n".join(map(json.dumps, steps)), encoding="utf-8")
    memory = svgs(page(tmp_path, log=log))[-1]
    assert memory.attrib["aria-label"] == "Peak memory in GiB"
    assert "0" in [text.text for text in memory.findall("text")]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1.5e-4, "1.5e-4"), (12_000, "12000"), (0.1 + 0.2, "0.3")]
)
def test_numbers_of_an_axis_are_short(value, text):
    assert axis_number(value) == text


def test_many_points_are_averaged():
    series = Series("a", [(x, float(x % 2)) for x in range(100_000)])
    known = series.known()
    assert len(known) <= MOST_POINTS
    assert all(y == pytest.approx(0.5, abs=0.01) for _, y in known)


def test_unknown_numbers_are_left_out():
    assert Series("a", [(1, None), (2, math.nan), (3, math.inf), (4, 1.0)]).known() == [(4, 1.0)]
    assert "not known" in chart("Loss", [Series("a", [(1, None)])])


def test_larger_values_stand_higher_and_later_ones_further_right():
    svg = ElementTree.fromstring(chart("t", [Series("a", [(1, 1.0), (2, 3.0), (9, 2.0)])]))
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]
    (x1, y1), (x2, y2), (x3, y3) = points
    assert x1 < x2 < x3 and y2 < y3 < y1
    assert (x2 - x1) * 7 == pytest.approx(x3 - x2, rel=0.01)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (-3, 17), (1e-4, 1.0001e-4), (5, 5), (0, 0), (0.97, 1234), (0.1, 0.10000000000000002)],
)
def test_ticks_are_round_and_enclose_the_values(low, high):
    found = ticks(low, high, 5)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 8
    step = found[1] - found[0]
    assert float(f"{step:.6e}".split("e")[0]) in (1, 2, 5)


def test_previews_stand_over_time_and_losses_by_sigma(tmp_path):
    """A row for each prompt, a column for each time; pictures that are gone leave their place."""
    (tmp_path / "sample").mkdir()
    lines = [{"kind": "step", "step": i, "loss": 1.0} for i in (1, 2)]
    for step in (0, 10, 20):
        files = []
        for row, prompt in enumerate(("a cat <b>", "a dog")):
            name = f"sample/{step}_{row}.png"
            image = Image.new("RGB", (640, 480), (step * 10, 0, 0))
            save_png(tmp_path / name, image, f"{prompt}\nSteps: 3")
            files.append(name)
        lines.append({"kind": "preview", "step": step, "epoch": 1, "files": files})
    (tmp_path / "sample" / "10_1.png").unlink()
    (tmp_path / "sample" / "20_0.png").write_bytes(b"broken")
    per_sigma = {"0.2": 1.0, "0.8": 2.0}
    lines.append({"kind": "validation", "step": 2, "loss": 1.5, "per_sigma": per_sigma})
    means, counts = [1.0, None, *[2.0] * 8], [1, 0, *[1] * 8]
    lines.append({"kind": "sigma_bins", "step": 2, "epoch": 1, "means": means, "counts": counts})
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    page = write_report(tmp_path / "r.html", title="t", facts={}, log=log).read_text("utf-8")
    grid = page[page.index("<h2>Previews</h2>") :]
    assert [f"step {step}" in grid for step in (0, 10, 20)] == [True] * 3
    assert grid.count("<img") == 4 and "a cat &lt;b&gt;" in grid and "a dog" in grid
    assert "Validation loss by sigma" in page and "sigma 0.8" in page
    bars = page[page.index("Training loss by sigma") : page.index("Validation loss by sigma")]
    assert bars.count("<rect") == 9


def test_rows_of_previews_follow_the_prompts(tmp_path):
    """The file of prompts lost its first line after step 1; two prompts are alike."""
    records = []
    for step, prompts in enumerate((["cat", "dog", "dog"], ["dog", "dog", "fox\nbrown"])):
        files = [f"{step}_{i}.png" for i in range(3)]
        for name, prompt in zip(files, prompts, strict=True):
            save_png(tmp_path / name, Image.new("RGB", (8, 8)), f"{prompt}\nSteps: 3, Seed: {step}")
        records.append({"kind": "preview", "step": step, "files": files})
    rows = preview_table(records, tmp_path)["rows"]
    assert [prompt for prompt, _ in rows] == ["cat", "dog", "dog", "fox"]
    shown = [[picture is not None for picture in pictures] for _, pictures in rows]
    assert shown == [[True, False], [True, True], [True, True], [False, True]]


def test_many_previews_are_thinned_out(tmp_path):
    records = [{"kind": "preview", "step": i, "files": ["sample/x.png"]} for i in range(40)]
    log = tmp_path / "previews.jsonl"
    log.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    grid = page(tmp_path, log=log)
    assert grid.count("<th>step ") == 12 and "28 more" in grid
    assert "<th>step 0</th>" in grid and "<th>step 39</th>" in grid


def test_a_run_that_has_ended_is_told_in_its_folder(tmp_path):
    log = log_file(tmp_path / "log.jsonl")
    facts = {"kind": "LoRA training", "facts": {"rank, alpha": "8, 8"}, "base_model": "a/base.st",
             "optimizer": "AdamW", "precision": "bf16", "output": tmp_path / "x.safetensors",
             "log": log, "steps": 30}  # fmt: skip
    path = report_run("mika", **facts, loss=0.5)
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "report.html" and "finished." in text
    rows = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", text))
    assert rows == {
        "saved file": "x.safetensors", "steps": "30", "loss (average over an epoch)": "0.5000",
        "base model": "base.st", "rank, alpha": "8, 8", "optimizer": "AdamW", "precision": "bf16",
        "all options": "mika.toml",
    }  # fmt: skip
    text = report_run("mika", **facts, loss=None, interrupted_by=15).read_text(encoding="utf-8")
    assert "stopped by signal 15" in text and "<td>-</td>" in text


def test_the_wheel_holds_the_templates():
    """Files of the package that are not Python come from the list in pyproject.toml."""
    root = Path(__file__).parent.parent
    packaged = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert '"anima_fast.reports" = ["templates/*"]' in packaged
    folder = root / "anima_fast" / "reports" / "templates"
    assert {"style.css", "page.html.j2", "run.html.j2", "dataset.html.j2"} <= {
        path.name for path in folder.iterdir()
    }
