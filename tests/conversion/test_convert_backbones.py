"""Backbones beside ResNet and FPN: DLA-34 and BiFPN of AdelaiDet, MobileNetV2 of the original FCOS.

Names and shapes are written out from the published architectures, and so is what they compute, one
layer after the other, on a dict of tensors with their names.
"""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from test_convert_layouts import NORM, adelaidet, conv, make_cfg, norm, numbered

from fcos_d2.conversion import convert

RT = "COCO-Detection/fcos_RT_{}DLA_34_FPN_4x.yaml"
MNV2 = "Ablations/iccv_{}_MNV2_FPN_1x.yaml"


def conv_norm(their_conv, our_conv, their_norm, our_norm, out, into, size):
    rows = conv(their_conv, our_conv, out, into, size, bias=False)
    return rows + norm(their_norm, our_norm, out)


# ---- DLA-34 (1707.06484, table 1): levels 0 and 1 are convolutions, levels 2 to 5 are trees ----

DLA_CHANNELS = (16, 32, 64, 128, 256, 512)
DLA_DEPTHS = {2: 1, 3: 2, 4: 2, 5: 1}


def dla34():
    """Rows (their name, our name or None, shape)."""
    root = "backbone.bottom_up."

    def same(conv_name, norm_name, *shape, used=True):
        theirs = conv_norm(root + conv_name, "", root + norm_name, "", *shape)
        for name, _, tensor_shape in theirs:
            ours = name.replace(root, f"{root}model.") if used else None
            rows.append((name, ours, tensor_shape))

    def tree(name, depth, into, out, to_root):
        """A tree whose root reads ``to_root`` channels beside those of its own two blocks."""
        if into != out:
            # A tree of trees has a projection, too, which nothing reads.
            same(f"{name}.project.0", f"{name}.project.1", out, into, 1, used=depth == 1)
        if depth == 2:
            tree(f"{name}.tree1", 1, into, out, 0)
            tree(f"{name}.tree2", 1, out, out, to_root + out)
            return
        for block, channels in (("tree1", into), ("tree2", out)):
            same(f"{name}.{block}.conv1", f"{name}.{block}.bn1", out, channels, 3)
            same(f"{name}.{block}.conv2", f"{name}.{block}.bn2", out, out, 3)
        same(f"{name}.root.conv", f"{name}.root.bn", out, 2 * out + to_root, 1)

    rows = []
    same("base_layer.0", "base_layer.1", 16, 3, 7)
    same("level0.0", "level0.1", 16, 16, 3)
    same("level1.0", "level1.1", 32, 16, 3)
    for level, depth in DLA_DEPTHS.items():
        into = DLA_CHANNELS[level - 1]
        tree(f"level{level}", depth, into, DLA_CHANNELS[level], 0 if level == 2 else into)
    return rows


