"""`anima-fast doctor`: what is reported, and when it fails."""

import json
import sys

import pytest
from typer.testing import CliRunner

from anima_fast.cli import app
from anima_fast.inspection import doctor
from anima_fast.models.download import DIT_FOLDER, TOKENIZERS, VAE


def test_this_machine_can_train_and_json_equals_the_report(tmp_path):
    done = CliRunner().invoke(app, ["doctor", "--json", "--models_dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["can_train"] and report["problems"] == []
    import torch

    assert report["torch"]["version"] == torch.__version__
    assert set(report["extras"]) == set(doctor.EXTRAS)
    assert report["models"]["folder"] == str(tmp_path)


def test_a_machine_without_a_card_is_warned_and_not_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = doctor.examine()
    assert report["can_train"]
    assert any("no CUDA" in text for text in report["warnings"])
    assert "warning: no CUDA" in doctor.doctor_text(report)


def test_missing_torch_fails(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    done = CliRunner().invoke(app, ["doctor", "--models-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "problem: PyTorch cannot be imported" in done.output
    assert "training cannot run" in done.output


def test_old_torch_fails_with_the_nan_hint(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.4.1+cu121")
    report = doctor.examine()
    assert not report["can_train"]
    assert any("NaN" in text for text in report["problems"])


@pytest.mark.parametrize(
    ("version", "older"),
    [("2.4.1", True), ("2.5.0", False), ("2.13.0+cpu", False), ("1.13", True), ("3.0", False)],
)
def test_versions_are_compared_as_numbers(version, older):
    assert doctor.is_older(version, (2, 5)) == older


def test_a_missing_library_fails_and_a_missing_extra_does_not(monkeypatch):
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda n: None if n == "wandb" else real(n))
    report = doctor.examine()
    assert report["can_train"]
    assert 'missing: pip install "anima-fast[wandb]"' in doctor.doctor_text(report)
    monkeypatch.setattr(doctor, "version_of", lambda n: None if n == "PIL" else real(n))
    report = doctor.examine()
    assert not report["can_train"]
    assert any("pillow is missing" in text for text in report["problems"])


def test_model_files_are_found(tmp_path):
    for file in (f"{DIT_FOLDER}/mine.safetensors", VAE):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    for name, (_, files) in TOKENIZERS.items():
        (tmp_path / name).mkdir()
        for file in files[:-1]:
            (tmp_path / name / file).write_bytes(b"x")
    found = doctor.models_report(tmp_path)
    assert found["dit"] == ["mine.safetensors"]
    assert found["vae"] and not found["text_encoder"]
    # One file of each tokenizer is still missing.
    assert not found["qwen3_tokenizer"] and not found["t5_tokenizer"]
    (tmp_path / "t5_tokenizer" / "tokenizer.json").write_bytes(b"{}")
    assert doctor.models_report(tmp_path)["t5_tokenizer"]
