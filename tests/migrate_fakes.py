"""The folder of sources that the tests of importing share."""

import shutil
from pathlib import Path

SOURCES = Path(__file__).parent / "migrate_sources"


def enter_sources(tmp_path, monkeypatch):
    """A folder with all sources and a folder of pictures, and it is the current one."""
    shutil.copytree(SOURCES, tmp_path / "w")
    (tmp_path / "w" / "pictures").mkdir()
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setenv("ANIMA_FAST_HOME", str(tmp_path / "home"))
    return tmp_path / "w"


def flat(text):
    return " ".join(text.split())
