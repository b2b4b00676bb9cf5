import cv2
import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.modeling import DatasetMapperTTA, build_model
from fvcore.transforms.transform import ScaleTransform, TransformList
from helpers import GFL, TOOD, make_input, tiny_cfg

from fcos_d2 import model_zoo
from fcos_d2.modeling import FCOSWithTTA


@pytest.fixture(scope="module", params=[{}, GFL, TOOD], ids=["FCOS", "GFL", "task-aligned"])
def model(request):
    torch.manual_seed(0)
    model = build_model(tiny_cfg(**request.param)).eval()
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.3)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.3)
    return model


def augmented(model, min_sizes, flip, batch):
    mapper = DatasetMapperTTA(min_sizes=min_sizes, max_size=4000, flip=flip)
    with torch.no_grad():
        return FCOSWithTTA(tiny_cfg(), model, mapper)(batch)


def same(a, b):
    return (
        torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        and torch.equal(a.scores, b.scores)
        and torch.equal(a.pred_classes, b.pred_classes)
    )


@pytest.mark.parametrize("output_size", [{}, {"height": 100, "width": 171}])
def test_identity_gives_exactly_the_plain_result(model, output_size):
    batch = [make_input(size=(64, 96)) | output_size, make_input(size=(64, 96), seed=1)]
    with torch.no_grad():
        plain = [model([x])[0]["instances"] for x in batch]
    detections = [x["instances"] for x in augmented(model, [64], False, batch)]
    for a, b in zip(plain, detections, strict=True):
        assert len(a) > 5
        assert a.image_size == b.image_size
        assert same(a, b)


def test_the_same_version_twice_changes_nothing(model):
    batch = [make_input()]
    once = augmented(model, [64], False, batch)[0]["instances"]
    twice = augmented(model, [64, 64], False, batch)[0]["instances"]
    # Each box finds itself again with IoU 1, and NMS takes one of the two. (Not exactly: two
    # images at once go through other kernels than one.)
    torch.testing.assert_close(once.scores, twice.scores)
    torch.testing.assert_close(
        once.pred_boxes.tensor, twice.pred_boxes.tensor, rtol=1e-4, atol=1e-3
    )


def test_a_flipped_image_gives_flipped_detections(model):
    """With flips of both images in the union, flipping the input flips the result."""
    one = make_input()
    other = one | {"image": one["image"].flip(2)}
    a, b = (augmented(model, [64], True, [x])[0]["instances"] for x in (one, other))
    boxes = b.pred_boxes.tensor
    back = torch.stack([96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0], boxes[:, 3]], dim=1)
    torch.testing.assert_close(a.scores, b.scores)
    torch.testing.assert_close(a.pred_boxes.tensor, back, rtol=1e-4, atol=1e-3)
    assert len(a) > 5


def test_scales_are_merged_before_one_nms(model):
    """By hand: candidates of both scales, brought back to one frame, and one NMS over them."""
    image = make_input(size=(64, 96))["image"]
    boxes, scores, classes = [], [], []
    for size in (64, 128):
        scaled = cv2.resize(image.permute(1, 2, 0).numpy(), (size * 3 // 2, size))
        pixels = torch.as_tensor(scaled).permute(2, 0, 1)
        with torch.no_grad():
            images = model.preprocess_image([{"image": pixels}])
            outputs = model.head_outputs(images)
            (candidates,) = model.post_processor.candidates(
                outputs, model.levels, images.image_sizes
            )
        boxes.append(candidates.pred_boxes.tensor * 64 / size)
        scores.append(candidates.scores)
        classes.append(candidates.pred_classes)
    boxes, scores, classes = torch.cat(boxes), torch.cat(scores), torch.cat(classes)
    boxes = boxes.clamp(min=0).minimum(torch.tensor([96.0, 64, 96, 64]))
    inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scores, classes = boxes[inside], scores[inside], classes[inside]
    keep = batched_nms(boxes, scores, classes, 0.6)[:100]
    mapper = lambda x: [  # noqa: E731  the same two versions, as a mapper makes them
        {"image": x["image"], "transforms": TransformList([])},
        {
            "image": torch.as_tensor(scaled).permute(2, 0, 1),
            "transforms": TransformList([ScaleTransform(64, 96, 128, 192)]),
        },
    ]
    merged = FCOSWithTTA(tiny_cfg(), model, mapper)([{"image": image}])[0]["instances"]
    torch.testing.assert_close(merged.scores, scores[keep], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.pred_boxes.tensor, boxes[keep], rtol=1e-4, atol=1e-2)
    assert merged.pred_classes.tolist() == classes[keep].tolist()


def test_reads_the_file_where_there_is_no_image(model, tmp_path):
    image = make_input()["image"]
    cv2.imwrite(str(tmp_path / "a.png"), image.permute(1, 2, 0).numpy())  # BGR, as the model
    from_file = augmented(model, [64], False, [{"file_name": str(tmp_path / "a.png")}])
    from_memory = augmented(model, [64], False, [{"image": image}])
    assert same(from_file[0]["instances"], from_memory[0]["instances"])


def test_has_the_mode_of_the_model(model):
    assert not FCOSWithTTA(tiny_cfg(), model).training
    assert not model.training


def test_other_models_are_refused():
    cfg = model_zoo.get_config("quick_schedules/faster_rcnn_fcos_R_18_FPN_shapes.yaml")
    cfg.MODEL.DEVICE = "cpu"
    with pytest.raises(TypeError, match="not GeneralizedRCNN"):
        FCOSWithTTA(cfg, build_model(cfg))
