"""Beliefs in laplace-torch and in plain Fisher files: units, order and names, by the peer's own quantities."""

import warnings

import pytest
import torch
from conftest import make_batch, make_lora_bert, make_lora_llama
from safetensors.torch import load_file, save_file

from kalman_peft import AdapterState, Belief, BeliefError, belief_from_fisher, save_fisher, to_laplace_torch


def fit(model, structure, batch=None, **options):
    options = {"space": "adapter", "fisher": "empirical", "dense_limit": 10_000, "progress_bar": False} | options
    return Belief.fit(model, [batch or make_batch()], structure=structure, **options)


def only_the_adapter(model):
    for p in model.parameters():
        p.requires_grad_(False)
    for p in AdapterState(model, warn_excluded=False).parameters().values():
        p.requires_grad_(True)
    return model


def dense_precision(belief, model):
    """The precision per token as one matrix, in the order of the model's trainable parameters."""
    keys = {id(p): key for key, p in AdapterState(model).parameters().items()}
    order = [keys[id(p)] for p in model.parameters() if p.requires_grad]
    if belief.precision.structure == "diagonal":
        return torch.diag(torch.cat([belief.precision.entries[key].flatten() for key in order])), order
    blocks = belief.precision.blocks.items()
    return torch.block_diag(*(torch.kron(*(f.to_dense() for f in blocks[key])) for key in order)), order


# -- laplace-torch: what it computes from our state ----------------------------------------------------------------------


@pytest.fixture
def laplace():
    return pytest.importorskip("laplace", exc_type=ImportError)


