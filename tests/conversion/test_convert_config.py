"""The config of a converted checkpoint reproduces its source's arithmetic."""

import pytest
import torch
from test_convert_layouts import PLAIN, adelaidet, make_cfg, mmdet, numbered, original

from fcos_d2.conversion import SOURCES, convert

CAFFE_BGR = {"INPUT.FORMAT": "BGR", "MODEL.PIXEL_STD": [1.0, 1.0, 1.0]}
# Each implementation's own defaults, or None where the given config decides.
ARITHMETIC = {
    "adelaidet": {
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": None,
        "MODEL.RESNETS.STRIDE_IN_1X1": None,
        "MODEL.FCOS.LOCATION_OFFSET": 0.5,
        "MODEL.FCOS.SCORE_THRESH_ON": "class",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.05,
        "MODEL.FCOS.SCORE_FUSION": "sqrt",
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
        "MODEL.FCOS.USE_SCALE": True,
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY_ON": "box",
    },
    "fcos": {
        **CAFFE_BGR,
        "MODEL.PIXEL_MEAN": [102.9801, 115.9465, 122.7717],
        "MODEL.FCOS.LOCATION_OFFSET": 0.5,
        "MODEL.FCOS.SCORE_THRESH_ON": "class",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.05,
        "MODEL.FCOS.SCORE_FUSION": "sqrt",
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
        "MODEL.FCOS.USE_SCALE": True,
        "MODEL.FCOS.BOX_ACTIVATION": None,
        "MODEL.FCOS.QUALITY_ON": None,
    },
    "detectron2": {
        **CAFFE_BGR,
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
        "MODEL.FCOS.LOCATION_OFFSET": 0.5,
        "MODEL.FCOS.SCORE_THRESH_ON": "score",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
        "MODEL.FCOS.SCORE_FUSION": "sqrt",
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
        "MODEL.FCOS.USE_SCALE": False,
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY_ON": "box",
    },
    "torchvision": {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.FCOS.LOCATION_OFFSET": 0.0,
        "MODEL.FCOS.SCORE_THRESH_ON": "score",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
        "MODEL.FCOS.SCORE_FUSION": "sqrt",
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
        "MODEL.FCOS.USE_SCALE": False,
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY_ON": "box",
    },
    "mmdet": {
        "INPUT.FORMAT": None,
        "MODEL.PIXEL_MEAN": None,
        "MODEL.PIXEL_STD": None,
        "MODEL.RESNETS.STRIDE_IN_1X1": None,
        "MODEL.FCOS.LOCATION_OFFSET": 0.5,
        "MODEL.FCOS.SCORE_THRESH_ON": "class",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.05,
        "MODEL.FCOS.SCORE_FUSION": "product",
        "MODEL.FCOS.NMS_THRESH_TEST": None,
        "MODEL.FCOS.USE_SCALE": True,
        "MODEL.FCOS.BOX_ACTIVATION": None,
        "MODEL.FCOS.QUALITY_ON": None,
    },
    "mmdet-tood": {
        "MODEL.FCOS.HEAD": "task_aligned",
        "MODEL.FCOS.NUM_SHARE_CONVS": 6,
        "MODEL.FCOS.CLIP_BOXES": "after_nms",
        "MODEL.FCOS.BOX_ACTIVATION": "exp",
    },
    "mmdet-gfl": {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.FCOS.LOCATION_OFFSET": 0.0,
        "MODEL.FCOS.SCORE_THRESH_ON": "class",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.05,
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
        "MODEL.FCOS.USE_SCALE": True,
        "MODEL.FCOS.BOX_ACTIVATION": "distribution",
    },
}
ARITHMETIC["mmdet-tood"] = ARITHMETIC["mmdet-gfl"] | ARITHMETIC["mmdet-tood"]
for source, keys in ARITHMETIC.items():
    keys["MODEL.FCOS.TOP_RELU"] = source not in ("mmdet-gfl", "mmdet-tood")
