import copy
import math

import pytest
import torch
from detectron2.layers import nms
from detectron2.structures import Boxes, Instances
from helpers import STRIDES, level_locations, level_shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from fcos_d2.modeling import FCOSPostProcessor
from fcos_d2.modeling.post_processing import top_k_per_group

NUM_CLASSES = 3


def make_maps(images=2, size=(96, 128), shift=-2.0, dtype=torch.float32):
    shapes = level_shapes(*size)
    logits = [(torch.randn(images, NUM_CLASSES, *s) * 2 + shift).to(dtype) for s in shapes]
    ltrb = [torch.rand(images, 4, *s) * 40 for s in shapes]
    quality = [torch.randn(images, 1, *s).to(dtype) for s in shapes]
    return logits, ltrb, quality


def detect_by_loops(
    maps, image, size, thresh=0.05, topk=1000, best=100, sqrt=True, on_score=False, offset=0.5
):
    """The definition: cell by cell, class by class, with plain lists; NMS one class at a time."""
    candidates = []
    for logits, ltrb, quality, stride in zip(*maps, STRIDES, strict=True):
        locations = level_locations(*logits.shape[2:], stride) + (offset - 0.5) * stride
        locations = locations.tolist()
        on_level = []
        for cell, (x, y) in enumerate(locations):
            distances = ltrb[image].flatten(1)[:, cell].tolist()
            if quality is None:
                nearer = (min(distances[a], distances[a + 2]) for a in (0, 1))
                farther = (max(distances[a], distances[a + 2]) for a in (0, 1))
                q = math.sqrt(math.prod(nearer) / math.prod(farther))
            else:
                q = quality[image].flatten()[cell].float().sigmoid().item()
            for k in range(NUM_CLASSES):
                p = logits[image, k].flatten()[cell].float().sigmoid().item()
                score = math.sqrt(p * q) if sqrt else p * q
                if (score if on_score else p) > thresh:
                    left, top, right, bottom = distances
                    box = [
                        min(max(x - left, 0), size[1]),
                        min(max(y - top, 0), size[0]),
                        min(max(x + right, 0), size[1]),
                        min(max(y + bottom, 0), size[0]),
                    ]
                    on_level.append((score, k, box))
        candidates += sorted(on_level, key=lambda c: -c[0])[:topk]
    kept = []
    for k in range(NUM_CLASSES):
        mine = [c for c in candidates if c[1] == k and c[2][2] > c[2][0] and c[2][3] > c[2][1]]
        if mine:
            boxes = torch.tensor([c[2] for c in mine])
            scores = torch.tensor([c[0] for c in mine])
            kept += [mine[i] for i in nms(boxes, scores, 0.6).tolist()]
    return sorted(kept, key=lambda c: -c[0])[:best]


@pytest.mark.parametrize("fusion", ["sqrt", "product"])
@pytest.mark.parametrize("topk", [1000, 7])
@pytest.mark.parametrize("thresh_on", ["class", "score"])
@pytest.mark.parametrize("computed, offset", [(False, 0.5), (True, 0.5), (False, 0.0)])
def test_equals_the_slow_reference(fusion, topk, thresh_on, computed, offset):
    maps = make_maps()
    sizes = [(96, 128), (80, 100)]
    process = FCOSPostProcessor(
        score_thresh=0.2,
        score_thresh_on=thresh_on,
        topk_candidates=topk,
        max_detections_per_image=40,
        score_fusion=fusion,
        computed_centerness=computed,
        location_offset=offset,
    )
    logits, ltrb, quality = maps
    results = process(logits, ltrb, None if computed else quality, STRIDES, sizes)
    quality = [None] * len(STRIDES) if computed else quality
    for image, found in enumerate(results):
        expected = detect_by_loops(
            (logits, ltrb, quality), image, sizes[image], thresh=0.2, topk=topk, best=40,
            sqrt=fusion == "sqrt", on_score=thresh_on == "score", offset=offset,
        )  # fmt: skip
        assert found.image_size == sizes[image]
        assert found.pred_classes.tolist() == [c[1] for c in expected]
        torch.testing.assert_close(found.scores, torch.tensor([c[0] for c in expected]))
        torch.testing.assert_close(
            found.pred_boxes.tensor, torch.tensor([c[2] for c in expected]), rtol=1e-5, atol=1e-4
        )
        assert len(found) > 5


def test_inputs_are_left_as_they_are():
    maps = make_maps()
    before = copy.deepcopy(maps)
    FCOSPostProcessor()(*maps, STRIDES, [(96, 128)] * 2)
    torch.testing.assert_close(maps, before, rtol=0, atol=0)


def test_without_quality_the_score_is_the_class_probability():
    logits, ltrb, _ = make_maps()
    found = FCOSPostProcessor()(logits, ltrb, None, STRIDES, [(96, 128)] * 2)
    best = max(x[0].sigmoid().max().item() for x in logits)
    assert found[0].scores.max().item() == pytest.approx(best)


