import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_backbone
from helpers import make_detector, make_input, tiny_cfg
from test_tracing import assert_same_detections, trace

from fcos_d2.modeling import BiFPN

# A layer, node after node: its name and the maps that it reads. On five levels, 0 to 4 are P3 to P7
# as they come in, 5 to 8 the nodes on the way down (P6, P5, P4, P3), 9 to 12 those on the way up.
NODES = {
    5: [
        ("f3_3_4", (3, 4)), ("f2_2_5", (2, 5)), ("f1_1_6", (1, 6)), ("f0_0_7", (0, 7)),
        ("f1_1_7_8", (1, 7, 8)), ("f2_2_6_9", (2, 6, 9)), ("f3_3_5_10", (3, 5, 10)),
        ("f4_4_11", (4, 11)),
    ],
    3: [("f1_1_2", (1, 2)), ("f0_0_3", (0, 3)), ("f1_1_3_4", (1, 3, 4)), ("f2_2_5", (2, 5))],
}  # fmt: skip
LEVEL_OF_MAP = {5: (0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3, 4), 3: (0, 1, 2, 1, 0, 1, 2)}
OUTPUTS = {5: (8, 9, 10, 11, 12), 3: (4, 5, 6)}  # the maps that are P3, P4, ... after the layer
CHANNELS = {"res3": 6, "res4": 8, "res5": 10}


class FixedMaps(Backbone):
    """Returns the maps it was made with."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, x):
        return self.maps

    def output_shape(self):
        return {
            name: ShapeSpec(channels=x.shape[1], stride=2 ** int(name[-1]))
            for name, x in self.maps.items()
        }


def make_maps(height, width):
    """Maps of random values, the finest of (height, width) cells."""
    maps = {}
    for name, channels in CHANNELS.items():
        maps[name] = torch.randn(2, channels, height, width, dtype=torch.float64)
        height, width = -(-height // 2), -(-width // 2)
    return maps


def halve(x):
    """The largest of the 3x3 cells around every second cell."""
    height, width = x.shape[-2:]
    rows = [range(max(0, y - 1), min(height, y + 2)) for y in range(0, height, 2)]
    columns = [range(max(0, c - 1), min(width, c + 2)) for c in range(0, width, 2)]
    cells = [[x[..., list(r), :][..., list(c)].amax(dim=(2, 3)) for c in columns] for r in rows]
    return torch.stack([torch.stack(row, dim=-1) for row in cells], dim=-2)


def enlarge(x, height, width):
    """Each cell is a copy of the one that its corner lies in."""
    rows = [y * x.shape[-2] // height for y in range(height)]
    columns = [c * x.shape[-1] // width for c in range(width)]
    return x[..., rows, :][..., columns]


def convolve(tensors, name, x):
    kernel = tensors[f"{name}.weight"]
    x = torch.nn.functional.conv2d(
        x, kernel, tensors.get(f"{name}.bias"), padding=kernel.shape[-1] // 2
    )
    if f"{name}.norm.weight" in tensors:
        weight, bias, mean, var = (
            tensors[f"{name}.norm.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
    return x


def by_hand(tensors, maps, num_layers, num_levels):
    """P3, P4, ... of the published graph, from tensors with AdelaiDet's names."""
    levels = list(maps.values())
    if num_levels == 5:
        levels.append(halve(convolve(tensors, "reduction", levels[-1])))
        levels.append(halve(levels[-1]))
    for layer in range(num_layers):
        prefix = f"repeated_bifpn.{layer}."
        all_maps = list(levels)
        for name, inputs in NODES[num_levels]:
            level = int(name[1])
            weights = tensors[f"{prefix}weights_{name}"].clamp(min=0)
            total = 0
            for i, weight in zip(inputs, weights, strict=True):
                x = all_maps[i]
                if f"{prefix}lateral_{i}_f{level}.weight" in tensors:
                    x = convolve(tensors, f"{prefix}lateral_{i}_f{level}", x)
                if LEVEL_OF_MAP[num_levels][i] < level:
                    x = halve(x)
                elif LEVEL_OF_MAP[num_levels][i] > level:
                    x = enlarge(x, *levels[level].shape[-2:])
                total = total + weight / (weights.sum() + 0.0001) * x
            all_maps.append(convolve(tensors, f"{prefix}outputs_{name}", total * total.sigmoid()))
        levels = [all_maps[i] for i in OUTPUTS[num_levels]]
    return levels


