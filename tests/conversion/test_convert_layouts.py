"""Names and shapes of every source, written out from the published architectures.

Each source tensor is filled with a number of its own, which must arrive in our tensor for it.
"""

import re

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model

from fcos_d2 import model_zoo
from fcos_d2.conversion import SOURCES, convert

R50 = "COCO-Detection/fcos_R_50_FPN_1x.yaml"
DCN = "COCO-Detection/fcos_dcnv2_R_50_FPN_1x.yaml"
# Parameters and buffers of a norm in the backbone.
NORM = ("weight", "bias", "running_mean", "running_var")
C = 256  # channels of the FPN and the towers


def make_cfg(name=R50, **fcos_keys):
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FCOS.update(fcos_keys)
    return cfg


def conv(source, ours, out_channels, in_channels, size, bias=True):
    rows = [(f"{source}.weight", f"{ours}.weight", (out_channels, in_channels, size, size))]
    return rows + [(f"{source}.bias", f"{ours}.bias", (out_channels,))] * bias


def norm(source, ours, channels, parts=NORM):
    return [(f"{source}.{part}", f"{ours}.{part}", (channels,)) for part in parts]


def resnet50(their_block, their_stem, their_dcn=None):
    """Rows (their name, our name, shape).

    Args:
        their_block: maps (stage, block, layer) to the prefixes of conv and norm.
        their_dcn: maps the prefix of a deformable conv to those of its offsets and itself.
    """
    root = "backbone.bottom_up"
    rows = conv(their_stem["conv"], f"{root}.stem.conv1", 64, 3, 7, bias=False)
    rows += norm(their_stem["norm"], f"{root}.stem.conv1.norm", 64)
    channels = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for b in range(blocks):
            layers = [("conv1", width, channels, 1), ("conv2", width, width, 3)]
            layers += [("conv3", 4 * width, width, 1)]
            if b == 0:
                layers += [("shortcut", 4 * width, channels, 1)]
            for layer, out, into, size in layers:
                theirs, their_norm = their_block(stage, b, layer)
                ours = f"{root}.res{stage + 2}.{b}.{layer}"
                if their_dcn and layer == "conv2" and stage > 0:
                    offset, theirs = their_dcn(theirs)
                    rows += conv(offset, f"{ours}_offset", 27, width, 3)
                rows += conv(theirs, ours, out, into, size, bias=False)
                rows += norm(their_norm, f"{ours}.norm", out)
            channels = 4 * width
    return rows


def torchvision_resnet50(prefix, stem="", dcn=None):
    def block(stage, b, layer):
        root = f"{prefix}.layer{stage + 1}.{b}"
        if layer == "shortcut":
            return f"{root}.downsample.0", f"{root}.downsample.1"
        return f"{root}.{layer}", f"{root}.bn{layer[-1]}"

    stem = {"conv": f"{prefix}.{stem}conv1", "norm": f"{prefix}.{stem}bn1"}
    return resnet50(block, stem, dcn)


def detectron2_resnet50():
    def block(stage, b, layer):
        root = f"backbone.bottom_up.res{stage + 2}.{b}.{layer}"
        return root, f"{root}.norm"

    stem = "backbone.bottom_up.stem.conv1"
    return resnet50(block, {"conv": stem, "norm": f"{stem}.norm"}, lambda c: (f"{c}_offset", c))


def fpn(lateral, output, p6, p7, top_channels=C):
    rows = []
    for i, channels in enumerate((512, 1024, 2048)):
        rows += conv(lateral(i), f"backbone.fpn_lateral{i + 3}", C, channels, 1)
        rows += conv(output(i), f"backbone.fpn_output{i + 3}", C, C, 3)
    return [
        *rows,
        *conv(p6, "backbone.top_block.p6", C, top_channels, 3),
        *conv(p7, "backbone.top_block.p7", C, C, 3),
    ]


