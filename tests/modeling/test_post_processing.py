import copy
import math

import pytest
import torch
from detectron2.layers import nms
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from helpers import LEVELS, STRIDES, level_locations, level_shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from fcos_d2.modeling import FCOSPostProcessor, HeadOutputs, Levels
from fcos_d2.modeling.post_processing import rank_in_groups

NUM_CLASSES = 3


def make_maps(images=2, size=(96, 128), shift=-2.0, dtype=torch.float32):
    shapes = level_shapes(*size)
    logits = [(torch.randn(images, NUM_CLASSES, *s) * 2 + shift).to(dtype) for s in shapes]
    ltrb = [torch.rand(images, 4, *s) * 40 for s in shapes]
    quality = [torch.randn(images, 1, *s).to(dtype) for s in shapes]
    return HeadOutputs(logits, ltrb, quality)


def detect_by_loops(
    outputs, image, size, thresh=0.05, topk=1000, best=100, sqrt=True, on_score=False, offset=0.5
):
    """The definition: cell by cell, class by class, with plain lists; NMS one class at a time."""
    candidates = []
    class_logits, all_ltrb, quality_logits, *_ = outputs
    quality_logits = quality_logits or [None] * len(STRIDES)
    for logits, ltrb, quality, stride in zip(
        class_logits, all_ltrb, quality_logits, STRIDES, strict=True
    ):
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
    outputs = make_maps()
    outputs = outputs._replace(quality_logits=None) if computed else outputs
    sizes = [(96, 128), (80, 100)]
    process = FCOSPostProcessor(
        score_thresh=0.2,
        score_thresh_on=thresh_on,
        topk_candidates=topk,
        max_detections_per_image=40,
        score_fusion=fusion,
        quality="computed" if computed else "centerness",
    )
    results = process(outputs, Levels(tuple(STRIDES), offset), sizes)
    for image, detections in enumerate(results):
        expected = detect_by_loops(
            outputs, image, sizes[image], thresh=0.2, topk=topk, best=40,
            sqrt=fusion == "sqrt", on_score=thresh_on == "score", offset=offset,
        )  # fmt: skip
        assert detections.image_size == sizes[image]
        assert detections.pred_classes.tolist() == [c[1] for c in expected]
        torch.testing.assert_close(detections.scores, torch.tensor([c[0] for c in expected]))
        boxes = torch.tensor([c[2] for c in expected])
        torch.testing.assert_close(detections.pred_boxes.tensor, boxes, rtol=1e-5, atol=1e-4)
        assert len(detections) > 5


def test_inputs_are_left_as_they_are():
    outputs = make_maps()
    before = copy.deepcopy(outputs)
    FCOSPostProcessor()(outputs, LEVELS, [(96, 128)] * 2)
    torch.testing.assert_close(outputs[:3], before[:3], rtol=0, atol=0)


def test_without_quality_the_score_is_the_class_probability():
    outputs = make_maps()._replace(quality_logits=None)
    detections = FCOSPostProcessor(quality="none")(outputs, LEVELS, [(96, 128)] * 2)
    best = max(x[0].sigmoid().max().item() for x in outputs.class_logits)
    assert detections[0].scores.max().item() == pytest.approx(best)


def test_clipping_after_nms_by_hand():
    # Two boxes that reach beyond the left side of the image, of 40 x 20 and 25 x 20 pixels; inside
    # it they are 20 x 20 and 5 x 20. Their IoU is 500 / 800 = 0.625 as they are, and
    # 100 / 400 = 0.25 when clipped, on either side of 0.6. A third one lies outside altogether.
    candidates = Instances(
        (100, 100),
        pred_boxes=Boxes(torch.tensor([[-20.0, 0, 20, 20], [-20, 0, 5, 20], [-9, -9, -1, -1]])),
        scores=torch.tensor([0.9, 0.8, 0.7]),
        pred_classes=torch.tensor([1, 1, 1]),
    )
    expected = {"before_nms": [[0, 0, 20, 20], [0, 0, 5, 20]], "after_nms": [[0, 0, 20, 20]]}
    for clip_boxes, boxes in expected.items():
        detections = FCOSPostProcessor(clip_boxes=clip_boxes).suppress(candidates)
        assert detections.pred_boxes.tensor.tolist() == boxes
    # The box outside takes one of the places where clipping comes last.
    candidates = candidates[torch.tensor([0, 2])]
    candidates.scores = torch.tensor([0.1, 0.7])
    for clip_boxes, count in {"before_nms": 1, "after_nms": 0}.items():
        process = FCOSPostProcessor(clip_boxes=clip_boxes, max_detections_per_image=1)
        assert len(process.suppress(candidates)) == count


