"""Pictures of errors."""

import numpy as np
import pytest
from report_cases import make_results, make_truth

from fcos_d2.report import BoxEvaluation, find_errors
from fcos_d2.report.error_pictures import draw_error


@pytest.mark.parametrize(
    "size, box",
    [
        ((10, 10000), (0, 0, 4000, 10)),
        ((10000, 3), (0, 0, 3, 9000)),
        ((1, 1), (0, 0, 1, 1)),
        ((100, 100), (50, 50, 0, 0)),
        ((100, 100), (150, -50, 20, 20)),
    ],
)
def test_images_and_boxes_of_odd_shapes(size, box):
    truth = make_truth([(0, 10, *box, False)], images=1, size=size)
    results = make_results([(0, 20, *box, 0.9)])
    evaluation = BoxEvaluation(truth, results)
    for error in find_errors(evaluation, 0.5):
        picture = draw_error(np.zeros((*size, 3), dtype=np.uint8), error, evaluation, 0.5)
        assert picture.dtype == np.uint8 and picture.std() > 5
        assert min(picture.shape[:2]) > 15 and max(picture.shape[:2]) < 900