def towers(theirs, dcn=None, bias=True):
    """4 layers each; ``theirs`` maps ("cls" or "bbox", layer) to the prefixes of conv and norm."""
    rows = []
    for name in ("cls", "bbox"):
        for i in range(4):
            ours = f"head.{name}_tower.{3 * i}"
            their_conv, their_norm = theirs(name, i)
            if dcn and i == 3:
                offset, their_conv = dcn(their_conv)
                rows += conv(offset, f"{ours}.offset", 27, C, 3)
                ours += ".conv"
            rows += conv(their_conv, ours, C, C, 3, bias)
            rows += norm(their_norm, f"head.{name}_tower.{3 * i + 1}", C, ("weight", "bias"))
    return rows


def predictors(cls_logits, bbox_pred, ctrness, num_classes=80):
    return [
        *conv(cls_logits, "head.cls_logits", num_classes, C, 3),
        *conv(bbox_pred, "head.bbox_pred", 4, C, 3),
        *conv(ctrness, "head.ctrness", 1, C, 3),
    ]


def scales(prefix, shape=(1,)):
    return [(f"{prefix}.{i}.scale", f"head.scales.{i}.scale", shape) for i in range(5)]


def adelaidet(dcn=False):
    head = "proposal_generator.fcos_head"
    rows = detectron2_resnet50()
    if not dcn:
        rows = [row for row in rows if "_offset" not in row[0]]
    return [
        *rows,
        *fpn(
            lambda i: f"backbone.fpn_lateral{i + 3}",
            lambda i: f"backbone.fpn_output{i + 3}",
            "backbone.top_block.p6",
            "backbone.top_block.p7",
        ),
        *towers(
            lambda name, i: (f"{head}.{name}_tower.{3 * i}", f"{head}.{name}_tower.{3 * i + 1}"),
            (lambda c: (f"{c}.offset", f"{c}.conv")) if dcn else None,
        ),
        *predictors(f"{head}.cls_logits", f"{head}.bbox_pred", f"{head}.ctrness"),
        *scales(f"{head}.scales"),
    ]


def original(dcn=False, top_channels=C):
    their_dcn = (lambda c: (f"{c}.offset", f"{c}.conv")) if dcn else None
    return [
        *torchvision_resnet50("backbone.body", "stem.", their_dcn),
        *fpn(
            lambda i: f"backbone.fpn.fpn_inner{i + 2}",
            lambda i: f"backbone.fpn.fpn_layer{i + 2}",
            "backbone.fpn.top_blocks.p6",
            "backbone.fpn.top_blocks.p7",
            top_channels,
        ),
        *towers(
            lambda name, i: (
                f"rpn.head.{name}_tower.{3 * i}",
                f"rpn.head.{name}_tower.{3 * i + 1}",
            ),
            their_dcn,
        ),
        *predictors("rpn.head.cls_logits", "rpn.head.bbox_pred", "rpn.head.centerness"),
        *scales("rpn.head.scales"),
    ]


def mmdet(dcn=False, bias=True, top_channels=C, predictor="conv", offset="{}.conv_offset"):
    def prefixes(name, i):
        root = f"bbox_head.{ {'cls': 'cls', 'bbox': 'reg'}[name] }_convs.{i}"
        return f"{root}.conv", f"{root}.gn"

    their_dcn = (lambda c: (offset.format(c), c)) if dcn else None
    return [
        *torchvision_resnet50("backbone", dcn=their_dcn),
        *fpn(
            lambda i: f"neck.lateral_convs.{i}.conv",
            lambda i: f"neck.fpn_convs.{i}.conv",
            "neck.fpn_convs.3.conv",
            "neck.fpn_convs.4.conv",
            top_channels,
        ),
        *towers(prefixes, their_dcn, bias),
        *predictors(*(f"bbox_head.{predictor}_{x}" for x in ("cls", "reg", "centerness"))),
        *scales("bbox_head.scales", shape=()),
    ]