@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize("size", [(16, 24), (12, 20), (7, 9)])
@pytest.mark.parametrize("num_levels", [5, 3])
@torch.no_grad()
def test_maps_are_those_of_the_published_graph(norm, size, num_levels):
    maps = make_maps(*size)
    backbone = BiFPN(
        FixedMaps(maps),
        in_features=list(maps),
        out_channels=4,
        num_top_levels=num_levels - 3,
        num_repeats=3,
        norm=norm,
    )
    backbone.double().eval()  # exact enough to compare through three layers
    for name, x in backbone.state_dict().items():
        if "weights_" in name:
            x.uniform_(-0.2, 1)  # some are negative, and count as 0
        elif name.endswith("running_var"):
            x.uniform_(0.2, 2)
        elif x.is_floating_point():
            x.normal_(std=0.5)
    expected = by_hand(backbone.state_dict(), maps, 3, num_levels)
    actual = backbone(None)
    assert list(actual) == ["p3", "p4", "p5", "p6", "p7"][:num_levels]
    for (name, x), e in zip(actual.items(), expected, strict=True):
        torch.testing.assert_close(x, e, rtol=1e-8, atol=1e-8)
        assert backbone.output_shape()[name] == ShapeSpec(channels=4, stride=2 ** int(name[1]))
        assert e.std() > 0


def bifpn_cfg(**fcos_keys):
    cfg = tiny_cfg(**{"BIFPN_REPEATS": 2, **fcos_keys})
    cfg.MODEL.BACKBONE.NAME = "build_fcos_resnet_bifpn_backbone"
    return cfg


def test_names_are_adelaidets():
    """Laterals only for the maps that come in with other channels."""
    backbone = BiFPN(
        FixedMaps(make_maps(8, 8)), in_features=list(CHANNELS), out_channels=8, num_repeats=2
    )
    laterals = {"lateral_0_f0", "lateral_2_f2"}  # map 1 has the 8 channels already
    expected = {f"repeated_bifpn.0.{name}.{p}" for name in laterals for p in ("weight", "bias")}
    for layer in range(2):
        for name, _ in NODES[5]:
            expected.add(f"repeated_bifpn.{layer}.weights_{name}")
            expected |= {f"repeated_bifpn.{layer}.outputs_{name}.{p}" for p in ("weight", "bias")}
    expected |= {"reduction.weight", "reduction.bias"}
    assert set(backbone.state_dict()) == expected


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_levels_of_the_config_and_gradients(levels):
    """Distributed training refuses parameters without a gradient."""
    names = [f"p{i}" for i in range(3, 6 + levels)]
    backbone = build_backbone(bifpn_cfg(TOP_LEVELS=levels, IN_FEATURES=names))
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert list(maps) == list(backbone.output_shape()) == names
    assert len(backbone.repeated_bifpn) == 2
    assert backbone.size_divisibility == 32
    sum(x.sum() for x in maps.values()).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_traced_on_one_image_right_on_others():
    model = make_detector(bifpn_cfg())
    traced = trace(model, make_input(size=(96, 128))["image"])
    found = 0
    for size in ((64, 64), (100, 150), (200, 90)):
        found += assert_same_detections(model, traced, make_input(size=size)["image"])
    assert found > 10


def test_errors_say_what_to_set():
    with pytest.raises(ValueError, match=r"makes the levels .*'p7'.*leaves some out"):
        build_backbone(bifpn_cfg(IN_FEATURES=["p3", "p4", "p5"]))
    with pytest.raises(ValueError, match="BIFPN_REPEATS must be a whole number >= 1, got 0"):
        build_backbone(bifpn_cfg(BIFPN_REPEATS=0))
    with pytest.raises(ValueError, match="TOP_LEVELS must be a whole number >= 0, got -1"):
        build_backbone(bifpn_cfg(TOP_LEVELS=-1))
    cfg = bifpn_cfg()
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res5"]
    with pytest.raises(ValueError, match=r"twice the stride .*\[8, 32, 64, 128\]"):
        build_backbone(cfg)
