"""The documentation: its links lead somewhere, its commands and files are understood."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from anima_fast.bench.compare import SAME, compare, limits_of
from anima_fast.bench.metrics import METRICS
from anima_fast.bench.run_file import Measurement, read_run
from anima_fast.cli import app
from anima_fast.files import parse_config
from anima_fast.options.dataset_keys import check_config
from anima_fast.options.files import resolve_train_options

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = "\n".join(
    path.read_text(encoding="utf-8") for path in sorted((ROOT / "anima_fast").rglob("*.py"))
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def page_id(path):
    return str(path.relative_to(ROOT))


def prose(page):
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """Names that headings get on GitHub and in mkdocs alike."""
    found = set()
    for title in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[`*]", "", title.strip().lower())
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def blocks(page, *languages):
    text = page.read_text(encoding="utf-8")
    return [body for language, body in FENCE.findall(text) if language in languages]


def commands(page):
    """The words of every `anima-fast` command in a page's code blocks."""
    for body in blocks(page, "bash", "sh", "powershell", "console"):
        joined = re.sub(r"[ \t]*[\\^`]\n\s*", " ", body)
        for line in joined.splitlines():
            line = re.sub(r"^(\$|>|(sudo )?)\s*", "", line.strip())
            line = re.sub(r"^python -m anima_fast\b", "anima-fast", line)
            if line.startswith("anima-fast "):
                yield shlex.split(line, comments=True)[1:]


ALL_COMMANDS = [
    pytest.param(words, id=f"{page_id(page)}: {' '.join(words)[:60]}")
    for page in PAGES
    for words in commands(page)
]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_commands_are_understood(words, monkeypatch):
    """The command exists and takes these options with these values."""
    command, context = typer.main.get_command(app), None
    rest = list(words)
    while isinstance(command, typer.core.TyperGroup):
        # `parity` is a command, and a group.
        if context is not None and command.invoke_without_command and rest[:1] != ["precision"]:
            break
        name = rest.pop(0)
        context = typer.Context(command, parent=context, info_name=name)
        found = command.get_command(context, name)
        assert found is not None, f"there is no command {name}"
        command = found
    context = command.make_context(command.name, rest, parent=context)
    if isinstance(context.obj, dict) and command.name in ("train", "finetune"):
        values = {k: v for k, v in context.obj.items() if k not in ("config_file", "output_config")}
        if command.name == "train":
            resolve_train_options(values, None, complete=False)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_shown_are_valid(page, tmp_path):
    """TOML blocks parse; those of datasets pass the schema."""
    for body in blocks(page, "toml"):
        content = parse_config(body, page.name)
        if "datasets" in content:
            check_config(content, page.name)


def test_every_page_is_in_the_navigation_and_exists():
    class Loader(yaml.SafeLoader):
        pass

    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def files(entry):
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [file for value in values for file in files(value)]

    listed = files(config["nav"])
    present = [str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(present)


def test_every_command_is_documented():
    command = typer.main.get_command(app)
    shown = {words[0] for page in PAGES for words in commands(page)}
    hidden = {name for name, sub in command.commands.items() if sub.hidden}
    assert set(command.commands) - hidden <= shown


def test_troubleshooting_quotes_real_messages():
    """Each heading in code font is a part of a message in the sources."""
    page = ROOT / "docs" / "troubleshooting.md"
    quoted = re.findall(r"^### `(.+)`$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) >= 20
    # Messages are split over lines in the code.
    joined = re.sub(r'"\s*\n\s*f?"', "", SOURCES)
    for message in quoted:
        parts = [part for part in re.split(r"\s*…\s*", message) if part]
        assert all(part in joined for part in parts), message


RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.*"))


@pytest.mark.parametrize("path", RESULTS, ids=page_id)
def test_stored_results_are_run_files_that_the_page_names(path):
    run = read_run(path)
    assert run.rows and {c.verdict for c in compare(run, run, limits_of(()))} == {SAME}
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"`benchmarks/results/{path.parent.name}/" in page


def test_the_run_file_is_described_whole():
    page = (ROOT / "docs" / "benchmarking.md").read_text(encoding="utf-8")
    described = page.partition("## The run file")[2]
    for name in (*METRICS, *Measurement.__dataclass_fields__):
        assert f"`{name}`" in described, name


def test_nothing_in_the_repository_leads_outside():
    for page in PAGES:
        assert not re.search(r"\.\./shared|/work/|/root/", page.read_text(encoding="utf-8")), page


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "site" / "index.html").exists()