def mmdet_gfl(bins=17):
    """As the FCOS of mmdetection, with 0 to 16 strides for each distance, and no third branch."""
    rows = [row for row in mmdet(bias=False) if "bbox_head.conv_" not in row[0]]
    return [
        *rows,
        *conv("bbox_head.gfl_cls", "head.cls_logits", 80, C, 3),
        *conv("bbox_head.gfl_reg", "head.bbox_pred", 4 * bins, C, 3),
    ]


def mmdet_tood(dcn=False):
    """A stack of six convolutions, two of them deformable, and two decompositions of it."""
    head = "bbox_head"
    rows = mmdet(dcn=dcn, bias=False)
    rows = [row for row in rows if not re.match(r"bbox_head\.(conv_|cls_convs|reg_convs)", row[0])]
    for i in range(6):
        theirs, ours = f"{head}.inter_convs.{i}", f"head.share_tower.{3 * i}"
        if dcn and i < 2:
            rows += conv(f"{theirs}.conv.conv_offset", f"{ours}.offset", 4 * 27, C, 3)
            ours += ".conv"
        rows += conv(f"{theirs}.conv", ours, C, C, 3, bias=False)
        rows += norm(f"{theirs}.gn", f"head.share_tower.{3 * i + 1}", C, ("weight", "bias"))
    for theirs, ours in (("cls", "cls"), ("reg", "box")):
        theirs, ours = f"{head}.{theirs}_decomp", f"head.{ours}_decomposition"
        rows += conv(f"{theirs}.layer_attention.0", f"{ours}.attention.0", 32, 6 * C, 1)
        rows += conv(f"{theirs}.layer_attention.2", f"{ours}.attention.2", 6, 32, 1)
        rows += conv(f"{theirs}.reduction_conv.conv", f"{ours}.reduction", C, 6 * C, 1, bias=False)
        rows += norm(f"{theirs}.reduction_conv.gn", f"{ours}.tower.0", C, ("weight", "bias"))
    for theirs, ours, channels in (
        ("cls_prob_module", "alignment", 1),
        ("reg_offset_module", "offsets", 8),
    ):
        rows += conv(f"{head}.{theirs}.0", f"head.{ours}.0", 64, 6 * C, 1)
        rows += conv(f"{head}.{theirs}.2", f"head.{ours}.2", channels, 64, 3)
    rows += conv(f"{head}.tood_cls", "head.cls_logits", 80, C, 3)
    return rows + conv(f"{head}.tood_reg", "head.bbox_pred", 4, C, 3)


def detectron2():
    return [
        *(row for row in detectron2_resnet50() if "_offset" not in row[0]),
        *fpn(
            lambda i: f"backbone.fpn_lateral{i + 3}",
            lambda i: f"backbone.fpn_output{i + 3}",
            "backbone.top_block.p6",
            "backbone.top_block.p7",
        ),
        *towers(lambda name, i: (f"head.{name}_subnet.{3 * i}", f"head.{name}_subnet.{3 * i + 1}")),
        *predictors("head.cls_score", "head.bbox_pred", "head.ctrness"),
    ]


def torchvision(fpn_suffix=".0"):
    tower = {"cls": "head.classification_head.conv", "bbox": "head.regression_head.conv"}
    regression = "head.regression_head"
    return [
        *torchvision_resnet50("backbone.body"),
        *fpn(
            lambda i: f"backbone.fpn.inner_blocks.{i}{fpn_suffix}",
            lambda i: f"backbone.fpn.layer_blocks.{i}{fpn_suffix}",
            "backbone.fpn.extra_blocks.p6",
            "backbone.fpn.extra_blocks.p7",
        ),
        *towers(lambda name, i: (f"{tower[name]}.{3 * i}", f"{tower[name]}.{3 * i + 1}")),
        *predictors(
            "head.classification_head.cls_logits",
            f"{regression}.bbox_reg",
            f"{regression}.bbox_ctrness",
        ),
    ]


