import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCTOR = ROOT / "tools" / "doctor.py"
REQUIREMENT = (ROOT / "fcos_d2" / "detectron2.txt").read_text().strip()
INSTALL_DETECTRON2 = f"pip install --no-build-isolation '{REQUIREMENT}'"


@pytest.fixture
def without(tmp_path):
    """Makes an environment whose Python cannot import the package of this name."""

    def make(name):
        folder = tmp_path / f"without_{name}"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(f"import sys; sys.modules[{name!r}] = None\n")
        return os.environ | {"PYTHONPATH": str(folder)}

    return make


def run(*args, **kwargs):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **kwargs)


def test_import_without_detectron2_says_what_to_run(without):
    result = run("-c", "import fcos_d2", env=without("detectron2"))
    assert result.returncode == 1
    assert "ImportError: fcos_d2 needs Detectron2" in result.stderr
    assert INSTALL_DETECTRON2 in result.stderr


def test_a_mere_folder_is_not_detectron2(tmp_path):
    # With -S Python leaves out what is installed: the folder is the only thing of this name.
    (tmp_path / "detectron2").mkdir()
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import fcos_d2"
    result = run("-I", "-S", "-c", code)
    assert "ImportError: fcos_d2 needs Detectron2" in result.stderr


def test_doctor_finds_nothing_wrong_here(tmp_path):
    result = run(DOCTOR, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "All is well." in result.stdout
    assert result.stdout.count("ok  ") == 7


def test_doctor_without_detectron2(without):
    result = run(DOCTOR, env=without("detectron2"))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAIL  Detectron2's compiled ops" in result.stdout
    assert "FAIL  fcos_d2: ImportError: fcos_d2 needs Detectron2" in result.stdout
    assert INSTALL_DETECTRON2 in result.stdout
    assert "ok    torchvision's ops" in result.stdout


def test_doctor_without_fcos_d2(without):
    result = run(DOCTOR, env=without("fcos_d2"))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAIL  fcos_d2" in result.stdout
    assert "pip install --no-build-isolation --editable ." in result.stdout
    assert result.stdout.count("ok  ") == 6


def test_doctor_without_pkg_resources(without):
    result = run(DOCTOR, env=without("pkg_resources"))
    assert result.returncode == 1
    assert "pip install 'setuptools<81'" in result.stdout


def test_no_other_file_repeats_the_pinned_commit():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    commit = REQUIREMENT.rpartition("@")[2]
    assert len(commit) == 40
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    files = {f for f in tracked if not f.endswith(".md") and (ROOT / f).is_file()}
    holders = {f for f in files if commit.encode() in (ROOT / f).read_bytes()}
    assert holders <= {"fcos_d2/detectron2.txt"}


def test_wheel_without_detectron2_says_what_to_run(wheel, tmp_path, without):
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    env = without("detectron2")
    env["PYTHONPATH"] += f"{os.pathsep}{installed}"
    result = run("-c", "import fcos_d2", env=env, cwd=tmp_path)
    assert str(installed / "fcos_d2" / "__init__.py") in result.stderr
    assert INSTALL_DETECTRON2 in result.stderr


def test_description_of_the_wheel_has_no_relative_links(wheel):
    # A package registry shows it, where neither docs/ nor the pictures are.
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith("METADATA"))
        text = file.read(name).decode()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links and all(link.startswith("https://") for link in links)


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
