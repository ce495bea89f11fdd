"""The hooks before a commit are the tools of `make lint`, and a start of the command line."""

import shlex
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_hooks_run_the_tools_of_make_lint():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = {hook["id"]: hook["entry"] for repo in config["repos"] for hook in repo["hooks"]}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook, tool in (("lint", "ruff check"), ("format", "ruff format"), ("types", "mypy")):
        assert hooks[hook].startswith(f"python -m {tool}") and f"$(BIN)/{tool}" in makefile
    python, *words = shlex.split(hooks["smoke"])
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert python == "python" and done.returncode == 0 and "train" in done.stdout
