"""The pendulum, its expert, and the recipe that adapts a decision transformer to it."""

import json
import math

import decision_transformer as recipe
import pytest
import torch

from recipe_tools.decisions import CONTEXT, EPISODE, Frozen, Retrained, contexts, make_learner, pretrain, success_rate
from recipe_tools.pendulum import STEP, TORQUE, Pendulum, demonstrate, succeeded


TINY = [
    "--episodes", "1", "--length", "3", "--trials", "2", "--pretrain_episodes", "2", "--pretrain_steps", "3",
    "--hidden", "8", "--seeds", "0", "1", "--tune_seeds", "2",
]  # fmt: skip


class Expert(Frozen):
    """Acts by the regulator of one pendulum."""

    def __init__(self, pendulum):
        self.gain = pendulum.gain().float()

    def act(self, inputs):
        return -(inputs["states"][:, -1] @ self.gain)[:, None] / TORQUE


def test_without_friction_and_torque_energy_stays():
    pendulum = Pendulum(1.3, 0.8, 0.0)
    state, energies = torch.tensor([[0.5, 0.0]], dtype=torch.float64), []
    for _ in range(400):
        state = pendulum.step(state, torch.zeros(1, dtype=torch.float64))
        theta, omega = state[0]
        energies.append(float(1.3 * 0.64 * omega**2 / 2 + 1.3 * 9.81 * 0.8 * theta.cos()))
    assert max(energies) - min(energies) < 0.3 * 1.3 * 9.81 * 0.8  # symplectic: it oscillates, and does not drift
    assert abs(sum(energies[:200]) - sum(energies[200:])) / 200 < 0.05 * 1.3 * 9.81 * 0.8


@pytest.mark.parametrize("pendulum", [recipe.NOMINAL, *recipe.SHIFTED.values()])
def test_the_gain_is_that_of_the_least_cost(pendulum):
    # No other linear law nearby is cheaper, from a start near upright.
    def cost(gain):
        state, total = torch.tensor([[0.01, 0.0]], dtype=torch.float64), 0.0
        for _ in range(600):
            torque = -(state @ gain)
            total += float(state[0, 0] ** 2 + 0.1 * state[0, 1] ** 2 + 0.01 * torque[0] ** 2)
            state = pendulum.step(state, torque)
        return total

    gain = pendulum.gain()
    least = cost(gain)
    for change in ((1.02, 1.0), (0.98, 1.0), (1.0, 1.02), (1.0, 0.98)):
        assert cost(gain * torch.tensor(change, dtype=torch.float64)) > least
    assert success_rate(Expert(pendulum), pendulum, 20, -1.0, 0) == 1.0


def test_a_shift_is_too_much_for_the_expert_of_before():
    order = [recipe.NOMINAL, *recipe.SHIFTED.values()]
    first, second, third = order[:3]
    assert success_rate(Expert(first), second, 20, -1.0, 0) < 0.5
    assert success_rate(Expert(second), third, 20, -1.0, 0) < 0.5


def test_success_needs_an_upright_end_and_no_fall():
    angles = torch.zeros(3, EPISODE)
    angles[1, 10] = 1.2
    angles[2, -3] = 0.2
    assert succeeded(angles).tolist() == [True, False, False]


def test_demonstrations_add_up():
    shown = demonstrate(recipe.NOMINAL, 3, 7, 0.1, torch.Generator().manual_seed(0))
    costs = -(shown.returns[:, :-1] - shown.returns[:, 1:])
    torque = TORQUE * shown.actions[..., 0]
    expected = shown.states[..., 0] ** 2 + 0.1 * shown.states[..., 1] ** 2 + 0.01 * torque**2
    torch.testing.assert_close(costs[..., 0], expected[:, :-1], rtol=1e-4, atol=1e-5)
    moved = recipe.NOMINAL.step(shown.states[:, 0], torque[:, 0])
    torch.testing.assert_close(moved, shown.states[:, 1])
    torch.testing.assert_close(shown.states[:, 1, 0] - shown.states[:, 0, 0], STEP * shown.states[:, 1, 1])
    assert not torch.equal(shown.actions, shown.expert)


def test_contexts_end_at_their_step_and_hide_its_action():
    shown = demonstrate(recipe.NOMINAL, 2, 7, 0.1, torch.Generator().manual_seed(0))
    inputs, targets = contexts(shown)
    assert inputs["states"].shape == (14, CONTEXT, 2) and targets.shape == (14, 1)
    torch.testing.assert_close(inputs["states"][7 + 6], shown.states[1, 2:7])
    torch.testing.assert_close(inputs["actions"][7 + 6, :-1], shown.actions[1, 2:6])
    assert (inputs["actions"][:, -1] == 0).all()
    assert inputs["attention_mask"][1].tolist() == [0, 0, 0, 1, 1] and inputs["timesteps"][6].tolist() == [
        2,
        3,
        4,
        5,
        6,
    ]
    torch.testing.assert_close(targets[8], shown.expert[1, 1])


@pytest.fixture(scope="module")
def pretrained():
    shown = demonstrate(recipe.NOMINAL, 10, 20, 0.1, torch.Generator().manual_seed(0))
    return pretrain(shown, hidden=8, steps=40, rate=3e-3, seed=0), contexts(shown)


METHODS = ["kbt:variance=0.01", "kbt:conditioned=5,relaxation=0.1", "adamw:lr=1e-2,memory=3,steps=2", "loko:memory=2"]