@pytest.mark.parametrize("structure,rank", [("diagonal", 32), ("kronecker", 32), ("kronecker", 1)])
def test_laplace_torch_computes_our_posterior_from_the_exported_state(laplace, structure, rank):
    model = make_lora_llama(rank_pattern={"v_proj": 3})
    limit = {"rank": rank, "dense_limit": 1} if rank == 1 else {}  # eigenpairs cut off: written out in full
    belief = fit(model, structure, **limit)
    exported = to_laplace_torch(belief, model, prior_precision=0.7, prior_mean=0.1, temperature=2.0)
    kind = laplace.DiagLaplace if structure == "diagonal" else laplace.KronLaplace
    posterior = kind(model, "classification", temperature=2.0)
    posterior.load_state_dict(exported)

    per_token, order = dense_precision(belief, model)
    tokens = belief.info["curvature"]["num_tokens"]
    expected = tokens * per_token / 2.0 + 0.7 * torch.eye(len(per_token), dtype=torch.float64)
    mean = torch.cat([belief.mean[key].flatten() for key in order]).double()
    torch.testing.assert_close(posterior.mean, mean)
    assert (posterior.n_data, posterior.n_outputs) == (tokens, 17)
    found = posterior.posterior_precision
    torch.testing.assert_close(torch.diag(found) if structure == "diagonal" else found.to_matrix(), expected)
    torch.testing.assert_close(posterior.log_det_posterior_precision, torch.logdet(expected))
    point = mean + torch.randn(len(mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(posterior.square_norm(point), (point - mean) @ expected @ (point - mean))
    jacobians = torch.randn(2, 3, len(mean), dtype=torch.float64)
    torch.testing.assert_close(
        posterior.functional_variance(jacobians), jacobians @ torch.linalg.inv(expected) @ jacobians.mT
    )
    offset = mean - 0.1
    torch.testing.assert_close(posterior.scatter, 0.7 * offset @ offset)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_laplace_torch_fits_what_we_export(laplace, structure):
    # One observed token in each sequence, since laplace-torch's data are rows of one output each.
    from laplace.curvature import CurvlinopsEF

    model = only_the_adapter(make_lora_llama().eval())
    ids = torch.randint(3, 17, (4, 5), generator=torch.Generator().manual_seed(3))
    labels = torch.where(torch.arange(5) == 4, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    exported = to_laplace_torch(fit(model, structure, batch), model)

    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits[:, -1]

    kind = laplace.DiagLaplace if structure == "diagonal" else laplace.KronLaplace
    posterior = kind(Last(), "classification", backend=CurvlinopsEF)
    data = torch.utils.data.TensorDataset(ids[:, :-1], ids[:, -1])
    posterior.fit(torch.utils.data.DataLoader(data, batch_size=4))
    theirs = posterior.state_dict()
    assert {k: exported[k] for k in ("cls_name", "n_data", "n_outputs", "likelihood", "temperature")} == {
        k: theirs[k] for k in ("cls_name", "n_data", "n_outputs", "likelihood", "temperature")
    }
    assert exported.keys() == theirs.keys()
    torch.testing.assert_close(exported["mean"], theirs["mean"], rtol=1e-6, atol=1e-7)  # ours is kept in float32
    if structure == "diagonal":  # forward-mode products of float32 softmax and norms
        torch.testing.assert_close(exported["H"], theirs["H"], rtol=1e-5, atol=1e-8)
    else:
        for ours, other in zip(exported["H"], theirs["H"], strict=True):
            torch.testing.assert_close(ours[0], other[0])
            torch.testing.assert_close(ours[1], other[1])


# -- laplace-torch: without it -------------------------------------------------------------------------------------------


def test_exported_curvature_follows_the_trainable_parameters_and_sums_over_tokens():
    model = make_lora_llama()
    belief = fit(model, "diagonal")
    keys = {id(p): key for key, p in AdapterState(model).parameters().items()}
    order = [keys[id(p)] for p in model.parameters() if p.requires_grad]
    expected = torch.cat([belief.precision.entries[key].flatten() for key in order])
    torch.testing.assert_close(to_laplace_torch(belief, model)["H"], 9 * expected)  # 9 labels count in the batch
    torch.testing.assert_close(to_laplace_torch(belief, model, num_tokens=4)["H"], 4 * expected)


def test_diagonal_of_any_belief_can_be_exported():
    model = make_lora_llama()
    belief = fit(model, "kronecker", space="delta_w")
    exported = to_laplace_torch(belief, model, structure="diagonal")
    assert exported["cls_name"] == "DiagLaplace"
    diagonal = belief.precision.diagonal(belief.mean)
    first = next(iter(AdapterState(model).parameters()))
    torch.testing.assert_close(exported["H"][: diagonal[first].numel()], 9 * diagonal[first].flatten())


def test_number_of_outputs_of_a_classifier():
    model = only_the_adapter(make_lora_bert(num_labels=3))
    batch = make_batch(lengths=(5, 3), prompt=0) | {"labels": torch.tensor([2, 0])}
    assert to_laplace_torch(fit(model, "diagonal", batch), model)["n_outputs"] == 3


def test_raises_when_laplace_torch_has_no_such_structure():
    model = make_lora_llama()
    with pytest.raises(
        ValueError, match=r"no posterior of structure 'kronecker' in delta_w space.*structure='diagonal'"
    ):
        to_laplace_torch(fit(model, "kronecker", space="delta_w"), model)
    with pytest.raises(ValueError, match="no posterior of structure 'diagonal'"):
        to_laplace_torch(fit(model, "diagonal"), model, structure="kronecker")
    with pytest.raises(ValueError, match="'diagonal' or 'kronecker', got 'full'"):
        to_laplace_torch(fit(model, "diagonal"), model, structure="full")


def test_raises_when_a_truncated_side_is_longer_than_dense_limit():
    model = make_lora_llama(model_overrides={"intermediate_size": 40})
    belief = fit(model, "kronecker", rank=1, dense_limit=1)
    with pytest.raises(ValueError, match=r"Kronecker side of 40, of which 1 eigenpairs.*dense_limit is 39"):
        to_laplace_torch(belief, model, dense_limit=39)


def test_raises_when_other_parameters_are_trainable():
    model = make_lora_llama(use_dora=True)
    with pytest.raises(ValueError, match=r"not in the belief .*lora_magnitude_vector.*requires_grad_"):
        to_laplace_torch(fit(model, "diagonal"), model)


def test_raises_when_a_factor_is_frozen():
    model = make_lora_llama()
    belief = fit(model, "diagonal")
    AdapterState(model).pairs[0].a.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 factors of the belief are frozen.*is_trainable=True"):
        to_laplace_torch(belief, model)


def test_raises_when_the_number_of_tokens_is_unknown():
    model = make_lora_llama()
    belief = fit(model, "diagonal")
    belief.info.pop("curvature")
    with pytest.raises(ValueError, match="num_tokens must be positive, got None"):
        to_laplace_torch(belief, model)


# -- Fisher files --------------------------------------------------------------------------------------------------------


def random_fisher(model, rename=lambda name: name, seed=0):
    """(file's tensors, the same by state key): one tensor per trainable parameter under its name."""
    generator = torch.Generator().manual_seed(seed)
    keys = {id(p): key for key, p in AdapterState(model).parameters().items()}
    values = {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters() if p.requires_grad}
    parameters = dict(model.named_parameters())
    return {rename(n): v for n, v in values.items()}, {keys[id(parameters[n])]: v for n, v in values.items()}


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: n,
        lambda n: n.replace(".default", ""),
        lambda n: n.replace(".default", ".task_1"),
        lambda n: n.removeprefix("base_model.model."),
        lambda n: "fisher." + n,
        lambda n: "module." + n.replace(".default", ""),
        lambda n: "fisher/" + n,
    ],
)  # fmt: skip
def test_names_of_fisher_files(rename, tmp_path):
    model = make_lora_llama(torch.float32)
    named, expected = random_fisher(model, rename)
    save_file(named, tmp_path / "fisher.safetensors")
    prefix = {"prefix": "fisher/"} if rename("x").startswith("fisher/") else {}
    for source in (named, tmp_path / "fisher.safetensors"):
        belief = belief_from_fisher(model, source, **prefix)
        assert belief.precision.entries.keys() == expected.keys()
        for key, f in expected.items():
            torch.testing.assert_close(belief.precision.entries[key], f, rtol=0, atol=0)
        for key, p in AdapterState(model).tensors().items():
            torch.testing.assert_close(belief.mean[key], p, rtol=0, atol=0)


def test_imported_belief_is_a_belief(tmp_path):
    model = make_lora_llama(torch.float32)
    named, expected = random_fisher(model)
    save_file({n: v.bfloat16() for n, v in named.items()}, tmp_path / "ewc.safetensors")
    belief = belief_from_fisher(model, tmp_path / "ewc.safetensors", num_tokens=50)
    belief.save_pretrained(tmp_path)
    again = Belief.from_pretrained(tmp_path)
    again.check(model)
    assert again.info["curvature"] == {
        "structure": "diagonal", "space": "adapter", "fisher": "imported", "source": "ewc.safetensors",
        "mean": "the adapter's weights", "reduction": "mean", "scale": 1.0, "num_tokens": 50,
    }  # fmt: skip
    moved = {key: p + 0.1 for key, p in AdapterState(model).tensors().items()}
    energy = sum((f.bfloat16().double() * 0.1**2).sum() / 2 for f in expected.values())
    torch.testing.assert_close(again.energy(moved).double(), energy, rtol=1e-5, atol=0)


def test_reduction_and_scale_give_means_per_token():
    # Two conventions of EWC for the same per-sequence scores: both must give the belief of our own pass.
    model = make_lora_llama()
    belief = fit(model, "diagonal")
    sums = {key: 9 * f for key, f in belief.precision.entries.items()}  # over 3 sequences with 9 labels
    per_sequence = {key: f / 3 for key, f in sums.items()}
    for other in (
        belief_from_fisher(model, sums, reduction="sum", num_tokens=9),
        belief_from_fisher(model, per_sequence, scale=3 / 9, num_tokens=9),
    ):
        for key, f in belief.precision.entries.items():
            torch.testing.assert_close(other.precision.entries[key], f)
        assert other.info["curvature"]["num_tokens"] == 9


def test_scale_of_squared_gradients_of_a_mean_loss():
    # The usual loop: one sequence at a time, the square of the gradient of the model's mean loss, averaged.
    model = make_lora_llama().eval()
    ids = make_batch(lengths=(6, 6), prompt=0)
    totals = {}
    for row in range(2):
        one = {k: v[row : row + 1] for k, v in ids.items()}
        model.zero_grad()
        model(**one).loss.backward()  # a mean over 5 tokens
        for name, p in model.named_parameters():
            if p.grad is not None:
                totals[name] = totals.get(name, 0) + p.grad.square() / 2
    model.zero_grad()
    imported = belief_from_fisher(model, totals, scale=5)
    for key, f in fit(model, "diagonal", ids).precision.entries.items():
        torch.testing.assert_close(imported.precision.entries[key], f, rtol=1e-5, atol=1e-8)  # its loss is float32


def test_mean_from_a_file_and_groups_of_one_file(tmp_path):
    model = make_lora_llama(torch.float32)
    fisher, expected = random_fisher(model, lambda n: "fisher." + n)
    mean, expected_mean = random_fisher(model, lambda n: "params." + n, seed=1)
    path = tmp_path / "ewc.safetensors"
    save_file(fisher | mean, path)
    with pytest.raises(BeliefError, match=r"different prefixes \['fisher.', 'params.'\]; choose one with `prefix`"):
        belief_from_fisher(model, path)
    belief = belief_from_fisher(model, path, prefix="fisher.", mean=path, mean_prefix="params.")
    for key in expected:
        torch.testing.assert_close(belief.precision.entries[key], expected[key], rtol=0, atol=0)
        torch.testing.assert_close(belief.mean[key], expected_mean[key], rtol=0, atol=0)
    assert belief.info["curvature"]["mean"] == "ewc.safetensors"


def test_fisher_file_round_trip(tmp_path):
    model = make_lora_llama()
    belief = fit(model, "diagonal")
    save_fisher(belief, tmp_path / "fisher.safetensors", tmp_path / "mean.safetensors")
    trainable = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    assert {n: t.shape for n, t in load_file(tmp_path / "fisher.safetensors").items()} == trainable
    for p in AdapterState(model).parameters().values():
        p.data.zero_()
    again = belief_from_fisher(model, tmp_path / "fisher.safetensors", mean=tmp_path / "mean.safetensors")
    assert again.info["curvature"]["num_tokens"] == 9
    for key, f in belief.precision.entries.items():
        torch.testing.assert_close(again.precision.entries[key], f, rtol=0, atol=0)
        torch.testing.assert_close(again.mean[key], belief.mean[key], rtol=0, atol=0)


def test_only_the_named_adapter_is_read_and_written(tmp_path):
    model = make_lora_llama(torch.float32)
    model.add_adapter("other", model.peft_config["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the two adapters, one is left out
        named, expected = random_fisher(model)
        belief = belief_from_fisher(model, named, adapter_name="other")
    save_fisher(belief, tmp_path / "f.safetensors", adapter_name="other")
    assert {n.replace("other", "default") for n in load_file(tmp_path / "f.safetensors")} == set(named)
    for key, f in expected.items():
        torch.testing.assert_close(belief.precision.entries[key], f, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fisher.pt", "fisher.bin", "pickled.safetensors"])
def test_raises_when_the_file_is_a_pickle(name, tmp_path):
    model = make_lora_llama(torch.float32)
    torch.save(random_fisher(model)[0], tmp_path / name)
    with pytest.raises(BeliefError, match=rf"{name} is a pickle.*save_file\(torch.load\(path, weights_only=True\)"):
        belief_from_fisher(model, tmp_path / name)
    with pytest.raises(BeliefError, match=r"mean: .* is a pickle"):
        belief_from_fisher(model, random_fisher(model)[0], mean=tmp_path / name)


def test_raises_when_the_file_is_missing_or_truncated(tmp_path):
    model = make_lora_llama(torch.float32)
    path = tmp_path / "fisher.safetensors"
    with pytest.raises(FileNotFoundError, match="is no file"):
        belief_from_fisher(model, path)
    save_file(random_fisher(model)[0], path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BeliefError, match="no safetensors file, or truncated"):
        belief_from_fisher(model, path)


def change(named, name, value):
    return named | {name: value(named[name])}


@pytest.mark.parametrize(
    "spoil,match",
    [
        (lambda f, n: {k: v for k, v in f.items() if k != n}, r"1 of 12 factors are missing \(.*lora_A.weight\)"),
        (lambda f, n: f | {"score.weight": torch.ones(2)}, r"1 names are of no factor \(score.weight\)"),
        (lambda f, n: f | {n.replace("default", "b"): f[n]}, r"several adapters \['b', 'default'\]"),
        (lambda f, n: change(f, n, lambda t: t[:1]), r"shape \(1, 8\), the adapter's factor \(2, 8\); use the rank"),
        (lambda f, n: change(f, n, lambda t: -t), "negative entries at .*lora_A.weight"),
        (lambda f, n: change(f, n, lambda t: t / 0), "contains NaN or Inf"),
        (lambda f, n: change(f, n, lambda t: t.long()), "must be a floating-point tensor, got torch.int64"),
        (lambda f, n: change(f, n, lambda t: t.tolist()), "must be a floating-point tensor, got <class 'list'>"),
        (lambda f, n: {}, "12 of 12 factors are missing"),
    ],
)
def test_raises_when_the_tensors_do_not_fit(spoil, match):
    model = make_lora_llama(torch.float32)
    named, _ = random_fisher(model)
    with pytest.raises(BeliefError, match=match):
        belief_from_fisher(model, spoil(named, next(iter(named))))


@pytest.mark.parametrize(
    "options,match",
    [
        ({"reduction": "token"}, "reduction must be 'mean' or 'sum', got 'token'"),
        ({"reduction": "sum"}, "num_tokens must be positive, got None"),
        ({"num_tokens": 0}, "num_tokens must be positive, got 0"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": float("nan")}, "scale must be positive"),
    ],
)
def test_raises_when_the_units_are_unusable(options, match):
    model = make_lora_llama(torch.float32)
    with pytest.raises(ValueError, match=match):
        belief_from_fisher(model, random_fisher(model)[0], **options)
