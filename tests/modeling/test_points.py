import torch
from hypothesis import given
from hypothesis import strategies as st

from fcos_d2.modeling.points import boxes_to_ltrb, cell_locations, ltrb_to_boxes

pixel = st.floats(-1000, 1000, width=32)


def test_locations_are_cell_centers():
    # Stride 16: 16/2 = 8, 8 + 16 = 24, 8 + 2 * 16 = 40.
    x, y = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0, 1])
    assert cell_locations(x, y, 16).tolist() == [[8, 8], [24, 8], [40, 8], [8, 24]]


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