def run_dla34(tensors, x):
    """Maps of the strides 8, 16 and 32, with residual blocks, without residual roots."""

    def layer(x, conv_name, norm_name, stride=1):
        return conv_and_norm(tensors, f"backbone.bottom_up.{conv_name}",
                             f"backbone.bottom_up.{norm_name}", x, stride)  # fmt: skip

    def block(x, name, shortcut, stride):
        y = layer(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
        return (layer(y, f"{name}.conv2", f"{name}.bn2") + shortcut).relu()

    def tree(x, name, depth, stride, beside):
        if depth == 2:
            first = tree(x, f"{name}.tree1", 1, stride, [])
            return tree(first, f"{name}.tree2", 1, 1, [*beside, first])
        shortcut = F.max_pool2d(x, stride) if stride > 1 else x
        if f"backbone.bottom_up.{name}.project.0.weight" in tensors:
            shortcut = layer(shortcut, f"{name}.project.0", f"{name}.project.1")
        first = block(x, f"{name}.tree1", shortcut, stride)
        second = block(first, f"{name}.tree2", first, 1)
        joined = torch.cat([second, first, *beside], dim=1)
        return layer(joined, f"{name}.root.conv", f"{name}.root.bn").relu()

    x = layer(x, "base_layer.0", "base_layer.1").relu()
    x = layer(x, "level0.0", "level0.1").relu()
    x = layer(x, "level1.0", "level1.1", stride=2).relu()
    maps = []
    for level, depth in DLA_DEPTHS.items():
        beside = [] if level == 2 else [F.max_pool2d(x, 2)]
        x = tree(x, f"level{level}", depth, 2, beside)
        maps.append(x)
    return maps[1:]


# ---- MobileNetV2 (1801.04381, table 2), without the last convolution ----

# Factor of expansion, channels, blocks, stride of the first.
MNV2_STAGES = [
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
]  # fmt: skip


def mobilenet_v2():
    theirs, ours = "backbone.body.features", "backbone.bottom_up.model"
    rows = conv_norm(f"{theirs}.0.0", f"{ours}.conv_stem", f"{theirs}.0.1", f"{ours}.bn1", 32, 3, 3)
    number, into = 1, 32
    for stage, (factor, out, blocks, _) in enumerate(MNV2_STAGES):
        for b in range(blocks):
            wide = factor * into
            layers = [
                ("conv_dw", wide, 1, 3),
                ("conv_pw" if factor == 1 else "conv_pwl", out, wide, 1),
            ]
            if factor > 1:
                layers = [("conv_pw", wide, into, 1), *layers]
            for i, (name, *shape) in enumerate(layers):
                conv_name = f"{ours}.blocks.{stage}.{b}.{name}"
                norm_name = f"{ours}.blocks.{stage}.{b}.bn{i + 1}"
                prefix = f"{theirs}.{number}.conv"
                rows += conv_norm(
                    f"{prefix}.{3 * i}", conv_name, f"{prefix}.{3 * i + 1}", norm_name, *shape
                )
            number, into = number + 1, out
    return rows


def run_mobilenet_v2(tensors, x):
    """The maps of features 6, 13 and 17, of the strides 8, 16 and 32."""

    def layer(x, name, index, stride=1, groups=1):
        root = f"backbone.body.features.{name}."
        return conv_and_norm(tensors, f"{root}{index}", f"{root}{index + 1}", x, stride, groups)

    x = F.relu6(layer(x, "0", 0, stride=2))
    maps = {}
    number = 1
    for factor, out, blocks, stride in MNV2_STAGES:
        for b in range(blocks):
            y, index = x, 0
            if factor > 1:
                y, index = F.relu6(layer(x, f"{number}.conv", 0)), 3
            step = stride if b == 0 else 1
            y = F.relu6(layer(y, f"{number}.conv", index, step, groups=y.shape[1]))
            y = layer(y, f"{number}.conv", index + 3)
            x = x + y if step == 1 and x.shape[1] == out else y
            maps[number] = x
            number += 1
    return [maps[6], maps[13], maps[17]]


# ---- What both have in common ----


def conv_and_norm(tensors, conv_name, norm_name, x, stride=1, groups=1):
    kernel = tensors[f"{conv_name}.weight"]
    x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
    weight, bias, mean, var = (tensors[f"{norm_name}.{p}"][:, None, None] for p in NORM)
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def run_fpn(tensors, maps, lateral, output, top=None):
    """P3 to P5, and P6 and P7 if ``top`` is the prefix of their convolutions."""

    def layer(x, name, stride=1):
        kernel = tensors[f"{name}.weight"]
        padding = kernel.shape[-1] // 2
        return F.conv2d(x, kernel, tensors[f"{name}.bias"], stride=stride, padding=padding)

    levels, coarser = [], None
    for i in (2, 1, 0):
        x = layer(maps[i], lateral(i))
        if coarser is not None:
            x = x + coarser.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        coarser = x
        levels.insert(0, layer(x, output(i)))
    if top:
        levels.append(layer(levels[-1], f"{top}.p6", stride=2))
        levels.append(layer(levels[-1].relu(), f"{top}.p7", stride=2))
    return levels


def neck(lateral, output, top, widths, channels):
    rows = []
    for i, width in enumerate(widths):
        rows += conv(lateral(i), f"backbone.fpn_lateral{i + 3}", channels, width, 1)
        rows += conv(output(i), f"backbone.fpn_output{i + 3}", channels, channels, 3)
    for level in ("p6", "p7") if top else ():
        rows += conv(f"{top}.{level}", f"backbone.top_block.{level}", channels, channels, 3)
    return rows


def head(theirs, ctrness, num_levels, channels, shared=False, norm_per_level=False):
    rows = []
    for tower in ["share_tower"] if shared else ["cls_tower", "bbox_tower"]:
        for i in (0, 3, 6, 9):
            rows += conv(f"{theirs}.{tower}.{i}", f"head.{tower}.{i}", channels, channels, 3)
            name = f"{tower}.{i + 1}"
            if norm_per_level:
                for level in range(num_levels):
                    rows += norm(f"{theirs}.{name}.{level}", f"head.{name}.{level}", channels)
            else:
                rows += norm(f"{theirs}.{name}", f"head.{name}", channels, ("weight", "bias"))
    rows += conv(f"{theirs}.cls_logits", "head.cls_logits", 80, channels, 3)
    rows += conv(f"{theirs}.bbox_pred", "head.bbox_pred", 4, channels, 3)
    rows += conv(f"{theirs}.{ctrness}", "head.ctrness", 1, channels, 3)
    for level in range(num_levels):
        rows.append((f"{theirs}.scales.{level}.scale", f"head.scales.{level}.scale", (1,)))
    return rows


ADELAIDET_FPN = (lambda i: f"backbone.fpn_lateral{i + 3}", lambda i: f"backbone.fpn_output{i + 3}")
ORIGINAL_FPN = (
    lambda i: f"backbone.fpn.fpn_inner{i + 2}",
    lambda i: f"backbone.fpn.fpn_layer{i + 2}",
)


ADELAIDET_HEAD = "proposal_generator.fcos_head"


def dla34_detector(**head_keys):
    rows = dla34() + neck(*ADELAIDET_FPN, None, (128, 256, 512), 256)
    return rows + head(ADELAIDET_HEAD, "ctrness", 3, 256, **head_keys)


def mobilenet_v2_detector(channels=256):
    top = "backbone.fpn.top_blocks"
    rows = mobilenet_v2() + neck(*ORIGINAL_FPN, top, (32, 96, 320), channels)
    return rows + head("rpn.head", "centerness", 5, channels)


# The name of the published file: (source, rows, config).
DLA34_FILES = {
    "FCOS_RT_MS_DLA_34_4x_syncbn": (dla34_detector(), RT.format("")),
    "FCOS_RT_MS_DLA_34_4x_syncbn_bn_head": (
        dla34_detector(norm_per_level=True),
        RT.format("bn_head_"),
    ),
    "FCOS_RT_MS_DLA_34_4x_syncbn_shared_towers": (
        dla34_detector(shared=True),
        RT.format("shared_towers_"),
    ),
    "FCOS_RT_MS_DLA_34_4x_syncbn_shared_towers_bn_head": (
        dla34_detector(shared=True, norm_per_level=True),
        RT.format("shared_towers_bn_head_"),
    ),
}
MNV2_FILES = {
    "FCOS_syncbn_bs32_c128_MNV2_FPN_1x": (
        mobilenet_v2_detector(channels=128),
        MNV2.format("syncbn_bs32_c128"),
    ),
    "FCOS_syncbn_bs32_MNV2_FPN_1x": (mobilenet_v2_detector(), MNV2.format("syncbn_bs32")),
    "FCOS_bn_bs16_MNV2_FPN_1x": (mobilenet_v2_detector(), MNV2.format("bn_bs16")),
}
FILES = {n: ("adelaidet", *x) for n, x in DLA34_FILES.items()}
FILES |= {n: ("fcos", *x) for n, x in MNV2_FILES.items()}


def random_tensors(rows):
    """Random values with which the maps neither vanish nor grow, and a counter for each norm."""
    tensors = {}
    for name, _, shape in rows:
        if len(shape) == 4:
            tensors[name] = torch.randn(shape) * (2 / torch.Size(shape[1:]).numel()) ** 0.5
        elif name.endswith(".running_var"):
            # Some are so small that 1e-5 matters.
            prefix = name.removesuffix("running_var")
            tensors[name] = torch.logspace(-6, 0, *shape)[torch.randperm(*shape)]
            tensors[f"{prefix}weight"] *= tensors[name].sqrt()
            tensors[f"{prefix}num_batches_tracked"] = torch.tensor(90000)
        else:
            tensors[name] = (
                torch.rand(shape) + 0.5 if name.endswith("weight") else torch.rand(shape)
            )
    return tensors


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_lands_where_it_belongs(name):
    source, rows, config = FILES[name]
    tensors = random_tensors(rows)
    converted, _ = convert(tensors, source, make_cfg(config))
    for theirs, ours, _ in rows:
        if ours is not None:
            assert torch.equal(converted.pop(ours), tensors[theirs]), theirs
    # What is left are counters, which start from zero.
    assert all(n.endswith("num_batches_tracked") and x == 0 for n, x in converted.items())
    unread = [theirs for theirs, ours, _ in rows if ours is None]
    assert len(unread) == (10 if source == "adelaidet" else 0)  # two projections of five tensors


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_the_model_computes_the_published_maps(name):
    source, rows, config = FILES[name]
    tensors = random_tensors(rows)
    converted, cfg = convert(tensors, source, make_cfg(config))
    model = build_model(cfg).eval()
    model.load_state_dict(converted, strict=True)
    x = torch.randn(1, 3, 64, 96)
    if source == "adelaidet":
        expected = run_fpn(tensors, run_dla34(tensors, x), *ADELAIDET_FPN)
    else:
        maps = run_mobilenet_v2(tensors, x)
        expected = run_fpn(tensors, maps, *ORIGINAL_FPN, "backbone.fpn.top_blocks")
    actual = list(model.backbone(x).values())
    assert [a.shape for a in actual] == [e.shape for e in expected]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())
        assert e.std() > 0.01 * e.abs().max()