LAYOUTS = {
    "adelaidet": ("adelaidet", adelaidet(), R50, {}),
    "adelaidet-dcn": ("adelaidet", adelaidet(dcn=True), DCN, {}),
    "fcos": ("fcos", original(), R50, {}),
    "fcos-dcn": ("fcos", original(dcn=True), DCN, {}),
    "fcos-c5": ("fcos", original(top_channels=2048), R50, {"TOP_IN_FEATURE": "res5"}),
    "detectron2": ("detectron2", detectron2(), R50, {"USE_SCALE": False}),
    "torchvision": ("torchvision", torchvision(), R50, {"USE_SCALE": False}),
    "torchvision-0.12": ("torchvision", torchvision(fpn_suffix=""), R50, {"USE_SCALE": False}),
    "mmdet": ("mmdet", mmdet(), R50, {}),
    "mmdet-gfl": ("mmdet-gfl", mmdet_gfl(), R50, {"TOP_RELU": False}),
    "mmdet-tood": ("mmdet-tood", mmdet_tood(), R50, {"TOP_RELU": False, "HEAD": "task_aligned"}),
    "mmdet-tood-dcn": ("mmdet-tood", mmdet_tood(dcn=True), DCN, {"NUM_SHARE_CONVS": 6}),
    "mmdet-1": ("mmdet", mmdet(predictor="fcos"), R50, {}),
    "mmdet-no-bias": ("mmdet", mmdet(bias=False), R50, {}),
    "mmdet-c5": ("mmdet", mmdet(top_channels=2048), R50, {"TOP_IN_FEATURE": "res5"}),
    "mmdet-dcn": ("mmdet", mmdet(dcn=True), DCN, {}),
    "mmdet-1-dcn": ("mmdet", mmdet(dcn=True, offset="{}_offset"), DCN, {}),
}
PLAIN = {source: LAYOUTS[source] for source in SOURCES}


