"""Plots of unusual runs and data sets."""

import pytest

from fcos_d2.report.run_charts import ap_figure, training_figure


def test_bars_of_many_classes_and_of_two_with_one_name():
    names = [f"class {i}" for i in range(1200)] + ["class 0"]
    first = [float(i % 100) for i in range(1200)] + [None]
    figure = ap_figure(names, {"run": first, "other": first[::-1]}, "AP")
    assert max(figure.get_size_inches()) < 40
    assert "the 80 lowest of 1201" in figure.axes[0].get_title()
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(shown) == 80 and shown[0] == "class 0" and "class 99" not in shown

    few = ap_figure(["a", "b", "a"], {"run": [3.0, None, 1.0]}, "AP")
    assert [bar.get_width() for bar in few.axes[0].patches] == pytest.approx([3, 0, 1])
    assert few.axes[0].get_title() == "AP"


def test_names_with_an_underscore_are_in_the_legend():
    figure = ap_figure(["a"], {"_run": [1.0], "other": [2.0]}, "AP")
    assert [x.get_text().strip() for x in figure.legends[0].get_texts()] == ["_run", "other"]


@pytest.mark.filterwarnings("error")
def test_a_training_of_one_iteration():
    figure = training_figure({"run": [{"iteration": 0, "total_loss": 1.0}]})
    assert figure.axes[0].get_xlim()[1] > 0


def test_losses_on_test_images_are_beside_those_of_the_training():
    rows = [
        {"iteration": 0, "total_loss": 3.0, "test_loss": 4.0},
        {"iteration": 9, "total_loss": 1.0, "test_loss": 5.0, "test/loss_fcos_cls": 2.0},
    ]
    for runs, labels in (
        ({"run": rows}, ["total_loss", "test images"]),
        ({"a": rows, "b": rows[:1]}, ["a", "a, test images", "b", "b, test images"]),
    ):
        axes = training_figure(runs).axes[0]
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert list(lines) == labels
        assert lines[labels[1]] == [4.0, 5.0]
        assert axes.get_ylim()[1] > 5