@pytest.mark.parametrize("method", METHODS)
def test_learners_learn_and_leave_the_model_alone(pretrained, method):
    model, (inputs, targets) = pretrained
    before = {name: p.clone() for name, p in model.named_parameters()}
    learner = make_learner(method, model, inputs)
    rows = slice(30, 38)
    some, wanted = {k: x[rows] for k, x in inputs.items()}, 3 * targets[rows] + 0.5
    start = (learner.act(some) - wanted).square().mean()
    for _ in range(4):
        for i in range(8):
            learner.learn({k: x[i : i + 1] for k, x in some.items()}, wanted[i : i + 1])
    assert (learner.act(some) - wanted).square().mean() < 0.7 * start
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(name.count("lora") for name, _ in model.named_parameters())


def test_a_model_is_tried_with_its_own_actions_in_its_context(pretrained):
    seen = []

    class Watching(Frozen):
        def act(self, inputs):
            seen.append({k: x.clone() for k, x in inputs.items()})
            return super().act(inputs)

    rate = success_rate(Watching(pretrained[0]), recipe.NOMINAL, 2, -1.0, 0)
    assert rate in (0.0, 0.5, 1.0) and len(seen) == EPISODE
    assert seen[-1]["timesteps"][0].tolist() == list(range(EPISODE - CONTEXT, EPISODE))
    with torch.no_grad():
        first = pretrained[0](**seen[0]).action_preds[:, -1]
    torch.testing.assert_close(seen[1]["actions"][:, 0], first)
    torch.testing.assert_close(
        seen[1]["states"][:, 1], recipe.NOMINAL.step(seen[0]["states"][:, 0], TORQUE * first[:, 0])
    )
    assert (seen[1]["returns_to_go"][:, 1] > -1).all()  # what has been paid is taken off the debt


def test_memory_is_limited():
    model, seen = pretrain(demonstrate(recipe.NOMINAL, 1, 8, 0.1, torch.Generator()), hidden=8, steps=1, rate=1e-3,
                           seed=0), {}  # fmt: skip
    learner = make_learner("adamw:memory=3", model, seen)
    assert isinstance(learner, Retrained)
    inputs, targets = contexts(demonstrate(recipe.NOMINAL, 1, 8, 0.1, torch.Generator()))
    for i in range(5):
        learner.learn({k: x[i : i + 1] for k, x in inputs.items()}, targets[i : i + 1])
    assert len(learner.memory.rows) == 3
    torch.testing.assert_close(learner.memory.rows[0][1], targets[2:3])


def test_recipe_writes_table_figure_and_json_and_does_not_repeat(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(recipe, "success_rate", lambda learner, *rest: rates.append(learner) or 0.5)  # dear, see above
    arguments = [
        *TINY, "--methods", "frozen", "kbt", "adamw:memory=2", "--grids", "kbt variance=0.01/0.1", "adamw lr=1e-3/1e-2",
        "--output_dir", str(tmp_path),
    ]  # fmt: skip
    summary = recipe.main(arguments)
    assert set(summary["tuning"]["kbt"]["error"]) == {"kbt:variance=0.01", "kbt:variance=0.1"}
    chosen = summary["tuning"]["adamw:memory=2"]["chosen"]
    errors = summary["tuning"]["adamw:memory=2"]["error"]
    assert errors[chosen] == min(errors.values()) and chosen.startswith("adamw:memory=2,lr=")
    result = summary["results"]["frozen"]
    assert result["all"]["error"]["mean"] > 0 and set(result["phases"]) == set(recipe.SHIFTED)
    stored = json.loads((tmp_path / "runs" / "frozen-s1.json").read_text())["result"]
    assert all(len(phase["errors"]) == 3 for phase in stored["phases"].values())
    assert json.loads((tmp_path / "summary.json").read_text())["results"].keys() == summary["results"].keys()
    assert (tmp_path / "decision_transformer.png").stat().st_size > 10_000
    assert chosen in (tmp_path / "report.md").read_text()

    assert len(rates) == 3 + 6 * (4 + 6)  # before any shift, by seed; before and after each phase

    monkeypatch.setattr(recipe, "pretrain", None)  # nothing is run again
    assert recipe.main(arguments)["results"].keys() == summary["results"].keys()
    with pytest.raises(ValueError, match=r"is a run with other settings: settings\.noise was 0\.1, is 0\.2"):
        recipe.main([*arguments, "--noise", "0.2"])


def test_a_method_that_diverges_is_not_chosen(tmp_path, monkeypatch):
    def run(self, method, seed):
        return {"phases": {"a": {"errors": [math.nan if "lr=1" in method else 0.5]}}}

    monkeypatch.setattr(recipe.Runner, "run", run)
    o = recipe.parse([*TINY, "--grids", "adamw lr=1/0.1", "--output_dir", str(tmp_path)])
    found = recipe.Runner(o).tune("adamw")
    assert found == {"error": {"adamw:lr=1": None, "adamw:lr=0.1": 0.5}, "chosen": "adamw:lr=0.1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1", "--tune_seeds", "1"], "share {1}"),
        (["--trials", "0"], "must be positive"),
        (["--length", "81"], "at most 80"),
        (["--hidden", "7"], "must be even"),
    ],
)
def test_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        recipe.parse(arguments)
    assert message in capsys.readouterr().err


def test_methods_and_grids_are_refused_by_name(pretrained):
    with pytest.raises(ValueError, match="the kind is none of frozen, adamw, loko, kbt"):
        make_learner("sgd", pretrained[0], {})
    with pytest.raises(ValueError, match="unexpected keyword argument 'rate'"):
        make_learner("adamw:rate=1", pretrained[0], {})
    with pytest.raises(ValueError, match="expected 'KIND OPTION=VALUE/VALUE"):
        recipe.settings_of("kbt", ["kbt variance"])
    assert recipe.settings_of("adamw:memory=2", ["adamw lr=1/2"]) == ["adamw:memory=2,lr=1", "adamw:memory=2,lr=2"]
