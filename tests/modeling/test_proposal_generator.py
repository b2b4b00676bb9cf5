import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from helpers import ALIGNED, GFL, SIMOTA, STRIDES, TOOD, level_locations, make_input

from fcos_d2 import model_zoo
from fcos_d2.modeling import FCOSLoss, FCOSProposalGenerator
from fcos_d2.modeling.points import ltrb_to_boxes

YAML = "quick_schedules/faster_rcnn_fcos_R_18_FPN_shapes.yaml"


def build(**fcos_keys):
    cfg = model_zoo.get_config(YAML)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    for key, value in fcos_keys.items():
        cfg.MODEL.FCOS[key] = value
    torch.manual_seed(0)
    model = build_model(cfg)
    head = model.proposal_generator.head
    torch.nn.init.normal_(head.cls_logits.weight, std=0.3)
    torch.nn.init.normal_(head.bbox_pred.weight, std=0.3)
    return model


def proposals_of(model, batch):
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    instances = [x["instances"] for x in batch] if model.training else None
    return features, model.proposal_generator(images, features, instances)


@pytest.mark.parametrize("fusion", ["sqrt", "product"])
def test_proposals_are_the_best_boxes_of_all_locations(fusion):
    model = build(SCORE_FUSION=fusion).eval()
    generator = model.proposal_generator
    generator.nms_thresh, generator.post_nms_topk = 1.0, (2000, 2000)  # nothing suppressed
    batch = [make_input(size=(64, 96)), make_input(size=(64, 96), seed=1)]
    with torch.no_grad():
        features, (proposals, losses) = proposals_of(model, batch)
        logits, ltrb, quality, *_ = generator.head([features[f] for f in generator.in_features])
    assert losses == {}
    for image in range(2):
        boxes, scores = [], []
        for level, stride in enumerate(STRIDES):
            locations = level_locations(*logits[level].shape[2:], stride)
            distances = ltrb[level][image].flatten(1).T
            boxes.append(ltrb_to_boxes(locations, distances))
            fused = logits[level][image, 0].sigmoid() * quality[level][image, 0].sigmoid()
            scores.append((fused.sqrt() if fusion == "sqrt" else fused).flatten())
        boxes, scores = torch.cat(boxes), torch.cat(scores)
        boxes[:, 0::2], boxes[:, 1::2] = boxes[:, 0::2].clamp(0, 96), boxes[:, 1::2].clamp(0, 64)
        sized = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        expected = scores[sized].sort(descending=True).values
        objectness = proposals[image].objectness_logits
        assert len(objectness) > 50
        expected = expected[: len(objectness)]
        torch.testing.assert_close(objectness.exp(), expected, rtol=1e-4, atol=1e-5)
        best = boxes[sized][scores[sized].argmax()]
        torch.testing.assert_close(proposals[image].proposal_boxes.tensor[0], best)


@pytest.mark.parametrize("classes", [1, 3])
def test_class_agnostic_unless_told_otherwise(classes):
    model = build(PROPOSAL_NUM_CLASSES=classes).train()
    assert model.proposal_generator.head.cls_logits.out_channels == classes
    boxes = ((10.0, 8.0, 50.0, 40.0),)
    losses = [proposals_of(model, [make_input(boxes, (c,))])[1][1]["loss_fcos_cls"] for c in (0, 2)]
    # With one class it does not matter which class the object has.
    assert (losses[0] == losses[1]) == (classes == 1)


@pytest.mark.parametrize(
    "keys",
    [{}, GFL, SIMOTA, ALIGNED, TOOD],
    ids=["FCOS", "GFL", "SimOTA", "task-aligned", "TOOD"],
)
@pytest.mark.parametrize("objects", [True, False])
def test_trained_jointly(objects, keys):
    model = build(**keys).train()
    model.zero_grad()
    with EventStorage(0):
        losses = model([make_input() if objects else make_input((), ())])
    third = {"loss_fcos_ctr"} if keys in ({}, SIMOTA) else set()
    third |= {"loss_fcos_dfl"} if keys is GFL else set()
    two = {"loss_cls", "loss_box_reg", "loss_fcos_cls", "loss_fcos_loc"}
    assert set(losses) == two | third
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_wrong_class_numbers_and_levels_are_errors():
    model = build(PROPOSAL_NUM_CLASSES=2).train()
    with pytest.raises(ValueError, match="classes from 2 to 2, but the model has 2"):
        proposals_of(model, [make_input(classes=(2,)), make_input()])
    with pytest.raises(ValueError, match="2 REGRESSION_RANGES for the 5 levels"):
        build(REGRESSION_RANGES=[[0, 64], [64, 128]])
    with pytest.raises(ValueError, match=r"IN_FEATURES names \['p9'\]"):
        build(IN_FEATURES=["p3", "p4", "p5", "p6", "p9"])


def test_ground_truth_of_the_caller_is_left_as_it_is():
    model = build().train()
    batch = [make_input(classes=(2,))]
    proposals_of(model, batch)
    assert batch[0]["instances"].gt_classes.tolist() == [2]


def test_boxes_are_copied_before_the_head_is_queued(monkeypatch):
    # From a GPU, the copy waits for all that is queued.
    model, order = build().train(), []
    copy = Instances.to
    monkeypatch.setattr(Instances, "to", lambda x, device: order.append(device) or copy(x, device))
    model.proposal_generator.head.register_forward_pre_hook(lambda *_: order.append("head"))
    proposals_of(model, [make_input()])
    assert order == ["cpu", "head"]


def test_detections():
    instances = build().eval()([make_input()])[0]["instances"]
    assert instances.has("pred_boxes") and instances.has("scores")


def test_computed_quality_is_refused():
    with pytest.raises(ValueError, match="not offered for proposals"):
        build(QUALITY="computed", BOX_LOSS_WEIGHTING="none")


def test_head_and_loss_must_agree():
    generator = build().proposal_generator
    with pytest.raises(ValueError, match="same quality, got head 'centerness', loss 'iou'"):
        FCOSProposalGenerator(
            head=generator.head,
            in_features=generator.in_features,
            assigner=generator.assigner,
            loss=FCOSLoss(quality="iou", box_loss_weighting="none"),
        )
