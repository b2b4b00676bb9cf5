import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples each time, on machines of any speed. Other ones: --hypothesis-profile default.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

# The servers of the tests are on this machine, whatever proxy it has.
os.environ["no_proxy"] = "127.0.0.1,localhost"

ROOT = Path(__file__).parents[1]
BCCD = Path(__file__).resolve().parents[2] / "shared" / "data" / "bccd" / "BCCD"


def pytest_collection_modifyitems(items):
    """Skip, with a reason that the report shows, what this machine cannot run."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "shared" in item.keywords and not BCCD.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs ../shared/data/bccd"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def loggers():
    """Loggers that Detectron2 has set up hide their messages from caplog until the test's end."""
    found = [logging.getLogger(name) for name in ("detectron2", "fcos_d2", "fvcore")]
    before = [(logger, logger.level, logger.propagate) for logger in found]
    yield
    for logger, level, propagate in before:
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture(autouse=True)
def catalogs():
    """The data sets that a test registers, and what it says of their classes, end with the test."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    before = {name: metadata.as_dict() for name, metadata in MetadataCatalog.items()}
    data_sets = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - data_sets:
        DatasetCatalog.remove(name)
    for name, metadata in list(MetadataCatalog.items()):
        if name not in before:
            MetadataCatalog.remove(name)
        elif metadata.as_dict() != before[name]:
            vars(metadata).clear()
            vars(metadata).update(before[name])


@pytest.fixture
def bccd_root():
    return str(BCCD)


@pytest.fixture
def datasets_folder(tmp_path, monkeypatch):
    """A folder that relative paths of DATASETS.CUSTOM start from."""
    monkeypatch.setitem(os.environ, "DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """The folder above the built-in data set: what DETECTRON2_DATASETS would name."""
    from fcos_d2.data import make_shapes_dataset

    folder = tmp_path_factory.mktemp("datasets")
    make_shapes_dataset(folder / "shapes")
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """A wheel of this package."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: a build folder left in the checkout would be taken in
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("fcos_d2", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", folder, source], check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file
