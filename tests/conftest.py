import os
from pathlib import Path

import pytest
import torch

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
