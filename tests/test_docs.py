import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def test_each_page_is_in_the_navigation_of_the_site():
    # `make docs` fails on a missing one, too, but is no part of the tests.
    listed = re.findall(r"\bdocs/\w+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))


def test_the_reference_has_a_page_for_each_package_with_public_names():
    listed = re.findall(r"api/fcos_d2\.(\w+)\.md", (ROOT / "mkdocs.yml").read_text())
    packages = {
        file.parent.name
        for file in ROOT.glob("fcos_d2/*/__init__.py")
        if "__all__" in file.read_text()
    }
    assert set(listed) == packages | {"model_zoo"}


@pytest.fixture
def demo(tmp_path):
    """Pictures as large as those of `make demo`."""
    rng = np.random.default_rng(0)
    for name, size in {"predictions": (1650, 1500), "report/precision_recall": (645, 1980)}.items():
        file = tmp_path / "demo" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(*size, 4), dtype=np.uint8)).save(file)
    return tmp_path / "demo"


def draw(demo, output):
    tool = ROOT / "tools" / "readme_pictures.py"
    return subprocess.run([sys.executable, tool, demo, output], capture_output=True, text=True)


def test_readme_pictures_are_the_same_bytes_when_drawn_again(demo, tmp_path):
    for name in ("first", "second"):
        assert draw(demo, tmp_path / name).returncode == 0
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert first == second
    # The README shows these two, and a clone carries them: 300 KB together at most.
    shown = re.findall(r"!\[[^]]*\]\(docs/pictures/(\S+)\)", (ROOT / "README.md").read_text())
    assert sorted(first) == sorted(shown)
    assert sum((ROOT / "docs" / "pictures" / name).stat().st_size for name in shown) < 300_000


def test_readme_pictures_without_a_demo_say_what_to_run(tmp_path):
    result = draw(tmp_path, tmp_path / "pictures")
    assert result.returncode == 2
    assert "predictions.png is not there: run `make demo` first" in result.stderr