def numbered(rows):
    """A state dict whose n-th tensor is filled with n, expanded so that it takes no memory."""
    return {row[0]: torch.tensor(float(n)).expand(row[2]) for n, row in enumerate(rows, start=1)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_lands_where_it_belongs(layout):
    source, rows, config, keys = LAYOUTS[layout]
    state_dict = numbered(rows)
    assert len(state_dict) == len(rows), "the test's own names must differ"
    converted, cfg = convert(state_dict, source, make_cfg(config))
    for n, (theirs, ours, _) in enumerate(rows, start=1):
        tensor = converted.pop(ours)
        if source == "fcos" and ours.endswith("norm.weight"):
            assert (tensor / n - 1).abs().max() < 1e-5, theirs  # scaled for the epsilon
        else:
            assert (tensor == n).all(), theirs
    if layout in ("mmdet-no-bias", "mmdet-gfl", "mmdet-tood", "mmdet-tood-dcn"):
        assert len(converted) == (6 if "tood" in layout else 8)
        for name in list(converted):
            assert re.fullmatch(r"head\.(cls|bbox|share)_tower\.\d+\.(conv\.)?bias", name)
            assert not converted.pop(name).any()
    assert not converted
    # Settings that follow from the file.
    assert cfg.MODEL.FCOS.NORM == "GN"
    assert keys.items() <= cfg.MODEL.FCOS.items()
    assert (config == DCN) == cfg.MODEL.FCOS.USE_DEFORMABLE


def test_numbers_of_the_bins_are_no_weights():
    state_dict = numbered(mmdet_gfl()) | {"bbox_head.integral.project": torch.arange(17.0)}
    expected, _ = convert(numbered(mmdet_gfl()), "mmdet-gfl", make_cfg())
    converted, _ = convert(state_dict, "mmdet-gfl", make_cfg())
    assert converted.keys() == expected.keys()
    with pytest.raises(
        ValueError, match=r"gfl_reg\.weight: \(36, 256, 3, 3\), the model has \(68, "
    ):
        convert(numbered(mmdet_gfl(bins=9)), "mmdet-gfl", make_cfg())
    opts = ["MODEL.FCOS.REG_MAX", 8]
    _, cfg = convert(numbered(mmdet_gfl(bins=9)), "mmdet-gfl", make_cfg(), opts)
    assert cfg.MODEL.FCOS.REG_MAX == 8


@pytest.mark.parametrize("source", ["mmdet-gfl", "mmdet-tood"])
@pytest.mark.parametrize("is_its_own", [True, False])
def test_the_configs_of_successors_are_right_for_their_checkpoints(source, is_its_own):
    own = f"Successors/{source.removeprefix('mmdet-')}_R_50_FPN_1x.yaml"
    name = own if is_its_own else R50
    _, cfg = convert(numbered(PLAIN[source][1]), source, make_cfg(name))
    fcos, right = cfg.MODEL.FCOS, make_cfg(own).MODEL.FCOS
    training = {"BOX_LOSS_WEIGHT"} | ({"ASSIGNMENT"} if source == "mmdet-gfl" else set())
    assert {k for k in right if fcos[k] != right[k]} == (set() if is_its_own else training)


@pytest.mark.parametrize(
    "layout", ["fcos-dcn", "mmdet-no-bias", "mmdet-gfl", "mmdet-tood-dcn", "torchvision"]
)
def test_the_model_of_the_config_loads_all_tensors(layout):
    source, rows, config, _ = LAYOUTS[layout]
    converted, cfg = convert(numbered(rows), source, make_cfg(config))
    model = build_model(cfg)
    model.load_state_dict(converted, strict=True)
    assert all(type(x) is torch.Tensor and not x.requires_grad for x in converted.values())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: {f"module.{k}": v for k, v in d.items()},
        lambda d: {"model": {f"module.{k}": v for k, v in d.items()}, "iteration": 90000},
        lambda d: {"state_dict": d, "meta": {"epoch": 12}},
        lambda d: {"model": {k: v.numpy() for k, v in d.items()}, "__author__": "X"},
        lambda d: {**d, "backbone.body.bn1.num_batches_tracked": torch.tensor(5)},
        lambda d: {k: v.half() for k, v in d.items()},
    ],
)
def test_wrappers(wrap):
    plain = numbered(original())
    before = {k: v.clone() for k, v in plain.items()}
    expected, _ = convert(plain, "fcos", make_cfg())
    wrapped, _ = convert(wrap(plain), "fcos", make_cfg())
    assert expected.keys() == wrapped.keys()
    for name, x in expected.items():
        assert wrapped[name].dtype == torch.float32
        assert torch.equal(wrapped[name], x)
    assert all(torch.equal(before[k], v) for k, v in plain.items())


def test_result_shares_no_memory_with_the_source():
    state_dict = {name: x.clone() for name, x in numbered(adelaidet()).items()}
    converted, _ = convert(state_dict, "adelaidet", make_cfg())
    theirs = {x.data_ptr() for x in state_dict.values()}
    ours = [x.untyped_storage().data_ptr() for x in converted.values()]
    assert len(set(ours)) == len(ours) and not theirs & set(ours)