@pytest.mark.parametrize("clusters", [1, 3, 12, 200])
def test_suppressing_in_parts_equals_suppressing_all(clusters):
    """The best candidates lie on each other, so that few are left of each part that is tried."""
    centers = torch.rand(clusters, 2) * 2000
    near = centers[torch.arange(1500) % clusters] + torch.rand(1500, 2)
    candidates = Instances(
        (3000, 3000),
        pred_boxes=Boxes(torch.cat([near, near + 50], dim=1)),
        # All of a cluster before any of the next.
        scores=1 - (torch.arange(1500) % clusters) / clusters - torch.rand(1500) / clusters / 2,
        pred_classes=torch.randint(2, (1500,)),
    )
    everything = FCOSPostProcessor(max_detections_per_image=-1).suppress(candidates)
    limited = FCOSPostProcessor(max_detections_per_image=8).suppress(candidates)
    assert len(everything) >= 2 * min(clusters, 100)  # both classes
    assert len(limited) == min(len(everything), 8)
    assert torch.equal(limited.scores, everything.scores[:8])
    assert torch.equal(limited.pred_boxes.tensor, everything.pred_boxes.tensor[:8])
    assert torch.equal(limited.pred_classes, everything.pred_classes[:8])


def test_parts_of_small_boxes_and_many_classes():
    """Where moving the classes apart in float32 would round boxes by a share of their size."""
    for _ in range(30):
        corners = torch.rand(1500, 2) * 150
        candidates = Instances(
            (800, 1216),
            pred_boxes=Boxes(torch.cat([corners, corners + 8 + 20 * torch.rand(1500, 2)], dim=1)),
            scores=torch.rand(1500),
            pred_classes=torch.randint(80, (1500,)),
        )
        everything = FCOSPostProcessor(max_detections_per_image=-1).suppress(candidates)
        limited = FCOSPostProcessor(max_detections_per_image=100).suppress(candidates)
        assert torch.equal(limited.scores, everything.scores[:100])


def test_never_more_than_the_limit_also_with_equal_scores():
    logits, ltrb, quality = make_maps(images=1)
    logits = [torch.zeros_like(x) for x in logits]
    quality = [torch.zeros_like(x) for x in quality]
    ltrb = [torch.full_like(x, 3.0) for x in ltrb]  # small boxes: none suppresses another
    process = FCOSPostProcessor(max_detections_per_image=10)
    assert len(process(logits, ltrb, quality, STRIDES, [(96, 128)])[0]) == 10
    everything = FCOSPostProcessor(max_detections_per_image=-1)
    cells = sum(h * w for h, w in level_shapes(96, 128))
    assert 10 < len(everything(logits, ltrb, quality, STRIDES, [(96, 128)])[0]) <= cells * 3


@pytest.mark.parametrize("thresh, all_candidates", [(0.0, True), (1.0, False)])
def test_threshold_at_its_ends(thresh, all_candidates):
    logits, ltrb, quality = make_maps(images=1)
    process = FCOSPostProcessor(score_thresh=thresh, nms_thresh=1.0, max_detections_per_image=-1)
    found = process(logits, ltrb, quality, STRIDES, [(96, 128)])[0]
    assert len(found) == (sum(x.numel() for x in logits) if all_candidates else 0)


def test_images_are_independent():
    maps = make_maps(images=3)
    process = FCOSPostProcessor()
    together = process(*maps, STRIDES, [(96, 128)] * 3)
    for i in range(3):
        alone = process(*([x[i : i + 1] for x in m] for m in maps), STRIDES, [(96, 128)])[0]
        assert torch.equal(alone.pred_boxes.tensor, together[i].pred_boxes.tensor)
        assert torch.equal(alone.scores, together[i].scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    # Class offsets of NMS at 2000 pixels would pass float16's 65504 with the 80th class.
    shapes = level_shapes(2048, 2048)
    logits = [torch.full((1, 80, *s), -9.0, dtype=dtype) for s in shapes]
    for x in logits:
        x[:, 70:, ::3, ::3] = 3
    ltrb = [torch.full((1, 4, *s), 300.0) for s in shapes]
    quality = [torch.zeros(1, 1, *s, dtype=dtype) for s in shapes]
    found = FCOSPostProcessor()(logits, ltrb, quality, STRIDES, [(2048, 2048)])[0]
    assert found.pred_boxes.tensor.dtype == found.scores.dtype == torch.float32
    assert found.pred_boxes.tensor.isfinite().all()
    assert len(found) == 100


def test_nan_and_infinite_maps_give_no_detection_there():
    logits, ltrb, quality = make_maps(images=2)
    logits[0][0] = math.nan
    quality[1][0] = math.nan
    ltrb[2][0] = math.inf
    found = FCOSPostProcessor()(logits, ltrb, quality, STRIDES, [(96, 128)] * 2)
    assert found[0].scores.isfinite().all()
    assert found[0].pred_boxes.tensor.isfinite().all()
    assert len(found[1]) > 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5).map(float)), max_size=40),
    st.integers(0, 6),
)
def test_top_k_per_group(pairs, k):
    group = torch.tensor([g for g, _ in pairs], dtype=torch.int64)
    scores = torch.tensor([s for _, s in pairs])
    expected = []
    for g in range(4):
        mine = [i for i, (other, _) in enumerate(pairs) if other == g]
        expected += sorted(mine, key=lambda i: -pairs[i][1])[:k]  # sorted() is stable
    assert top_k_per_group(scores, group, 4, k).tolist() == expected