# Wrong values for the keys, so that only the source can have set the right ones.
UNLIKELY = {
    "INPUT.FORMAT": "L",
    "MODEL.PIXEL_MEAN": [7.0, 7.0, 7.0],
    "MODEL.PIXEL_STD": [8.0, 8.0, 8.0],
    "MODEL.FCOS.LOCATION_OFFSET": 0.3,
    "MODEL.FCOS.SCORE_THRESH_TEST": 0.77,
    "MODEL.FCOS.NMS_THRESH_TEST": 0.33,
}
OPPOSITE = {
    "MODEL.RESNETS.STRIDE_IN_1X1": {True: False, False: True},
    "MODEL.FCOS.TOP_RELU": {True: False, False: True},
    "MODEL.FCOS.USE_SCALE": {True: False, False: True},
    "MODEL.FCOS.SCORE_THRESH_ON": {"class": "score", "score": "class"},
    "MODEL.FCOS.SCORE_FUSION": {"sqrt": "product", "product": "sqrt"},
    "MODEL.FCOS.HEAD": {"task_aligned": "fcos"},
    "MODEL.FCOS.CLIP_BOXES": {"after_nms": "before_nms"},
    "MODEL.FCOS.NUM_SHARE_CONVS": {6: 2},
    "MODEL.FCOS.BOX_ACTIVATION": {"relu": "exp", "exp": "relu", "distribution": "exp", None: "exp"},
    "MODEL.FCOS.QUALITY_ON": {"box": "cls", "cls": "box", None: "cls"},
}


def get_key(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("source", PLAIN)
def test_config_reproduces_the_sources_arithmetic(source):
    cfg = make_cfg()
    for key, value in ARITHMETIC[source].items():
        wrong = OPPOSITE[key].get(value, False) if key in OPPOSITE else UNLIKELY[key]
        cfg.merge_from_list([key, wrong])
    in_all_sources = {"MODEL.FCOS.TOPK_CANDIDATES_TEST": 1000, "TEST.DETECTIONS_PER_IMAGE": 100}
    cfg.merge_from_list(["MODEL.FCOS.TOPK_CANDIDATES_TEST", 9, "TEST.DETECTIONS_PER_IMAGE", 8])
    cfg.SOLVER.BASE_LR = 0.123
    given = cfg.clone()
    cfg.freeze()
    _, converted = convert(numbered(PLAIN[source][1]), source, cfg)
    for key, value in ARITHMETIC[source].items():
        expected = get_key(given, key) if value is None else value
        assert get_key(converted, key) == expected, key
        assert (key in SOURCES[source].not_in_file) == (value is None), key
    assert all(get_key(converted, key) == value for key, value in in_all_sources.items())
    assert converted.SOLVER.BASE_LR == 0.123
    assert cfg == given, "the given config must not change"


@pytest.mark.parametrize("source", PLAIN)
def test_only_adelaidet_can_have_iou_for_quality(source):
    cfg = make_cfg(QUALITY="iou", BOX_LOSS_WEIGHTING="none")
    _, converted = convert(numbered(PLAIN[source][1]), source, cfg)
    expected = {"adelaidet": "iou", "mmdet-gfl": "joint", "mmdet-tood": "joint"}.get(
        source, "centerness"
    )
    assert expected == converted.MODEL.FCOS.QUALITY


def test_opts_override_the_source_and_the_checkpoint():
    opts = ["MODEL.FCOS.NMS_THRESH_TEST", 0.45, "MODEL.FCOS.SCORE_THRESH_TEST", "0.11"]
    _, cfg = convert(numbered(original()), "fcos", make_cfg(), opts)
    assert (cfg.MODEL.FCOS.NMS_THRESH_TEST, cfg.MODEL.FCOS.SCORE_THRESH_TEST) == (0.45, 0.11)
    with pytest.raises(ValueError, match=r"rpn\.head\.scales\.4\.scale"):
        convert(numbered(original()), "fcos", make_cfg(), ["MODEL.FCOS.USE_SCALE", False])


def test_pixel_statistics_in_the_file_override_the_config():
    statistics = {
        "pixel_mean": torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1),
        "pixel_std": torch.tensor([4.0, 5.0, 6.0]).view(3, 1, 1),
    }
    _, cfg = convert({**numbered(adelaidet()), **statistics}, "adelaidet", make_cfg())
    assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    renamed = {k.replace("pixel_", "data_preprocessor."): v for k, v in statistics.items()}
    _, cfg = convert({**numbered(mmdet()), **renamed}, "mmdet", make_cfg())
    assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