@pytest.mark.parametrize("clip_boxes", ["before_nms", "after_nms"])
@pytest.mark.parametrize("output_size", [(96, 128), (301, 77), (5, 9)])
def test_scaling_equals_detectron2s(clip_boxes, output_size):
    outputs = make_maps(images=1)
    outputs.ltrb[0][:, :, ::2] = 0  # boxes without area
    process = FCOSPostProcessor(clip_boxes=clip_boxes, max_detections_per_image=60)
    (candidates,) = process.candidates(outputs, LEVELS, [(90, 120)])
    expected = detector_postprocess(process.suppress(candidates), *output_size)
    actual = process.suppress(candidates, output_size)
    assert actual.image_size == expected.image_size == output_size
    assert torch.equal(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(actual.scores, expected.scores)
    assert torch.equal(actual.pred_classes, expected.pred_classes)
    assert len(actual) > 20


@pytest.mark.parametrize(
    "key, value",
    [
        ("score_thresh", 1.1),
        ("score_thresh", -0.1),
        ("nms_thresh", 2),
        ("topk_candidates", 0),
        ("topk_candidates", 2.5),
        ("clip_boxes", "never"),
    ],
)
def test_values_are_checked(key, value):
    with pytest.raises(ValueError, match=r"MODEL\.FCOS\.\w+ must be "):
        FCOSPostProcessor(**{key: value})


@pytest.mark.parametrize("clusters", [1, 3, 12, 200])
def test_the_limit_keeps_the_best_of_what_nms_leaves(clusters):
    """The best candidates lie on each other, so that few of them are left."""
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


def test_small_boxes_of_many_classes_are_not_rounded():
    """Where moving the classes apart in float32 would round boxes by a share of their size."""
    for count in (700, 1500):  # batched_nms moves the classes apart for up to 1000 boxes
        corners = torch.rand(count, 2) * 150
        boxes = torch.cat([corners, corners + 8 + 20 * torch.rand(count, 2)], dim=1)
        scores, classes = torch.rand(count), torch.randint(80, (count,))
        candidates = Instances(
            (800, 1216), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes
        )
        process = FCOSPostProcessor(max_detections_per_image=-1)
        kept = []
        for k in range(80):
            of_class = (classes == k).nonzero()[:, 0]
            kept.append(of_class[nms(boxes[of_class].double(), scores[of_class].double(), 0.6)])
        expected = scores[torch.cat(kept)].sort(descending=True).values
        assert torch.equal(process.suppress(candidates).scores, expected)


@pytest.mark.parametrize("count", [900, 1500])  # batched_nms has two ways, up to 1000 and above
def test_of_equal_scores_the_first_are_kept(count):
    corners = torch.arange(count)[:, None] * torch.tensor([20.0, 0.0])
    candidates = Instances(
        (40, 20 * count),
        pred_boxes=Boxes(torch.cat([corners, corners + 10], dim=1)),
        scores=torch.full((count,), 0.5),
        pred_classes=torch.arange(count) % 7,
    )
    detections = FCOSPostProcessor().suppress(candidates)
    assert torch.equal(detections.pred_boxes.tensor, candidates.pred_boxes.tensor[:100])


def test_outputs_must_fit_the_quality():
    outputs = make_maps()
    for quality, wrong in (("none", outputs), ("iou", outputs._replace(quality_logits=None))):
        with pytest.raises(ValueError, match=f"do not fit the quality '{quality}'"):
            FCOSPostProcessor(quality=quality)(wrong, LEVELS, [(96, 128)] * 2)


def test_nms_does_not_round_boxes():
    # Boxes of 10 x 10 and 10 x 5.997 at one corner: their IoU is 0.5997, not above 0.6. To keep 80
    # classes apart, batched_nms moves these of the last class by 79 * 1217 pixels, where float32
    # has steps of 1/128 pixel: 5.997 would become 6, and the IoU 60 / 100, in float32 above 0.6.
    boxes = [[0.0, 0, 10, 10], [0, 0, 10, 5.997], [1200, 700, 1216, 800]]
    candidates = Instances(
        (800, 1216),
        pred_boxes=Boxes(torch.tensor(boxes)),
        scores=torch.tensor([0.9, 0.8, 0.7]),
        pred_classes=torch.tensor([79, 79, 0]),
    )
    detections = FCOSPostProcessor().suppress(candidates)
    torch.testing.assert_close(detections.scores, torch.tensor([0.9, 0.8, 0.7]))


def test_cells_with_nan_take_no_place_of_others():
    outputs = make_maps(images=1)
    outputs.quality_logits[0][..., ::2] = math.nan
    process = FCOSPostProcessor(topk_candidates=5, nms_thresh=1.0)
    detections = process(outputs, LEVELS, [(96, 128)])[0]
    # Five from each level with as many candidates: P3 to P5 have 192, 48 and 12 cells of 3 classes.
    assert len(detections) >= 15 and detections.scores.isfinite().all()


def test_never_more_than_the_limit_also_with_equal_scores():
    outputs = make_maps(images=1)
    outputs = HeadOutputs(
        class_logits=[torch.zeros_like(x) for x in outputs.class_logits],
        ltrb=[torch.full_like(x, 3.0) for x in outputs.ltrb],  # small: none suppresses another
        quality_logits=[torch.zeros_like(x) for x in outputs.quality_logits],
    )
    process = FCOSPostProcessor(max_detections_per_image=10)
    assert len(process(outputs, LEVELS, [(96, 128)])[0]) == 10
    everything = FCOSPostProcessor(max_detections_per_image=-1)
    cells = sum(h * w for h, w in level_shapes(96, 128))
    assert 10 < len(everything(outputs, LEVELS, [(96, 128)])[0]) <= cells * 3


@pytest.mark.parametrize("thresh, all_candidates", [(0.0, True), (1.0, False)])
def test_threshold_at_its_ends(thresh, all_candidates):
    outputs = make_maps(images=1)
    process = FCOSPostProcessor(score_thresh=thresh, nms_thresh=1.0, max_detections_per_image=-1)
    detections = process(outputs, LEVELS, [(96, 128)])[0]
    everything = sum(x.numel() for x in outputs.class_logits)
    assert len(detections) == (everything if all_candidates else 0)


# sigmoid(0) is 1/2 exactly. So with a quality of 1/2 a class logit of 0 has the score 1/4 as a
# product, and 1/2 as its square root.
@pytest.mark.parametrize(
    "options",
    [
        {"score_thresh": 0.5},
        {"score_thresh": 0.25, "score_thresh_on": "score", "score_fusion": "product"},
        {"score_thresh": 0.5, "score_thresh_on": "score", "score_fusion": "sqrt"},
    ],
    ids=str,
)
def test_what_is_at_the_threshold_is_not_above_it(options):
    process, levels = FCOSPostProcessor(**options), Levels((8,))
    for logits, classes in (([0.0, -9.0], []), ([1e-6, 0.0], [0]), ([3.0, 0.0], [0])):
        outputs = HeadOutputs(
            class_logits=[torch.tensor(logits).view(1, 2, 1, 1)],
            ltrb=[torch.full((1, 4, 1, 1), 4.0)],
            quality_logits=[torch.zeros(1, 1, 1, 1)],
        )
        (detections,) = process(outputs, levels, [(8, 8)])
        assert detections.pred_classes.tolist() == classes
        # A cell is gathered only if it has such a class.
        assert len(process._select_cells(outputs, levels).image) == len(classes)


def test_a_limit_of_no_detections():
    outputs = make_maps()
    assert all(len(x) > 5 for x in FCOSPostProcessor()(outputs, LEVELS, [(96, 128)] * 2))
    process = FCOSPostProcessor(max_detections_per_image=0)
    for clip_boxes in ("before_nms", "after_nms"):
        process.clip_boxes = clip_boxes
        assert [len(x) for x in process(outputs, LEVELS, [(96, 128)] * 2)] == [0, 0]


@pytest.mark.parametrize("clip_boxes", ["before_nms", "after_nms"])
def test_detections_bring_their_cells_where_asked_for(clip_boxes):
    outputs, process = make_maps(), FCOSPostProcessor(clip_boxes=clip_boxes, topk_candidates=30)
    plain = process(outputs, LEVELS, [(96, 128)] * 2)
    candidates = process.candidates(outputs, LEVELS, [(96, 128)] * 2, with_cells=True)
    names = {"pred_boxes", "scores", "pred_classes"}
    for image, (a, b) in enumerate(zip(plain, map(process.suppress, candidates), strict=True)):
        assert set(a.get_fields()) == names
        cells = {"level", "rank", "locations", "ltrb", "class_probability", "quality"}
        assert set(b.get_fields()) == names | cells
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
        for d in (b[i] for i in range(len(b))):
            level, k = int(d.level), int(d.pred_classes)
            x, y = ((d.locations[0] / STRIDES[level]) - 0.5).long().tolist()
            assert torch.equal(d.ltrb[0], outputs.ltrb[level][image, :, y, x])
            p, q = outputs.class_logits[level][image, k, y, x], outputs.quality_logits[level]
            assert d.class_probability.item() == pytest.approx(p.sigmoid().item())
            assert d.quality.item() == pytest.approx(q[image, 0, y, x].sigmoid().item())
        assert len(b) > 10 and len(b.level.unique()) > 2
    everything = process.candidates(outputs, LEVELS, [(96, 128)] * 2, topk=10**6, with_cells=True)
    assert sum(map(len, everything)) > sum(map(len, candidates))
    for some, more in zip(candidates, everything, strict=True):
        best = more[more.rank < 30]
        assert torch.equal(best.scores, some.scores) and torch.equal(best.level, some.level)
        assert torch.equal(best.pred_boxes.tensor, some.pred_boxes.tensor)


def test_images_are_independent():
    outputs = make_maps(images=4)
    for x in outputs.class_logits:
        x[1] = x[3] = -99  # nothing in these images
    process = FCOSPostProcessor()
    together = process(outputs, LEVELS, [(96, 128)] * 4)
    assert [len(x) > 10 for x in together] == [True, False, True, False]
    for i in range(4):
        one = HeadOutputs(*([x[i : i + 1] for x in maps] for maps in outputs[:3]))
        alone = process(one, LEVELS, [(96, 128)])[0]
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
    outputs = HeadOutputs(logits, ltrb, quality)
    detections = FCOSPostProcessor()(outputs, LEVELS, [(2048, 2048)])[0]
    assert detections.pred_boxes.tensor.dtype == detections.scores.dtype == torch.float32
    assert detections.pred_boxes.tensor.isfinite().all()
    assert len(detections) == 100


def test_nan_and_infinite_maps_give_no_detection_there():
    outputs = make_maps(images=2)
    outputs.class_logits[0][0] = math.nan
    outputs.quality_logits[1][0] = math.nan
    outputs.ltrb[2][0] = math.inf
    detections = FCOSPostProcessor()(outputs, LEVELS, [(96, 128)] * 2)
    assert detections[0].scores.isfinite().all()
    assert detections[0].pred_boxes.tensor.isfinite().all()
    assert len(detections[1]) > 0


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5).map(float)), max_size=40),
)
def test_rank_in_groups(pairs):
    group = torch.tensor([g for g, _ in pairs], dtype=torch.int64)
    scores = torch.tensor([s for _, s in pairs])
    expected, ranks = [], []
    for g in range(4):
        mine = [i for i, (other, _) in enumerate(pairs) if other == g]
        expected += sorted(mine, key=lambda i: -pairs[i][1])  # sorted() is stable
        ranks += range(len(mine))
    order, rank = rank_in_groups(scores, group)
    assert order.tolist() == expected and rank.tolist() == ranks
