import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fcos_d2.modeling.points import Levels, boxes_to_ltrb, centerness, ltrb_to_boxes

pixel = st.floats(-1000, 1000, width=32)


def test_locations_are_cell_centers():
    # Stride 16: 16/2 = 8, 8 + 16 = 24, 8 + 2 * 16 = 40.
    x, y = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0, 1])
    assert Levels((4, 16)).locations(1, x, y).tolist() == [[8, 8], [24, 8], [40, 8], [8, 24]]


def test_locations_with_another_offset():
    # At the corner of the cells: 16 * 2 = 32, 16 * 1 = 16; at a quarter: 16 * 2.25 = 36, 20.
    x, y = torch.tensor([2]), torch.tensor([1])
    assert Levels((16,), 0.0).locations(0, x, y).tolist() == [[32, 16]]
    assert Levels((16,), 0.25).locations(0, x, y).tolist() == [[36, 20]]


def test_locations_of_several_levels_at_once():
    # Column 1, row 2 at strides 8 and 32: 1.5 * 8 = 12, 2.5 * 8 = 20; 1.5 * 32 = 48, 2.5 * 32 = 80.
    level, x, y = torch.tensor([0, 2]), torch.tensor([1, 1]), torch.tensor([2, 2])
    assert Levels((8, 16, 32)).locations(level, x, y).tolist() == [[12, 20], [48, 80]]


@pytest.mark.parametrize("offset", [-0.1, 1.5, math.nan, "0.5"])
def test_offset_is_within_the_cell(offset):
    with pytest.raises(ValueError, match="LOCATION_OFFSET must be a number from 0 to 1"):
        Levels((8,), offset)


def test_all_locations_go_row_by_row():
    locations = Levels((8,)).all_locations(0, 2, 3, torch.device("cpu"))
    assert locations.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]


def test_centerness_hand_computed():
    # At the centre 1. With l, r = 1, 4 and t, b = 3, 3: sqrt(1/4 * 1) = 1/2.
    # With l, r = 2, 8 and t, b = 9, 1: sqrt(2/8 * 1/9) = 1/6.
    ltrb = torch.tensor([[5.0, 5, 5, 5], [1, 3, 4, 3], [2, 9, 8, 1]])
    torch.testing.assert_close(centerness(ltrb), torch.tensor([1, 1 / 2, 1 / 6]))


def test_ltrb_of_a_box():
    # From (10, 20) to the sides of (4, 5, 30, 60): left 6, top 15, right 20, bottom 40.
    ltrb = boxes_to_ltrb(torch.tensor([[10.0, 20.0]]), torch.tensor([[4.0, 5.0, 30.0, 60.0]]))
    assert ltrb.tolist() == [[6, 15, 20, 40]]


@given(st.lists(pixel, min_size=4, max_size=4), st.lists(pixel, min_size=2, max_size=2))
def test_round_trip(box, location):
    box, location = torch.tensor([box]), torch.tensor([location])
    torch.testing.assert_close(
        ltrb_to_boxes(location, boxes_to_ltrb(location, box)), box, atol=1e-3, rtol=0
    )
