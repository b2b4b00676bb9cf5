import pickle
from types import SimpleNamespace

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from iopath.common import file_io

from fcos_d2 import model_zoo
from fcos_d2.checkpoint import convert_torchvision_resnet


@pytest.mark.parametrize("depth, on_disk", [(18, False), (34, False), (18, True)])
def test_weights_give_torchvisions_features(depth, on_disk, tmp_path, monkeypatch):
    source = getattr(torchvision.models, f"resnet{depth}")().eval()
    for m in source.modules():
        if isinstance(m, torch.nn.BatchNorm2d):  # statistics like those of a trained network
            torch.nn.init.uniform_(m.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(m.running_var, 0.5, 1.5)
    requested = []

    def get_weight(name):
        requested.append(name)
        return SimpleNamespace(get_state_dict=lambda **kwargs: source.state_dict())

    monkeypatch.setattr(torchvision.models, "get_weight", get_weight)
    monkeypatch.setattr(file_io, "get_cache_dir", lambda *a: str(tmp_path))
    monkeypatch.setattr(
        "fcos_d2.checkpoint.torchvision_backbone.get_cache_dir", lambda: str(tmp_path)
    )
    cfg = model_zoo.get_config(f"COCO-Detection/fcos_R_{depth}_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    torch.save(source.state_dict(), tmp_path / "resnet.pth")  # timm has the same names
    weights = f"torchvision://{tmp_path}/resnet.pth" if on_disk else cfg.MODEL.WEIGHTS
    DetectionCheckpointer(model).load(weights)

    # In float64, so that the rounding of 34 layers cannot hide an error.
    source, bottom_up = source.double(), model.backbone.bottom_up.double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = source.maxpool(source.relu(source.bn1(source.conv1(x))))
    with torch.no_grad():
        features = bottom_up(x)
        expected = source.layer1(expected)
        for stage, layer in zip(
            ("res3", "res4", "res5"), (source.layer2, source.layer3, source.layer4), strict=True
        ):
            expected = layer(expected)
            torch.testing.assert_close(features[stage], expected)
    assert requested == ([] if on_disk else [f"ResNet{depth}_Weights.IMAGENET1K_V1"])


def test_files_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fcos_d2.checkpoint.torchvision_backbone.get_cache_dir", lambda: str(tmp_path / "cache")
    )

    def write(folder, value):
        (tmp_path / folder).mkdir(exist_ok=True)
        torch.save({"conv1.weight": torch.full((1,), value)}, tmp_path / folder / "resnet18.pth")

    def local(folder):
        return PathManager.get_local_path(f"torchvision://{tmp_path}/{folder}/resnet18.pth")

    write("a", 1.0)
    write("b", 2.0)
    first, second = local("a"), local("b")
    write("a", 3.0)
    files = {1.0: first, 2.0: second, 3.0: local("a")}
    for value, file in files.items():
        with open(file, "rb") as f:
            assert pickle.load(f)["model"]["stem.conv1.weight"] == value


def test_names_in_the_configs_are_known_to_torchvision():
    for depth in (18, 34):
        cfg = model_zoo.get_config(f"COCO-Detection/fcos_R_{depth}_FPN_1x.yaml")
        name = cfg.MODEL.WEIGHTS.removeprefix("torchvision://")
        weights = torchvision.models.get_weight(name)
        # The config's normalisation must be the one that the weights were trained with.
        transforms = weights.transforms()
        torch.testing.assert_close([m * 255 for m in transforms.mean], list(cfg.MODEL.PIXEL_MEAN))
        torch.testing.assert_close([s * 255 for s in transforms.std], list(cfg.MODEL.PIXEL_STD))
        assert cfg.INPUT.FORMAT == "RGB"


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match=r"'features\.0\.weight' is not a parameter"):
        convert_torchvision_resnet({"features.0.weight": torch.zeros(1)})
