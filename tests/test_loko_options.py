"""Options of LoKO: what is refused, by name, and that none is without effect."""

from dataclasses import fields

import pytest
import torch
from toys import Linear
from training import make_tokenizer, trainer

from kalman_peft import (
    CategoricalObservation,
    GaussianObservation,
    KalmanConfig,
    LikelihoodObservation,
    LoKO,
    LoKOOptions,
    create_loko_optimizer,
)
from kalman_peft.loko.options import parse_noise


NAN = float("nan")
BAD = [
    ("mode", "published"), ("prior", "flat"), ("memory", "full"), ("columns", "all"), ("gain", "optimal"), ("form", "probit"),
    ("rank", 0), ("rank", 1.5), ("rank", None), ("dense_limit", 0), ("block_limit", 0), ("num_columns", 0),
    ("max_columns", 0), ("top_k", 0), ("curvature_every", 0), ("first_draws", -1), ("max_skipped", -1),
    ("per_sequence", "yes"), ("averaging", "yes"), ("averaging", None), ("seed", 0.5), ("seed", None),
    ("prior_tokens", 0.0), ("prior_tokens", NAN), ("tempering", 0.0), ("tempering", NAN), ("tempering", None),
    ("correlation", -0.1), ("correlation", 1.1), ("correlation", NAN), ("adaptive_noise", 1.0),
    ("adaptive_noise", -0.1), ("noise_decay", 1.0), ("noise_decay", NAN), ("forgetting", 0.0), ("forgetting", 1.1),
    ("process_noise", -1.0), ("process_noise", {"lora_A": -1.0}), ("process_noise", NAN), ("process_noise", None),
    ("damping", -1.0), ("damping", float("inf")), ("outlier_threshold", 0.0), ("max_decrease", 0.0),
    ("max_decrease", float("inf")), ("trust_decay", -1.0), ("trust_decay", NAN), ("max_kl", 0.0), ("max_kl", -1.0),
    ("initial_bound", 0.0),
]  # fmt: skip


@pytest.mark.parametrize("name,value", BAD)
def test_raises_when_an_option_is_out_of_range(name, value, tmp_path):
    others = {"mode": "paper"} if name == "initial_bound" else {}
    with pytest.raises(ValueError, match=f"^{name} "):
        LoKOOptions(**{name: value}, **others)
    given = {f"loko_{key}": v for key, v in ({name: value} | others).items()}
    if name != "seed" and not (name == "tempering" and value is None):  # the Trainer's, and its own default
        with pytest.raises(ValueError, match=f"loko_{name} "):
            KalmanConfig(str(tmp_path), optimizer="loko", use_cpu=True, **given)


def test_every_option_has_a_bad_value():
    assert {name for name, _ in BAD} == {f.name for f in fields(LoKOOptions)}


PAIRS = [
    ({"initial_bound": 0.1}, ("initial_bound=0.1", "mode='paper'")),
    ({"top_k": 2, "columns": "sampled"}, ("top_k=2", "columns='exact'")),
    ({"top_k": 2, "columns": "empirical"}, ("top_k=2", "columns='exact'")),
    ({"num_columns": 2, "columns": "exact"}, ("num_columns=2", "columns='sampled'")),
    ({"num_columns": 2, "columns": "empirical"}, ("num_columns=2", "columns='sampled'")),
    ({"per_sequence": False, "columns": "exact"}, ("per_sequence=False", "columns='exact'")),
    ({"per_sequence": False, "columns": "empirical"}, ("per_sequence=False", "columns='empirical'")),
    ({"form": "softmax", "damping": 0.0}, ("form='softmax'", "damping")),
    ({"gain": "memory", "memory": "diagonal_covariance"}, ("gain='memory'", "memory='diagonal_covariance'")),
    ({"damping": 0.1, "columns": "empirical"}, ("damping=0.1", "columns='empirical'")),
    *[
        ({"mode": "paper", name: value}, (f"{name}={value!r}", "mode='paper'"))
        for name, value in {
            "memory": "dense", "rank": 4, "columns": "sampled", "num_columns": 2, "per_sequence": False,
            "top_k": 1, "curvature_every": 2, "gain": "memory", "prior_tokens": 5.0, "tempering": 0.5,
            "correlation": 0.5, "adaptive_noise": 0.5, "forgetting": 0.9, "damping": 0.1, "outlier_threshold": 1.0,
            "max_decrease": 0.25, "prior": "pooled", "trust_decay": 2.0, "max_kl": 1.0, "averaging": True, "max_columns": 3,
            "dense_limit": 5, "block_limit": 5, "first_draws": 0,
        }.items()
    ],
]  # fmt: skip


