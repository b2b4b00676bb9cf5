"""HRNet with HRFPN, of mmdetection and of HRNet/HRNet-FCOS, a fork of the original FCOS.

Names, shapes and what is computed are written out from the published architecture (1904.04514),
one layer after the other, on a dict of tensors with the source's names.
"""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from test_convert_backbones import conv_and_norm, conv_norm, head, random_tensors
from test_convert_layouts import C, conv, make_cfg, mmdet, numbered, original, predictors, scales
from test_convert_layouts import towers as towers_of

from fcos_d2.conversion import convert

OURS = "backbone.bottom_up.model"
MODULES = {2: 1, 3: 4, 4: 3}  # of each stage, which has as many branches as its number
BLOCKS = 4  # of each branch, and of the first stage


def hrnet(theirs, width):
    """Rows (their name, our name, shape)."""
    rows = []

    def layer(conv_name, norm_name, *shape):
        rows.extend(
            conv_norm(f"{theirs}.{conv_name}", f"{OURS}.{conv_name}", f"{theirs}.{norm_name}",
                      f"{OURS}.{norm_name}", *shape)
        )  # fmt: skip

    layer("conv1", "bn1", 64, 3, 3)
    layer("conv2", "bn2", 64, 64, 3)
    for block in range(BLOCKS):
        name, into = f"layer1.{block}", 256 if block else 64
        layer(f"{name}.conv1", f"{name}.bn1", 64, into, 1)
        layer(f"{name}.conv2", f"{name}.bn2", 64, 64, 3)
        layer(f"{name}.conv3", f"{name}.bn3", 256, 64, 1)
    layer("layer1.0.downsample.0", "layer1.0.downsample.1", 256, 64, 1)
    layer("transition1.0.0", "transition1.0.1", width, 256, 3)
    layer("transition1.1.0.0", "transition1.1.0.1", 2 * width, 256, 3)
    layer("transition2.2.0.0", "transition2.2.0.1", 4 * width, 2 * width, 3)
    layer("transition3.3.0.0", "transition3.3.0.1", 8 * width, 4 * width, 3)
    for stage, modules in MODULES.items():
        for module in range(modules):
            root = f"stage{stage}.{module}"
            for i in range(stage):
                out = width * 2**i
                for block in range(BLOCKS):
                    name = f"{root}.branches.{i}.{block}"
                    layer(f"{name}.conv1", f"{name}.bn1", out, out, 3)
                    layer(f"{name}.conv2", f"{name}.bn2", out, out, 3)
                for j in range(stage):
                    name, into = f"{root}.fuse_layers.{i}.{j}", width * 2**j
                    if j > i:
                        layer(f"{name}.0", f"{name}.1", out, into, 1)
                    for k in range(i - j):  # the last halving has the channels of the target
                        halved = out if k == i - j - 1 else into
                        layer(f"{name}.{k}.0", f"{name}.{k}.1", halved, into, 3)
    return rows


def run_hrnet(tensors, theirs, x):
    """The maps of the last stage, of the strides 4, 8, 16 and 32."""

    def layer(x, conv_name, norm_name, stride=1):
        return conv_and_norm(tensors, f"{theirs}.{conv_name}", f"{theirs}.{norm_name}", x, stride)

    def fuse(maps, root):
        fused = []
        for i in range(len(maps)):
            total = 0
            for j, x in enumerate(maps):
                name = f"{root}.fuse_layers.{i}.{j}"
                if j > i:
                    x = layer(x, f"{name}.0", f"{name}.1")
                    x = x.repeat_interleave(2 ** (j - i), 2).repeat_interleave(2 ** (j - i), 3)
                for k in range(i - j):
                    x = layer(x, f"{name}.{k}.0", f"{name}.{k}.1", stride=2)
                    x = x if k == i - j - 1 else x.relu()
                total = total + x
            fused.append(total.relu())
        return fused

    x = layer(x, "conv1", "bn1", stride=2).relu()
    x = layer(x, "conv2", "bn2", stride=2).relu()
    for block in range(BLOCKS):
        name, shortcut = f"layer1.{block}", x
        if block == 0:
            shortcut = layer(x, f"{name}.downsample.0", f"{name}.downsample.1")
        x = layer(x, f"{name}.conv1", f"{name}.bn1").relu()
        x = layer(x, f"{name}.conv2", f"{name}.bn2").relu()
        x = (layer(x, f"{name}.conv3", f"{name}.bn3") + shortcut).relu()
    maps = [layer(x, "transition1.0.0", "transition1.0.1").relu()]
    coarsest = x
    for stage, modules in MODULES.items():
        name = f"transition{stage - 1}.{stage - 1}.0"
        maps.append(layer(coarsest, f"{name}.0", f"{name}.1", stride=2).relu())
        for module in range(modules):
            root = f"stage{stage}.{module}"
            for i in range(stage):
                for block in range(BLOCKS):
                    name = f"{root}.branches.{i}.{block}"
                    y = layer(maps[i], f"{name}.conv1", f"{name}.bn1").relu()
                    maps[i] = (layer(y, f"{name}.conv2", f"{name}.bn2") + maps[i]).relu()
            maps = fuse(maps, root)
        coarsest = maps[-1]
    return maps


