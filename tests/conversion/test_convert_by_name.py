"""A published checkpoint by its name gives the detections of its makers."""

import hashlib
from dataclasses import replace

import pytest
import torch
from test_convert import SIZE, torchvision_detections
from torch import nn
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights, fcos_resnet50_fpn

from fcos_d2 import Predictor, model_zoo
from fcos_d2.zoo import DEFAULT, PUBLISHED


@pytest.fixture
def torchvision_model(monkeypatch, tmp_path):
    """Random weights under the name of the published ones, as if they had been fetched before."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    model = fcos_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=91, min_size=SIZE, max_size=2 * SIZE
    )
    torchvision_detections(model)  # gives it the statistics of a trained one
    file = tmp_path / "models" / "random.pth"
    file.parent.mkdir()
    torch.save(model.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    row = replace(PUBLISHED[DEFAULT], url="https://example.invalid/models/random.pth")
    monkeypatch.setitem(PUBLISHED, DEFAULT, replace(row, sha256=digest[:8]))
    return model


def test_torchvision_by_name(torchvision_model):
    assert PUBLISHED[DEFAULT].sha256 != "99b0c9b7"  # that of the published file
    cfg = model_zoo.get_config(DEFAULT, trained=True)
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = SIZE, 2 * SIZE
    predictor = Predictor(cfg, channels="RGB")
    names = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    ours = predictor.metadata.thing_classes
    for height, width in [(SIZE, SIZE), (SIZE, 384), (384, SIZE)]:  # multiples of 128
        torch.manual_seed(height + 2 * width)
        small = torch.rand(1, 3, height // 12, width // 12)
        image = nn.functional.interpolate(small, (height, width), mode="bicubic")[0].clamp(0, 1)
        pixels = (image * 255).to(torch.uint8)
        with torch.no_grad():
            theirs = torchvision_model([pixels.float() / 255])[0]
        found = predictor(pixels.permute(1, 2, 0).numpy())["instances"]
        labels = torch.tensor([ours.index(names[label]) for label in theirs["labels"]])
        # Boxes outside of the image, which it clips to nothing and keeps, take places of its 100.
        kept = (theirs["boxes"][:, 2:] > theirs["boxes"][:, :2]).all(dim=1).nonzero()[:, 0].tolist()
        assert len(found) >= len(kept) >= 24
        for i in kept[:-1]:  # rounding may swap the last one for another
            alike = found.pred_classes == labels[i]
            alike &= (found.scores - theirs["scores"][i]).abs() < 1e-4
            alike &= (found.pred_boxes.tensor - theirs["boxes"][i]).abs().amax(dim=1) < 1e-3
            assert alike.sum() == 1
