"""Metrics of continual learning against numbers worked out by hand."""

import math
import subprocess
import sys

import numpy as np
import pytest

from kalman_peft.metrics import (
    average_accuracy,
    backward_transfer,
    continual_metrics,
    forgetting,
    forward_transfer,
    learning_accuracy,
)
from kalman_peft.plots import plot_accuracy_matrix


NAN = math.nan
R = [
    [0.1, 0.2, 0.3],
    [0.9, 0.4, 0.2],
    [0.7, 0.8, 0.6],
    [0.5, 0.75, 1.0],
]
# By hand: last row 2.25 / 3; diagonal 2.7 / 3; (-0.4 - 0.05) / 2; ((0.4 - 0.2) + (0.6 - 0.3)) / 2; (0.4 + 0.05) / 2.
EXPECTED = {
    "average_accuracy": 0.75, "learning_accuracy": 0.9, "backward_transfer": -0.225, "forward_transfer": 0.25,
    "forgetting": 0.225,
}  # fmt: skip


def test_metrics_by_hand():
    assert continual_metrics(R) == pytest.approx(EXPECTED)


def test_forgetting_is_from_the_best_not_from_the_diagonal():
    scores = np.array(R)
    scores[2, 0] = 0.95  # better after the second task than when it was learnt
    assert forgetting(scores) == pytest.approx((0.45 + 0.05) / 2)
    assert backward_transfer(scores) == pytest.approx(-0.225)
    scores[1, 1] = 0.85  # Chaudhry's maximum is over all earlier rows, also those before the task was learnt
    assert forgetting(scores) == pytest.approx((0.45 + 0.10) / 2)


def test_losses_turn_the_signs():
    losses = 1 - np.array(R)
    found = continual_metrics(losses, higher_is_better=False)
    for name in ("backward_transfer", "forward_transfer", "forgetting"):
        assert found[name] == pytest.approx(EXPECTED[name])
    assert (found["average_loss"], found["learning_loss"]) == pytest.approx((0.25, 0.1))


def test_what_was_not_measured_is_left_out():
    scores = np.array(R)
    scores[0] = NAN
    assert math.isnan(forward_transfer(scores))
    scores[1:, 1] = NAN
    assert average_accuracy(scores) == pytest.approx(0.75)
    assert learning_accuracy(scores) == pytest.approx(0.95)
    assert backward_transfer(scores) == forgetting(scores) * -1 == pytest.approx(-0.4)


def test_tasks_to_come_are_columns_without_rows():
    scores = np.array(R)[:3]
    assert average_accuracy(scores) == pytest.approx(0.75)
    assert learning_accuracy(scores) == pytest.approx(0.85)
    assert backward_transfer(scores) == pytest.approx(-0.2)
    assert forward_transfer(scores) == pytest.approx(0.2)


def test_one_task_has_no_transfer():
    found = continual_metrics([[0.1], [0.9]])
    assert (found["average_accuracy"], found["learning_accuracy"]) == (0.9, 0.9)
    assert all(math.isnan(found[name]) for name in ("forgetting", "backward_transfer", "forward_transfer"))


@pytest.mark.parametrize("scores", [[[0.1]], [0.1, 0.2], np.zeros((4, 2))])
def test_raises_when_the_shape_is_wrong(scores):
    with pytest.raises(ValueError, match=r"expected a row before any task and one after each"):
        continual_metrics(scores)


def test_raises_when_a_score_is_infinite():
    with pytest.raises(ValueError, match="use NaN for what was not measured"):
        average_accuracy([[0.0], [math.inf]])


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_heat_map_names_tasks_and_values(tmp_path, higher_is_better):
    scores = np.array(R)
    scores[0, 0] = NAN
    figure = plot_accuracy_matrix(
        scores, ["a", "b", "c"], tmp_path / "map.png", label="score", higher_is_better=higher_is_better
    )
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["start", "a", "b", "c"]
    texts = {t.get_position(): t.get_text() for t in axes.texts}
    assert texts[0, 1] == "0.90" and texts[2, 3] == "1.00" and (0, 0) not in texts and len(texts) == 11
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert figure.axes[1].get_ylabel() == "score"
    # Good scores are dark, on which white is read.
    colours = {t.get_text(): t.get_color() for t in axes.texts}
    assert colours["1.00"] == ("white" if higher_is_better else "black")


def test_raises_when_names_do_not_fit():
    with pytest.raises(ValueError, match="names has 2 entries for 3 columns"):
        plot_accuracy_matrix(R, ["a", "b"])


def test_raises_when_matplotlib_is_missing():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from kalman_peft.plots import plot_accuracy_matrix\n"
        "try: plot_accuracy_matrix([[0.], [1.]], ['a'])\n"
        "except ImportError as error: assert 'kalman_peft[plots]' in str(error)\n"
        "else: raise SystemExit('nothing raised')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
