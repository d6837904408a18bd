"""The recipe of permuted digits: its tasks, its methods against loops by hand, its files."""

import gzip
import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import permuted_mnist as recipe
from kalman_peft import AdapterState
from kalman_peft.metrics import average_accuracy
from recipe_tools.continual_methods import Method, Training, run
from recipe_tools.image_tasks import accuracy, batches, between_rotations, make_mlp, make_tasks
from recipe_tools.images import load_images
from recipe_tools.runs import read_run


HOW = Training(epochs=2, batch_size=32, learning_rate=1e-2, curvature_samples=60)


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory):
    """Ten patterns of 8 x 8 pixels and noise, in the file of scikit-learn's digits."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 17, (10, 64), generator=generator)
    labels = torch.randint(0, 10, (600,), generator=generator)
    pixels = (patterns[labels] + 3 * torch.randn(600, 64, generator=generator)).round().clamp(0, 16).long()
    rows = torch.cat([pixels, labels[:, None]], dim=1).tolist()
    path = tmp_path_factory.mktemp("digits") / "digits.csv.gz"
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipe_tools.images.package_path", lambda *_: path)
        yield load_images("digits")


def tasks_of(images, number=2, kind="permuted"):
    return make_tasks(kind, images[0], images[1], number, 100, 80, 0)


def learnt(text, images, number=2, how=HOW, seed=0):
    return run(Method.parse(text), make_mlp(64, 20, 2, 4, seed), tasks_of(images, number), how, seed)


def test_permuted_tasks_are_the_same_images_in_other_orders(images):
    first, second = tasks_of(images)
    assert first.train["pixel_values"].shape == (100, 64) and len(first.test["labels"]) == 80
    assert torch.equal(first.test["labels"], second.test["labels"])
    assert not torch.equal(first.test["pixel_values"], second.test["pixel_values"])
    sort = lambda task: task.test["pixel_values"].sort(1).values  # noqa: E731
    assert torch.equal(sort(first), sort(second))
    again = tasks_of(images)[1]
    assert torch.equal(again.train["pixel_values"], second.train["pixel_values"])


def test_rotated_tasks_begin_upright(images):
    upright, quarter = tasks_of(images, kind="rotated")
    pixels = upright.test["pixel_values"].view(-1, 8, 8)
    torch.testing.assert_close(quarter.test["pixel_values"].view(-1, 8, 8), pixels.rot90(1, (1, 2)), atol=1e-5, rtol=0)


def test_half_way_between_rotations_is_half_the_turn(images):
    (halfway,) = between_rotations(images[1], 2, 80, 0)
    (upright, _) = tasks_of(images, kind="rotated")
    middle = make_tasks("rotated", images[0], images[1], 3, 100, 80, 0)[1]  # of 0, 45 and 90 degrees
    assert torch.equal(halfway["pixel_values"], middle.test["pixel_values"])
    assert torch.equal(halfway["labels"], upright.test["labels"])


def test_interpolation_is_measured_between_tasks(images):
    tasks = tasks_of(images, 3, "rotated")
    between = between_rotations(images[1], 3, 80, 0)
    how = Training(epochs=30, batch_size=32, learning_rate=1e-2, curvature_samples=60)
    find = lambda text: run(Method.parse(text), make_mlp(64, 20, 2, 4, 0), tasks, how, 0, between).between  # noqa: E731
    plain, still, moving = find("sequential"), find("filter:rank=2"), find("filter:rank=2,q=10")
    assert plain.keys() == {"before", "both"} and all(len(row) == 2 for row in plain.values())
    # Without motion every belief between two tasks is the last one.
    model = make_mlp(64, 20, 2, 4, 0)
    run(Method.parse("filter:rank=2"), model, tasks, how, 0)
    assert still["interpolated"] == [accuracy(model, test) for test in between]
    assert moving["interpolated"] != still["interpolated"]
    assert find("separate") == {}


def test_sequential_is_adamw_by_hand(images):
    found, tasks = learnt("sequential", images), tasks_of(images)
    model, generator = make_mlp(64, 20, 2, 4, 0), torch.Generator().manual_seed(0)
    expected = [[accuracy(model, task.test) for task in tasks]]
    for task in tasks:
        optimizer = torch.optim.AdamW(AdapterState(model).parameters().values(), lr=1e-2, weight_decay=0.0)
        for step, batch in enumerate(batches(task.train, 32, 2, generator)):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 8)
            optimizer.zero_grad()
            cross_entropy(model(**batch).logits, batch["labels"]).backward()
            optimizer.step()
        expected.append([accuracy(model, task.test) for task in tasks])
    assert found.scores == expected
    assert found.own["learnt"] == [expected[1][0], expected[2][1]]


def test_methods_do_what_they_are_called(images):
    how = Training(epochs=40, batch_size=32, learning_rate=1e-2, curvature_samples=100)
    found = {name: learnt(name, images, how=how) for name in
             ("sequential", "l2:strength=1e6", "filter:structure=ekfac,strength=1e6", "separate", "joint", "replay:share=1")}  # fmt: skip
    kept = {name: one.scores[-1][0] - found["sequential"].scores[-1][0] for name, one in found.items()}
    assert min(kept["separate"], kept["joint"], kept["replay:share=1"]) > 0.1
    frozen = found["l2:strength=1e6"].scores
    assert max(abs(frozen[-1][0] - frozen[0][0]), abs(frozen[-1][1] - frozen[0][1])) < 0.1  # held at the start
    held = found["filter:structure=ekfac,strength=1e6"]
    assert abs(held.scores[2][0] - held.scores[1][0]) < 0.05  # at the first mode, once it is known
    assert math.isnan(found["joint"].scores[1][0]) and math.isnan(found["separate"].scores[1][1])


def test_noise_opens_the_filter_where_it_is_told_to(images):
    figures = {q: learnt(f"filter:rank=2,{q}", images).figures for q in ("q=0", "q=0.1", "q=0.1,where=first")}
    stability = {q: found[1]["stability"] for q, found in figures.items()}
    assert stability["q=0"] == 1 > stability["q=0.1,where=first"] > stability["q=0.1"]
    plasticity = [figures[q][1]["plasticity"] for q in figures]
    assert plasticity[0] == 0 and plasticity[1] == pytest.approx(0.1, rel=1e-3) and 0 < plasticity[2] < 0.1


@pytest.mark.parametrize(
    "text",
    ["filter:rank=3,q=0.0001,where=first", "filter:q=1.23456789e-05", "ewc:strength=10", "replay:share=0.05", "joint"],
)
def test_methods_are_written_as_they_are_read(text):
    assert str(Method.parse(text)) == text and Method.parse(str(Method.parse(text))) == Method.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("filter:rank=-1", "rank must be at least 0"), ("filter:rank=a", "rank must be a whole number, got 'a'"),
     ("filter:q=nan", "q must be at least 0"), ("filter:prior=0", "prior must be above 0"),
     ("ewc:strength=nan", "strength must be at least 0"), ("filter:keep=7", "keep must be 0 or 1"),
     ("filter:rank=1,rank=2", "rank is given twice"), ("filter:structure=foo", "structure must be one of"),
     ("filter:structure=ekfac,rank=3", "rank goes with structure=low_rank only"),
     ("filter:where=first", "give q= too"), ("adam", "expected one of"), ("joint:q=1", "joint has no option 'q'"), ("filter:where=last", "where is 'all'"),
     ("filter:fisher=empirical", "fisher is 'sampled' or 'exact'"), ("replay:share=2", r"share in \(0, 1\]")],
)  # fmt: skip
def test_raises_when_a_method_is_none(text, message):
    with pytest.raises(ValueError, match=message):
        Method.parse(text)


def test_recipe_writes_runs_tables_and_figures(tmp_path):
    arguments = [
        "--tasks", "2", "--samples", "60", "--heldout", "50", "--hidden", "16", "--r", "4", "--epochs", "2", "--seeds",
        "0", "1", "--methods", "sequential", "filter:rank=2,q=1e-3", "joint", "--output_dir", str(tmp_path),
    ]  # fmt: skip
    summary = recipe.main(arguments)
    folder = tmp_path / "digits-permuted-2"
    files = sorted((folder / "runs").iterdir())
    assert len(files) == 6 and {p.name for p in folder.iterdir()} >= {"matrix.png", "traces.png", "report.md"}
    record = json.loads(files[0].read_text())
    method = record["run"]["method"]
    two = [
        json.loads(f.read_text())["result"]["scores"]
        for f in files
        if json.loads(f.read_text())["run"]["method"] == method
    ]
    expected = sum(average_accuracy(scores) for scores in two) / 2
    assert summary["results"][method]["average_accuracy"]["mean"] == pytest.approx(expected)
    assert "forgetting" not in summary["results"]["joint"]
    before = {f: f.stat().st_mtime_ns for f in files}
    assert recipe.main(arguments)["results"] == summary["results"]
    assert {f: f.stat().st_mtime_ns for f in files} == before
    with pytest.raises(ValueError, match="a run with other settings"):
        recipe.main([*arguments, "--learning_rate", "0.1"])


def test_orders_are_runs_of_their_own(tmp_path):
    arguments = [
        "--kind", "rotated", "--tasks", "2", "--samples", "60", "--heldout", "50", "--hidden", "16", "--r", "4",
        "--epochs", "20", "--seeds", "0", "--methods", "filter:rank=2,q=1e-3", "--output_dir", str(tmp_path),
    ]  # fmt: skip
    summary = recipe.main([*arguments, "--orders", "given", "reversed"])
    files = sorted((tmp_path / "digits-rotated-2" / "runs").iterdir())
    given, back = (json.loads(f.read_text())["result"] for f in files)
    assert given["scores"][0] == back["scores"][0][::-1] and given["scores"][1] != back["scores"][1]
    mean = summary["results"]["filter:rank=2,q=0.001"]["interpolated"]["mean"]
    assert mean == pytest.approx((given["between"]["interpolated"][0] + back["between"]["interpolated"][0]) / 2)
    with pytest.raises(SystemExit):
        recipe.main([*arguments, "--orders", "sideways"])


def test_no_run_is_counted_twice():
    options = recipe.parse(
        ["--seeds", "1", "0", "1", "--orders", "given", "given", "--methods", "l2", "l2:strength=1"]
    )
    assert options.seeds == [1, 0] and options.orders == ["given"] and options.methods == ["l2"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--hidden", "0"], "--hidden"),
        (["--layers", "-1"], "must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--data", "x"], "--data must be one of"),
        (["--seeds", "-1"], "--seeds [-1]: each must be in"),
        (["--learning_rate", "nan"], "--learning_rate must be above 0"),
    ],
)
def test_raises_when_options_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        recipe.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"run": {"method"', "{}", "[]"])
def test_raises_when_a_file_is_no_whole_run(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is no whole record of a run; delete it"):
        read_run(tmp_path / "run.json", {"method": "l2"})
