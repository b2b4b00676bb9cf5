"""The table of published checkpoints, and what each needs of a config."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from ..config import load_cfg
from ..config_files import get_config_file
from ..conversion import settings_of

# What a checkpoint of the same shapes computes differently. A config with other values gives wrong
# boxes or scores, without an error of its own.
_MEANING = (
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.FCOS.TOP_RELU",
    "MODEL.FCOS.LOCATION_OFFSET",
    "MODEL.FCOS.BOX_ACTIVATION",
    "MODEL.FCOS.QUALITY",
    "MODEL.FCOS.QUALITY_ON",
)


@dataclass(frozen=True)
class Published:
    """A checkpoint that others have trained and published.

    Attributes:
        name: of the file, without its suffix.
        source, title: a key of ``fcos_d2.conversion.SOURCES``, and what its makers call it.
        config: the config of the same architecture, a name under ``configs/``.
        keys: what it needs besides the config and the settings of its source.
        url: of the file.
        sha256: of the file, or its first digits; "" where its makers say none.
        ap: on COCO, as its makers say, with the split and where they say it.
        costs: millions of parameters, and billions of multiply-adds for an image of 800 x 1280.
    """

    name: str
    source: str
    title: str
    config: str
    url: str
    licence: str
    ap: float
    ap_split: str
    ap_from: str
    sha256: str = ""
    keys: dict = field(default_factory=dict)
    non_commercial: bool = False
    costs: tuple[float, float] | tuple[()] = ()

    @property
    def address(self) -> str:
        """What MODEL.WEIGHTS takes."""
        return f"{self.source}://{self.name}"

    @property
    def opts(self) -> list:
        """``keys`` as ``[key, value, ...]``."""
        return _as_opts(self.keys)

    def cfg(self) -> CfgNode:
        """The config that the checkpoint is right with. Its MODEL.WEIGHTS is the address."""
        cfg = load_cfg(get_config_file(self.config))
        settings = settings_of(self.source) | self.keys | {"MODEL.WEIGHTS": self.address}
        cfg.merge_from_list(_as_opts(settings))
        return cfg


def _as_opts(settings: Mapping[str, Any]) -> list:
    return [x for item in settings.items() for x in item]


def _read_table() -> dict[str, Published]:
    content = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())
    sources, costs = content["sources"], content["costs"]
    rows = [
        Published(**(sources[row["source"]] | row), costs=tuple(costs.get(row["config"], ())))
        for row in content["checkpoints"]
    ]
    return {row.address: row for row in rows}


PUBLISHED: dict[str, Published] = _read_table()  # by address
DEFAULT = "torchvision://FCOS_ResNet50_FPN_Weights.COCO_V1"


def find(name: str) -> Published:
    """A published checkpoint by its address, its name, or the config that it has.

    Several may have the same config: then it is the one with the highest AP, of those that may be
    used commercially if there are any.

    Raises:
        ValueError: for another name, with those that there are.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    stem = Path(name).name.removesuffix(".yaml")
    rows = [row for row in PUBLISHED.values() if stem in (row.name, Path(row.config).stem)]
    if not rows:
        listed = ", ".join(PUBLISHED)
        raise ValueError(f"No published checkpoint is called {name!r}. There are {listed}")
    return min(rows, key=lambda row: (row.non_commercial, -row.ap))


def check_fits(cfg: CfgNode) -> None:
    """Raise a ValueError if MODEL.WEIGHTS is a published checkpoint that needs another config."""
    row = PUBLISHED.get(cfg.MODEL.WEIGHTS)
    if row is None or cfg.MODEL.META_ARCHITECTURE != "FCOS":
        return
    right = row.cfg()
    values = [(key, attrgetter(key)(cfg), attrgetter(key)(right)) for key in _MEANING]
    differ = [(key, ours, theirs) for key, ours, theirs in values if ours != theirs]
    if differ:
        listed = "".join(f"\n    {key} {ours}, it has {theirs}" for key, ours, theirs in differ)
        change = " ".join(f'{key} "{theirs}"' for key, _, theirs in differ)
        raise ValueError(
            f"{row.address} would give wrong detections with this config:{listed}\nAdd to the "
            f"command: {change}"
        )