def run_hrfpn(tensors, reduction, output, maps, num_levels):
    """Five levels have convolutions of stride 2, six of stride 1."""
    maps = [F.interpolate(x, scale_factor=2**i, mode="bilinear") for i, x in enumerate(maps)]
    x = torch.cat(maps, dim=1)
    x = F.conv2d(x, tensors[f"{reduction}.weight"], tensors[f"{reduction}.bias"])
    return [
        F.conv2d(
            F.avg_pool2d(x, 2**i),
            tensors[f"{output(i)}.weight"],
            tensors[f"{output(i)}.bias"],
            stride=7 - num_levels,
            padding=1,
        )
        for i in range(num_levels)
    ]


NAMES = {  # of each source: HRNet, reduction and outputs of the HRFPN
    "mmdet": ("backbone", "neck.reduction_conv.conv", lambda i: f"neck.fpn_convs.{i}.conv"),
    "fcos": (
        "backbone.body", "backbone.fpn.reduction_conv.0", lambda i: f"backbone.fpn.fpn_conv.{i}",
    ),
}  # fmt: skip


def detector(source, width, num_levels):
    body, reduction, output = NAMES[source]
    rows = hrnet(body, width) + conv(reduction, "backbone.reduction", C, 15 * width, 1)
    for i in range(num_levels):
        rows += conv(output(i), f"backbone.outputs.{i}", C, C, 3)
    if source == "fcos":
        return rows + head("rpn.head", "centerness", num_levels, C)

    def prefixes(name, i):
        root = f"bbox_head.{ {'cls': 'cls', 'bbox': 'reg'}[name] }_convs.{i}"
        return f"{root}.conv", f"{root}.gn"

    # Without biases in the towers.
    rows += towers_of(prefixes, bias=False) + scales("bbox_head.scales", shape=())
    return rows + predictors(*(f"bbox_head.conv_{x}" for x in ("cls", "reg", "centerness")))


# Config: (source, width, levels).
FILES = {
    "mmdet_HRNet_W18_1x": ("mmdet", 18, 5),
    "mmdet_HRNet_W32_1x": ("mmdet", 32, 5),
    "mmdet_HRNet_W40_ms_2x": ("mmdet", 40, 5),
    "iccv_HRNet_W18_5l_2x": ("fcos", 18, 5),
    "iccv_HRNet_W32_5l_2x": ("fcos", 32, 5),
    "iccv_HRNet_W40_6l_3x": ("fcos", 40, 6),
    "iccv_syncbn_HRNet_W32_6l_2x": ("fcos", 32, 6),
}


def hrnet_cfg(name):
    return make_cfg(f"Ablations/{name}.yaml")


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_lands_where_it_belongs(name):
    source, width, num_levels = FILES[name]
    rows = detector(source, width, num_levels)
    converted, cfg = convert(numbered(rows), source, hrnet_cfg(name))
    for n, (theirs, ours, _) in enumerate(rows, start=1):
        assert (converted.pop(ours) == n).all(), theirs
    # What is left starts from zero: counters, and the biases that mmdetection's towers lack.
    assert all(not x.any() for x in converted.values())
    filled = {n for n in converted if not n.endswith("num_batches_tracked")}
    assert len(filled) == (8 if source == "mmdet" else 0)
    assert cfg.MODEL.FCOS.NORM == "GN" and cfg.MODEL.FCOS.USE_SCALE
    assert cfg.MODEL.FCOS.BOX_ACTIVATION == "exp" and cfg.MODEL.FCOS.QUALITY_ON == "cls"
    assert (0.5 if source == "mmdet" else 0.6) == cfg.MODEL.FCOS.NMS_THRESH_TEST
    assert cfg.INPUT.FORMAT == "BGR" and not cfg.MODEL.TIMM.PRETRAINED


@pytest.mark.parametrize("name", ["mmdet_HRNet_W18_1x", "iccv_HRNet_W40_6l_3x"])
@torch.no_grad()
def test_the_model_computes_the_published_maps(name):
    source, width, num_levels = FILES[name]
    tensors = random_tensors(detector(source, width, num_levels))
    converted, cfg = convert(tensors, source, hrnet_cfg(name))
    model = build_model(cfg).eval()
    model.load_state_dict(converted, strict=True)
    x = torch.randn(1, 3, 128, 160)
    body, *neck = NAMES[source]
    expected = run_hrfpn(tensors, *neck, run_hrnet(tensors, body, x), num_levels)
    actual = list(model.backbone(x).values())
    assert [a.shape for a in actual] == [e.shape for e in expected]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())
        assert e.std() > 0.01 * e.abs().max()


@pytest.mark.parametrize("source, rows", [("fcos", original()), ("mmdet", mmdet())])
def test_a_resnet_and_an_hrnet_do_not_pass_for_each_other(source, rows):
    with pytest.raises(ValueError, match="does not fit the config"):
        convert(numbered(rows), source, hrnet_cfg("iccv_HRNet_W18_5l_2x"))
    with pytest.raises(ValueError, match="does not fit the config"):
        convert(numbered(detector(source, 18, 5)), source, make_cfg())
