import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def without_detectron2(tmp_path):
    """An environment whose Python cannot import Detectron2."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['detectron2'] = None\n")
    return os.environ | {"PYTHONPATH": str(tmp_path)}


def run(*args, **kwargs):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **kwargs)


def test_import_without_detectron2_says_what_to_run(without_detectron2):
    result = run("-c", "import fcos_d2", env=without_detectron2)
    assert result.returncode == 1
    assert "ImportError: fcos_d2 needs Detectron2" in result.stderr
    assert "pip install --no-build-isolation 'detectron2 @ git+https://" in result.stderr


def test_doctor_finds_nothing_wrong_here():
    result = run("-m", "fcos_d2.doctor")
    assert result.returncode == 0, result.stdout
    assert "All is well." in result.stdout
    assert result.stdout.count("ok  ") == 7


def test_doctor_without_detectron2(without_detectron2):
    result = run("-m", "fcos_d2.doctor", env=without_detectron2)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAIL  Detectron2's compiled ops" in result.stdout
    assert "pip install --no-build-isolation 'detectron2 @ git+https://" in result.stdout
    assert "ok    torchvision's ops" in result.stdout


def test_doctor_without_pkg_resources(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['pkg_resources'] = None\n")
    result = run("-m", "fcos_d2.doctor", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert "pip install 'setuptools<81'" in result.stdout


def test_setup_names_the_override_when_upstream_is_out_of_reach(tmp_path):
    (tmp_path / "git").write_text("#!/bin/sh\nexit 128\n")
    (tmp_path / "git").chmod(0o755)
    # Without what an outer make was told.
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "DETECTRON2", "TORCH", "TORCH_INDEX")
    env = {k: v for k, v in os.environ.items() if k not in outer}
    env["PATH"] = f"{tmp_path}{os.pathsep}{env['PATH']}"
    venv = tmp_path / "venv"
    result = subprocess.run(
        ["make", "setup", f"VENV={venv}", f"PYTHON={sys.executable}"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert "Cannot reach Detectron2's upstream repository" in result.stderr
    assert "make DETECTRON2=" in result.stderr
    assert not (venv / ".setup-complete").exists()
    assert not venv.exists()  # nothing was installed before that
