"""The table of planted errors applies to this checkout, and planting one works."""

import pytest

from benchmarks import plant
from benchmarks.plants import PLANTS, Plant


@pytest.mark.parametrize("row", PLANTS, ids=lambda row: row.name)
def test_every_row_applies(row):
    text = plant.text_of(row, plant.ROOT)
    assert text.replace(row.right, row.wrong) != text


def test_names_are_unique_and_some_are_quick():
    assert len({row.name for row in PLANTS}) == len(PLANTS) > 30
    assert 3 < sum(row.quick for row in PLANTS) < 12


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of one file, with a check that sees its error and one that does not."""
    rows = {
        name: Plant(name, "a.py", "x = 1", "x = 2", check)
        for name, check in (("seen", "careful"), ("unseen", "blind"), ("fell", "broken"))
    }
    (tmp_path / "a.py").write_text("x = 1\n")

    def run_check(check, folder):
        changed = "x = 2" in (folder / "a.py").read_text()
        if check == "broken":
            return 1, "Traceback"
        return (1, "worse    a: 1 -> 2") if changed and check == "careful" else (0, "right")

    monkeypatch.setattr(plant, "ROOT", tmp_path)
    monkeypatch.setattr(plant, "run_check", run_check)
    monkeypatch.setattr(
        plant, "copy_checkout", lambda target: (target.mkdir(), (target / "a.py").write_text(
            (tmp_path / "a.py").read_text()), target)[-1]
    )  # fmt: skip
    monkeypatch.setattr(plant, "PLANTS", tuple(rows.values()))
    return tmp_path


def test_what_is_seen_is_fine(checkout, capsys):
    assert plant.main(["--only", "seen", "--only", "seen", "--jobs", "1"]) == 1
    text = capsys.readouterr().out
    assert "not seen: unseen: status 0: right" in text and "not seen: seen" not in text
    assert (checkout / "a.py").read_text() == "x = 1\n"


def test_a_check_that_falls_over_or_is_always_red_has_seen_nothing(checkout, capsys):
    assert plant.main(["--only", "fell", "--jobs", "2"]) == 1
    text = capsys.readouterr().out
    assert "fell: status 1: Traceback" in text
    assert "nothing planted: broken: red without an error" in text


def test_a_row_that_no_longer_applies_is_an_error(checkout, capsys):
    (checkout / "a.py").write_text("x = 1\nx = 1\n")
    assert plant.main([]) == 2
    assert "occurs 2 times in a.py" in capsys.readouterr().err


def test_an_unknown_name_is_an_error(checkout, capsys):
    assert plant.main(["--only", "nothing"]) == 2
    assert "no row of benchmarks/plants.py" in capsys.readouterr().err