@pytest.mark.parametrize("options,parts", PAIRS)
def test_raises_when_options_exclude_each_other(options, parts, tmp_path):
    with pytest.raises(ValueError) as found:
        LoKOOptions(**options)
    assert all(part in str(found.value) for part in parts), found.value
    with pytest.raises(ValueError) as found:
        KalmanConfig(str(tmp_path), optimizer="loko", use_cpu=True, **{f"loko_{k}": v for k, v in options.items()})
    assert all(f"loko_{part}" in str(found.value) for part in parts), found.value


GAUSSIAN, LIKELIHOOD = GaussianObservation(), LikelihoodObservation(lambda z, y: (z - y).square().sum(-1))


@pytest.mark.parametrize(
    "observation,options,match",
    [
        (GAUSSIAN, {"damping": 0.1}, "damping=0.1 has no place in a GaussianObservation"),
        (GAUSSIAN, {"top_k": 1}, "top_k=1 needs a categorical observation, got GaussianObservation"),
        (LIKELIHOOD, {"form": "softmax", "damping": 0.1}, "form='softmax' needs a categorical"),
        (LIKELIHOOD, {"columns": "sampled"}, "columns='sampled' is not supported for LikelihoodObservation"),
        (LIKELIHOOD, {"outlier_threshold": 1.0}, "outlier_threshold is not supported for LikelihoodObservation"),
        (LIKELIHOOD, {"mode": "paper"}, "mode='paper' is not supported for LikelihoodObservation"),
    ],
)
def test_raises_when_the_observation_does_not_support_an_option(observation, options, match):
    with pytest.raises(ValueError, match=match):
        toy = Linear(observation=observation, **options)
        toy.observe(toy.batch(0)[0], torch.zeros(5, 4))


def test_raises_when_noise_is_estimated_where_it_cannot_be():
    w = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="estimate_noise=True needs a GaussianObservation, got Categorical"):
        LoKO([("w", w)], CategoricalObservation(shift=False), estimate_noise=True)
    with pytest.raises(ValueError, match=r"estimate_noise=True is not possible with mode='paper'"):
        LoKO([("w", w)], GaussianObservation(), estimate_noise=True, mode="paper")


def test_paper_mode_accepts_what_it_is_by_itself():
    LoKOOptions(mode="paper", memory="diagonal_covariance", columns="exact", gain="joint", per_sequence=True)
    LoKOOptions(mode="paper", initial_bound=0.1, noise_decay=0.5, process_noise=0.1, seed=1, max_skipped=1)


@pytest.mark.parametrize(
    "text,value", [("0.1", 0.1), ('{"lora_A": 1e-4, "head": 0}', {"lora_A": 1e-4, "head": 0}), (0.5, 0.5)]
)
def test_process_noise_is_parsed(text, value, tmp_path):
    assert parse_noise(text) == value
    config = KalmanConfig(str(tmp_path), optimizer="loko", use_cpu=True, loko_process_noise=text)
    assert config.loko_options()["process_noise"] == value


@pytest.mark.parametrize("text", ["lora_A=1", "[1]", '"abc"', "null", '{"a": "b"}'])
def test_raises_when_process_noise_is_no_number_and_no_mapping(text):
    with pytest.raises(ValueError, match="process_noise must be a number or JSON"):
        parse_noise(text)


def test_process_noise_by_pattern_and_what_matches_nothing():
    toy = Linear(memory="diagonal", process_noise={"w": 0.1, "w|b": 0.2})
    assert [noise.tolist() for noise in toy.optimizer._update.noise] == [pytest.approx([0.2]), pytest.approx([0.2])]
    toy = Linear(memory="diagonal", process_noise={"w": 0.1})
    assert toy.optimizer._update.noise[1] is None
    with pytest.raises(ValueError, match=r"process_noise: patterns \['lora'\] match no parameter"):
        Linear(process_noise={"lora": 0.1, "w": 0.1})