def bifpn_layer(number, in_channels):
    """BiFPN of AdelaiDet, 160 channels: its nodes on the way down and then up, and their inputs."""
    nodes = ["3_3_4", "2_2_5", "1_1_6", "0_0_7", "1_1_7_8", "2_2_6_9", "3_3_5_10", "4_4_11"]
    root = f"backbone.repeated_bifpn.{number}"
    rows = []
    for i, channels in enumerate(in_channels):
        if channels != 160:  # only the coarsest map is read on two levels, and has 160
            lateral = f"{root}.lateral_{i}_f{i}"
            rows += conv(lateral, lateral, 160, channels, 1)
            rows += norm(f"{lateral}.norm", f"{lateral}.norm", 160)
    for node in nodes:
        inputs = node.split("_")[1:]
        weights, output = f"{root}.weights_f{node}", f"{root}.outputs_f{node}"
        rows.append((weights, weights, (len(inputs),)))
        rows += conv_norm(output, output, f"{output}.norm", f"{output}.norm", 160, 160, 3)
    return rows


def test_bifpn_of_adelaidet():
    """It is published below heads for masks alone, but may have been trained with FCOS alone."""
    theirs = "backbone.bottom_up.res6.reduction"
    ours = "backbone.reduction"
    rows = conv_norm(theirs, ours, f"{theirs}.norm", f"{ours}.norm", 160, 2048, 1)
    for name, _, shape in adelaidet():
        if "bottom_up" in name:
            rows.append((name.replace("bottom_up", "bottom_up.backbone"), name, shape))
    rows += bifpn_layer(0, (512, 1024, 2048, 160, 160))
    for number in range(1, 6):
        rows += bifpn_layer(number, [160] * 5)
    rows += head(ADELAIDET_HEAD, "ctrness", 5, 160)
    cfg = make_cfg("COCO-Detection/fcos_R_50_BiFPN_1x.yaml")
    converted, _ = convert(numbered(rows), "adelaidet", cfg)
    for n, (theirs, ours, _) in enumerate(rows, start=1):
        assert (converted.pop(ours) == n).all(), theirs
    assert all(name.endswith("num_batches_tracked") for name in converted)


