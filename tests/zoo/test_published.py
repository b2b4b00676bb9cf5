"""The table of published checkpoints."""

import importlib.util
from pathlib import Path
from urllib.parse import urlparse

import pytest

from fcos_d2.conversion import SOURCES
from fcos_d2.zoo import DEFAULT, PUBLISHED, check_fits, find

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_from_the_table():
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "model_zoo.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.FILE.read_text() == tool.page(), "run tools/model_zoo.py"


@pytest.mark.parametrize("address", PUBLISHED)
def test_each_row(address):
    row = PUBLISHED[address]
    assert row.source in SOURCES and (ROOT / "configs" / row.config).is_file()
    url = urlparse(row.url)
    assert url.scheme == "https" and url.path.endswith(".pth") and not url.query
    assert row.sha256 in url.path  # where its makers put it
    assert 30 < row.ap < 50 and len(row.costs) == 2
    cfg = row.cfg()
    check_fits(cfg)
    assert address == cfg.MODEL.WEIGHTS and cfg.MODEL.FCOS.NUM_CLASSES == 80
    # Every source says all that decides between its own kinds of models.
    for key, value in row.keys.items():
        node = cfg
        for part in key.split("."):
            node = node[part]
        assert node == value


def test_names():
    assert find("adelaidet://FCOS_MS_R_50_2x").ap == 41.0
    assert find("FCOS_MS_R_50_2x").address == "adelaidet://FCOS_MS_R_50_2x"
    # The best of those that have this config and may be used commercially.
    assert find("fcos_R_50_FPN_1x").address == DEFAULT
    assert find("COCO-Detection/fcos_R_50_FPN_1x.yaml").address == DEFAULT
    # All that have this one are for non-commercial use.
    assert find("fcos_dcnv2_X_101_64x4d_FPN_2x").source == "fcos"
    assert len({row.url for row in PUBLISHED.values()}) == len(PUBLISHED)