# For each option: kind of toy, what both runs share, and the two values.
EFFECTS = {
    "mode": ("classes", {}, "kalman", "paper"),
    "memory": ("classes", {}, "kronecker", "diagonal"),
    "rank": ("classes", {}, 16, 2),
    "dense_limit": ("classes", {}, 128, 2),
    "block_limit": ("classes", {"memory": "block"}, 1024, 8),
    "columns": ("classes", {}, "sampled", "rademacher"),
    "num_columns": ("classes", {}, 1, 3),
    "per_sequence": ("tokens", {"columns": "sampled"}, None, True),
    "top_k": ("classes", {"columns": "exact"}, None, 1),
    "max_columns": ("classes", {}, 64, 2),
    "curvature_every": ("classes", {"first_draws": 0}, None, 3),
    "first_draws": ("classes", {"curvature_every": 3}, 6, 0),
    "gain": ("classes", {}, "joint", "memory"),
    "prior": ("classes", {}, "auto", "initialisation"),
    "prior_tokens": ("classes", {}, None, 3.0),
    "tempering": ("classes", {}, 1.0, 0.5),
    "correlation": ("tokens", {}, 0.0, 0.5),
    "adaptive_noise": ("classes", {}, 0.0, 0.5),
    "forgetting": ("classes", {}, 1.0, 0.5),
    "process_noise": ("classes", {}, 0.0, 0.1),
    "damping": ("classes", {}, None, 0.3),
    "form": ("classes", {"damping": 0.3}, "logit", "softmax"),
    "outlier_threshold": ("classes", {}, None, 1.0),
    "max_decrease": ("classes", {}, 0.5, 1e-3),
    "trust_decay": ("classes", {"max_decrease": 1e-2, "prior_tokens": 5.0}, 0.0, 3.0),
    "max_kl": ("classes", {}, None, 1e-6),
    "noise_decay": ("values", {"estimate_noise": True}, 0.99, 0.5),
    "averaging": ("classes", {}, False, True),
    "max_skipped": ("classes", {}, 10, 1),
    "initial_bound": ("classes", {"mode": "paper"}, 1.0, 0.1),
    "seed": ("classes", {}, 0, 1),
}


def outcome(kind, options):
    """Weights to be evaluated after six steps, the third and fourth of which see broken batches."""
    if options.get("estimate_noise"):
        options = options | {"observation": GaussianObservation()}
    toy = Linear(kind, **options)
    for step in range(6):
        x, labels = toy.batch(step)
        try:
            toy.observe(x * float("nan") if step in (2, 3) else x, labels)
            toy.optimizer.step()
        except FloatingPointError:
            return torch.zeros(toy.size)
    toy.optimizer.eval()
    return toy.theta


def test_every_option_is_tried():
    assert EFFECTS.keys() == {f.name for f in fields(LoKOOptions)}


@pytest.mark.parametrize("name", EFFECTS)
def test_every_option_changes_the_step(name):
    kind, common, first, second = EFFECTS[name]
    assert first == LoKOOptions.__dataclass_fields__[name].default or name in ("columns", "gain")
    results = [outcome(kind, common | {name: value}) for value in (first, first, second)]
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2]).abs().max() > 1e-6


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("name", sorted(EFFECTS.keys() - {"seed"}))
def test_every_field_of_the_config_reaches_the_filter(name, tmp_path, tokenizer):
    _, common, _, value = EFFECTS[name]
    given = {key: v for key, v in common.items() if key != "estimate_noise"} | {name: value}
    run = trainer(tmp_path, tokenizer, optimizer="loko", **{f"loko_{key}": v for key, v in given.items()})
    group = run.create_optimizer().param_groups[0]
    assert {key: group[key] for key in given} == given
    assert group["seed"] == run.args.seed


def test_regression_model_estimates_its_noise_except_in_paper_mode():
    from conftest import make_lora_bert

    for mode, estimates in (("kalman", True), ("paper", False)):
        optimizer = create_loko_optimizer(make_lora_bert(num_labels=1), mode=mode)
        assert optimizer.estimates_noise == estimates
    given = create_loko_optimizer(make_lora_bert(num_labels=1), observation=GaussianObservation(2.0))
    assert not given.estimates_noise and given.observation.variance == 2.0
