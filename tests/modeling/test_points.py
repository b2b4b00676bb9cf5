import torch
from hypothesis import given
from hypothesis import strategies as st

from fcos_d2.modeling.points import boxes_to_ltrb, cell_locations, centerness, ltrb_to_boxes

pixel = st.floats(-1000, 1000, width=32)


def test_locations_are_cell_centers():
    # Stride 16: 16/2 = 8, 8 + 16 = 24, 8 + 2 * 16 = 40.
    x, y = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0, 1])
    assert cell_locations(x, y, 16).tolist() == [[8, 8], [24, 8], [40, 8], [8, 24]]


def test_locations_with_another_offset():
    # At the corner of the cells: 16 * 2 = 32, 16 * 1 = 16; at a quarter: 16 * 2.25 = 36, 20.
    x, y = torch.tensor([2]), torch.tensor([1])
    assert cell_locations(x, y, 16, 0.0).tolist() == [[32, 16]]
    assert cell_locations(x, y, 16, 0.25).tolist() == [[36, 20]]


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