def test_frozen_bn_of_the_original_has_no_epsilon():
    torch.manual_seed(0)
    name = "backbone.body.layer1.0.bn1."
    x = torch.randn(2, 64, 3, 3)
    mean, weight, bias = torch.randn(3, 64)
    # Detectron2's 1e-5 matters where the variance is small, as in some ResNeXts.
    variance = torch.logspace(-6, 1, 64)
    state_dict = numbered(original())
    state_dict.update(
        {
            f"{name}weight": weight,
            f"{name}bias": bias,
            f"{name}running_mean": mean,
            f"{name}running_var": variance,
        }
    )
    converted, _ = convert(state_dict, "fcos", make_cfg())
    ours = FrozenBatchNorm2d(64)
    prefix = "backbone.bottom_up.res2.0.conv1.norm."
    ours.load_state_dict({p: converted[prefix + p] for p in NORM}, strict=False)
    mean, weight, bias, variance = (t[:, None, None] for t in (mean, weight, bias, variance))
    expected = (x - mean) / variance.sqrt() * weight + bias
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("norm_type", ["BN", "SyncBN"])
def test_one_bn_for_all_levels_of_mmdet_is_copied_to_each(norm_type):
    rows = []
    for theirs, ours, shape in mmdet():
        if ".gn." in theirs:
            theirs = theirs.replace(".gn.", ".bn.")
            if theirs.endswith(".bias"):
                for part in ("running_mean", "running_var"):
                    rows.append((theirs.replace("bias", part), ours.replace("bias", part), shape))
        rows.append((theirs, ours, shape))
    converted, cfg = convert(numbered(rows), "mmdet", make_cfg(NORM=norm_type))
    assert norm_type == cfg.MODEL.FCOS.NORM
    for n, (theirs, ours, _) in enumerate(rows, start=1):
        prefix, part = ours.rsplit(".", 1)
        names = [f"{prefix}.{i}.{part}" for i in range(5)] if ".bn." in theirs else [ours]
        if theirs.startswith("bbox_head."):
            assert all((converted[name] == n).all() for name in names), theirs
    # The file overrides a config with GN.
    assert convert(numbered(rows), "mmdet", make_cfg())[1].MODEL.FCOS.NORM == "BN"


def test_statistics_per_level_of_adelaidet():
    """Its real-time models have shared towers with one BN per level, from P3 to P5."""
    rows, level_names = [], []
    for theirs, ours, shape in adelaidet():
        if re.search(r"(cls|bbox)_tower|top_block|scales\.[34]", theirs):
            continue
        rows.append((theirs, ours, shape))
    root = "proposal_generator.fcos_head.share_tower"
    for i in range(4):
        rows += conv(f"{root}.{3 * i}", f"head.share_tower.{3 * i}", C, C, 3)
        for level in range(3):
            level_names.append(f"share_tower.{3 * i + 1}.{level}")
            theirs = f"proposal_generator.fcos_head.{level_names[-1]}"
            rows += norm(theirs, f"head.{level_names[-1]}", C)
    counters = {
        f"proposal_generator.fcos_head.{name}.num_batches_tracked": torch.tensor(9)
        for name in level_names
    }
    cfg = make_cfg(
        NUM_SHARE_CONVS=4,
        NUM_CLS_CONVS=0,
        NUM_BOX_CONVS=0,
        TOP_LEVELS=0,
        IN_FEATURES=["p3", "p4", "p5"],
        REGRESSION_RANGES=[[0, 64], [64, 128], [128, float("inf")]],
    )
    converted, cfg = convert({**numbered(rows), **counters}, "adelaidet", cfg)
    assert cfg.MODEL.FCOS.NORM == "BN"
    for n, (theirs, ours, _) in enumerate(rows, start=1):
        assert (converted.pop(ours) == n).all(), theirs
    # Only the counters remain, which start from zero.
    assert all(n.endswith("num_batches_tracked") and x == 0 for n, x in converted.items())
    assert len(converted) == len(counters)


def test_anchors_of_older_detectron2_are_ignored():
    anchors = {f"anchor_generator.cell_anchors.{i}": torch.zeros(1, 4) for i in range(5)}
    convert({**numbered(detectron2()), **anchors}, "detectron2", make_cfg())


def test_moving_average_of_the_loss_starts_from_scratch():
    converted, _ = convert(numbered(adelaidet()), "adelaidet", make_cfg(LOSS_NORMALIZER="ema_fg"))
    fresh = build_model(make_cfg(LOSS_NORMALIZER="ema_fg")).loss.ema_num_positives
    assert converted["loss.ema_num_positives"] == fresh == 0