# What the published configs and code say, as keys of this project.
SETTINGS = {
    "adelaidet": {
        "BOX_ACTIVATION": "relu", "QUALITY_ON": "box", "CLIP_BOXES": "after_nms", "TOP_LEVELS": 0,
        "IN_FEATURES": ["p3", "p4", "p5"],
    },
    "fcos": {
        "BOX_ACTIVATION": "exp", "QUALITY_ON": "cls", "CLIP_BOXES": "before_nms", "TOP_LEVELS": 2,
        "TOP_IN_FEATURE": "p5",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_the_config_has_the_published_settings(name):
    source, rows, config = FILES[name]
    _, cfg = convert(numbered(rows), source, make_cfg(config))
    common = {"SCORE_FUSION": "sqrt", "SCORE_THRESH_ON": "class", "NMS_THRESH_TEST": 0.6}
    assert {**SETTINGS[source], **common}.items() <= cfg.MODEL.FCOS.items()
    sizes = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT)
    assert sizes == ((512, 736, "BGR") if source == "adelaidet" else (800, 1333, "BGR"))
    mean = [103.53, 116.28, 123.675] if source == "adelaidet" else [102.9801, 115.9465, 122.7717]
    assert (mean, [1.0, 1.0, 1.0]) == (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    assert ("SyncBN" if "bn_head" in name else "GN") == cfg.MODEL.FCOS.NORM
    assert (32 if "bs32" in name else 16) == cfg.SOLVER.IMS_PER_BATCH
    assert (360000 if source == "adelaidet" else 90000) == cfg.SOLVER.MAX_ITER
    assert ("SyncBN" if "syncbn" in name else "BN") == cfg.MODEL.TIMM.NORM
    assert not cfg.MODEL.TIMM.PRETRAINED, "the checkpoint has the backbone"


@pytest.mark.parametrize("source, rows, name, message", [
    ("adelaidet", adelaidet(), "backbone.bottom_up.stage4.OSA4_1.ese.fc.weight", "in every block"),
])  # fmt: skip
def test_what_no_model_here_has_is_said(source, rows, name, message):
    convert(numbered(rows), source, make_cfg())
    with pytest.raises(ValueError, match=message):
        convert({**numbered(rows), name: torch.zeros(1)}, source, make_cfg())
