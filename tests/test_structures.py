"""Every structure of curvature against dense references, where its approximation is removed."""

import copy
import itertools

import pytest
import torch
from conftest import make_batch, make_lora_llama
from peft import LoraConfig, get_peft_model
from test_curvature import probe, shifted_log_likelihood
from torch import nn

from kalman_peft import AdapterState, Belief, curvature_memory, estimate_curvature
from kalman_peft.curvature.memory import STRUCTURES
from kalman_peft.observations import GaussianObservation
from kalman_peft.precision.base import Layout


def estimate(model, batches, structure, space="adapter", fisher="empirical", **options):
    return estimate_curvature(model, batches, structure, fisher, space=space, progress_bar=False, **options)[0]


def reference_dense(model, batch):
    """Sum over sequences of score score^T over all factors, per token; by one autograd call per sequence."""
    state = AdapterState(model)
    model.eval()
    scores = []
    for row in range(len(batch["labels"])):
        grads = torch.autograd.grad(shifted_log_likelihood(model, batch, row), list(state.parameters().values()))
        scores.append(torch.cat([g.reshape(-1) for g in grads]))
    scores = torch.stack(scores)
    return scores.T @ scores / (batch["labels"][:, 1:] != -100).sum()


def frobenius(x, y):
    return (x - y).norm().item()


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 3}}])
def test_dense_is_the_sum_of_outer_products(batch, lora):
    model = make_lora_llama(**lora)
    torch.testing.assert_close(estimate(model, [batch], "dense").to_dense(), reference_dense(model, batch))


def test_low_rank_is_exact_where_the_rank_suffices(batch):
    model = make_lora_llama(rank_pattern={"v_proj": 3})
    exact = reference_dense(model, batch)  # three sequences: rank 3
    for rank in (3, 8):
        precision = estimate(model, [batch], "low_rank", rank=rank)
        assert precision.rank == min(rank, precision.columns.shape[1])
        torch.testing.assert_close(precision.to_dense(), exact, rtol=1e-6, atol=1e-9 * exact.max().item())


def test_low_rank_keeps_the_diagonal_and_the_largest_directions():
    batches = [make_batch(lengths=(6, 5, 7, 4), prompt=1, seed=s) for s in range(8)]  # 32 scores
    model = make_lora_llama()
    exact = estimate(model, batches, "dense").to_dense()
    errors = []
    for rank in (2, 8, 16):
        precision = estimate(model, batches, "low_rank", rank=rank)
        torch.testing.assert_close(precision.to_dense().diagonal(), exact.diagonal())
        errors.append(frobenius(precision.to_dense(), exact))
        values = torch.linalg.eigvalsh(exact)
        best = values[:-rank].square().sum().sqrt().item()  # of any matrix of that rank
        assert errors[-1] < 2 * best
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "exact"])
def test_ekfac_is_the_second_moment_along_its_basis_and_closer_than_kfac(fisher):
    lengths, count = ((6, 4, 5), 4) if fisher != "exact" else ((4, 3), 1)  # the latter is the Gauss-Newton matrix
    batches = [make_batch(lengths=lengths, prompt=1, seed=s) for s in range(count)]
    model = make_lora_llama()
    exact = estimate(model, batches, "dense", fisher=fisher)
    layout = Layout(exact.coordinates())
    corrected, kfac = (
        estimate(model, batches, "ekfac", fisher=fisher),
        estimate(model, batches, "kronecker", fisher=fisher),
    )
    blocks = torch.block_diag(*(torch.ones(n, n, dtype=torch.float64) for n in layout.sizes))
    target = exact.to_dense() * blocks  # the same draws: exact for each factor by itself
    bases = [torch.kron(left.vectors, right.vectors) for left, right in corrected.blocks.items().values()]
    basis = torch.block_diag(*bases)
    expected = (basis.T @ target @ basis).diagonal()
    torch.testing.assert_close((basis.T @ corrected.to_dense() @ basis).diagonal(), expected)
    assert frobenius(corrected.to_dense(), target) < frobenius(kfac.to_dense(), target)
    torch.testing.assert_close(corrected.to_dense().trace(), target.trace())


@pytest.mark.parametrize("rank,dense_limit", [(32, 256), (3, 0)])
def test_ekfac_of_the_merged_update(batch, rank, dense_limit):
    model = make_lora_llama(target_modules=["v_proj", "down_proj"])
    precision = estimate(model, [batch], "ekfac", "delta_w", rank=rank, dense_limit=dense_limit)
    merged = copy.deepcopy(model).merge_and_unload()
    weights = {
        n: m.weight.requires_grad_(True) for n, m in merged.named_modules() if n.endswith(("v_proj", "down_proj"))
    }
    tokens = (batch["labels"][:, 1:] != -100).sum()
    rows = [
        torch.autograd.grad(shifted_log_likelihood(merged, batch, row), list(weights.values())) for row in range(3)
    ]
    for name, grads in zip(weights, zip(*rows, strict=True), strict=True):
        left, right = precision.blocks.items()["base_model.model." + name]
        cells = precision.cells["base_model.model." + name]
        scores = torch.stack(grads)
        directions = [projectors(left), projectors(right)]
        for (a, p), (b, q) in itertools.product(*(list(enumerate(d)) for d in directions)):
            dimensions = p.diagonal().sum() * q.diagonal().sum()
            energy = ((p @ scores @ q) * scores).sum() / tokens
            torch.testing.assert_close(cells[a, b], energy / dimensions, msg=f"{name} {a} {b}")


def projectors(factor):
    kept = [torch.outer(v, v) for v in factor.vectors.T]
    if factor.is_complete:
        return kept
    return [*kept, torch.eye(factor.size, dtype=torch.float64) - factor.vectors @ factor.vectors.T]


def test_ekfac_keeps_the_trace_with_truncated_sides(batch):
    model = make_lora_llama()
    cut = estimate(model, [batch], "ekfac", rank=2, dense_limit=0)
    whole = estimate(model, [batch], "diagonal")
    torch.testing.assert_close(cut.to_dense().trace(), whole.to_dense().trace())


# -- block-tridiagonal ---------------------------------------------------------------------------------------------


class LinearBase(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 4, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.first(x)


def linear_adapter():
    model = get_peft_model(
        LinearBase(), LoraConfig(r=2, lora_alpha=3, target_modules=["first"]), autocast_adapter_dtype=False
    )
    torch.manual_seed(1)
    for p in AdapterState(model).parameters().values():
        nn.init.normal_(p)
    return model


def linear_curvature(model, x, structure, fisher="exact", space="adapter", y=None):
    y = torch.zeros(len(x), 4, dtype=torch.float64) if y is None else y
    return estimate_curvature(
        model, [{"x": x, "labels": y}], structure, fisher, space=space, progress_bar=False,
        observation=GaussianObservation(), forward_fn=lambda m, b: m(b["x"]),
    )[0]  # fmt: skip


@pytest.mark.parametrize("count", [1, 20])
def test_block_tridiagonal_is_exact_for_a_linear_base_with_gaussian_loss(count):
    # Output gradients have the identity as covariance and do not depend on the inputs: K-FAC's one assumption holds.
    model = linear_adapter()
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    state = AdapterState(model)
    layout = Layout({k: p.shape for k, p in state.parameters().items()})
    exact = linear_curvature(model, x, "dense").to_dense()

    def outputs(flat):
        a, b = (part.view(s) for part, s in zip(flat.split(layout.sizes), layout.shapes.values(), strict=True))
        return x @ (model.base_model.model.first.base_layer.weight + 1.5 * b @ a).T

    jacobian = torch.autograd.functional.jacobian(outputs, layout.flatten(state.tensors())).flatten(0, 1)
    torch.testing.assert_close(exact, jacobian.T @ jacobian / count)
    torch.testing.assert_close(linear_curvature(model, x, "block_tridiagonal").to_dense(), exact)
    links = torch.block_diag(*(torch.ones(n, n, dtype=torch.float64) for n in layout.sizes))
    torch.testing.assert_close(linear_curvature(model, x, "kronecker").to_dense(), exact * links)
    assert (exact * (1 - links)).norm() > 0.1 * exact.norm()  # what B-KFAC leaves out is not small
    linearized = linear_curvature(model, x, "kronecker", space="delta_w").linearized(state.tensors())
    torch.testing.assert_close(linearized.to_dense(), exact)


def test_block_tridiagonal_is_exact_for_a_single_datum_through_a_deep_model():
    batch = make_batch(lengths=(2,), prompt=1)
    model = make_lora_llama(target_modules=["v_proj"], layers_to_transform=[1])  # one adapter: A and B
    exact = reference_dense(model, batch)
    torch.testing.assert_close(estimate(model, [batch], "block_tridiagonal").to_dense(), exact, rtol=1e-7, atol=1e-10)


def test_block_tridiagonal_adds_only_the_links_within_adapters(batch):
    model = make_lora_llama(rank_pattern={"v_proj": 3})
    tri, kfac = estimate(model, [batch], "block_tridiagonal"), estimate(model, [batch], "kronecker")
    layout = Layout(tri.coordinates())
    assert list(layout.shapes) == list(kfac.coordinates())
    dense, diagonal = tri.to_dense(), kfac.to_dense()
    assert torch.linalg.eigvalsh(dense).min() > -1e-10
    edges = [0, *itertools.accumulate(layout.sizes)]
    spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
    for i, j in itertools.product(range(len(spans)), repeat=2):
        block = dense[spans[i], spans[j]]
        if i == j:
            torch.testing.assert_close(block, diagonal[spans[i], spans[i]])
        elif i // 2 == j // 2:
            assert block.norm() > 0
        else:
            assert not block.any()


def test_gauge_directions_have_no_precision(batch):
    model = make_lora_llama()
    precision = estimate(model, [batch], "block_tridiagonal")
    tangent = {}
    for i, pair in enumerate(AdapterState(model)):
        m = torch.randn(2, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        tangent |= {pair.key_a: m @ pair.a.detach(), pair.key_b: -pair.b.detach() @ m}
    assert precision.quadratic(tangent) < 1e-20 * sum(x.square().sum() for x in tangent.values()) + 1e-12


# -- sources -------------------------------------------------------------------------------------------------------


ADDITIVE = [("diagonal", "adapter"), ("dense", "adapter"), ("low_rank", "adapter"), ("diagonal", "delta_w")]


@pytest.mark.parametrize("structure,space", ADDITIVE, ids="-".join)
def test_sources_are_averaged_by_weight(structure, space):
    model = make_lora_llama(target_modules=["v_proj"])
    wiki, chat = [make_batch(seed=1), make_batch(lengths=(3, 4), seed=2)], [make_batch(lengths=(5,), seed=3)]
    both, record = estimate_curvature(
        model, {"wiki": wiki, "chat": chat}, structure, "empirical", space=space, weights={"wiki": 3.0, "chat": 1.0},
        progress_bar=False,
    )  # fmt: skip
    first, second = (probe(estimate(model, data, structure, space)) for data in (wiki, chat))
    for key, value in probe(both).items():
        torch.testing.assert_close(value, 0.75 * first[key] + 0.25 * second[key])
    assert record["sources"]["wiki"] == {"weight": 0.75, "num_tokens": 9 + 3, "num_sequences": 5}
    assert record["num_tokens"] == sum(s["num_tokens"] for s in record["sources"].values())


@pytest.mark.parametrize("structure,space", [("kronecker", "adapter"), ("kronecker", "delta_w"), ("block_tridiagonal", "adapter")])  # fmt: skip
def test_kronecker_sources_pool_their_factors(structure, space):
    model = make_lora_llama()
    wiki, chat = [make_batch(seed=1), make_batch(lengths=(3, 4), seed=2)], [make_batch(lengths=(5,), seed=3)]
    both = estimate(model, {"wiki": wiki, "chat": chat}, structure, space, weights={"wiki": 3.0, "chat": 1.0})
    merged = estimate(model, wiki, structure, space).merge(estimate(model, chat, structure, space), 0.75, 0.25)
    expected = probe(merged)
    for key, value in probe(both).items():
        torch.testing.assert_close(value, expected[key])


def test_one_source_twice_is_that_source():
    model = make_lora_llama()
    data = [make_batch(seed=1), make_batch(lengths=(3, 4), seed=2)]
    for structure in STRUCTURES:
        expected = probe(estimate(model, data, structure))
        for key, value in probe(estimate(model, {"a": data, "b": list(data)}, structure)).items():
            torch.testing.assert_close(value, expected[key], msg=structure)


def test_a_stream_is_read_only_as_far_as_needed():
    model = make_lora_llama()
    read = []

    def stream():
        for i in itertools.count():
            read.append(i)
            yield make_batch(seed=i)

    _, record = estimate_curvature(model, stream(), "ekfac", max_samples=7, progress_bar=False)
    assert record["num_sequences"] == 7 and record["num_batches"] == 3
    assert len(read) == 3
    _, limited = estimate_curvature(model, stream(), "diagonal", max_batches=2, progress_bar=False)
    assert limited["num_batches"] == 2


@pytest.mark.parametrize(
    "dataloader,weights,error,match",
    [
        ({}, None, ValueError, "empty mapping"),
        ({"a": [make_batch()]}, {"b": 1.0}, ValueError, "must name the sources"),
        ({"a": [make_batch()]}, {"a": -1.0}, ValueError, "must be >= 0"),
        ({"a": [make_batch()]}, {"a": "1"}, ValueError, "must be >= 0"),
        ({"a": [make_batch()]}, [1.0], ValueError, "must map the names"),
        ([make_batch() | {"labels": [[1]]}], None, TypeError, "`labels` must be a tensor"),
        ({"a": [make_batch()], "b": []}, None, ValueError, r"\[b\] held no labels"),
        (make_batch(), None, TypeError, "is a batch"),
    ],
)
def test_raises_when_sources_and_weights_do_not_fit(dataloader, weights, error, match):
    with pytest.raises(error, match=match):
        estimate(make_lora_llama(), dataloader, "diagonal", weights=weights)


# -- memory --------------------------------------------------------------------------------------------------------


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("structure", ["kronecker", "ekfac", "block_tridiagonal"])
def test_shared_inputs_are_measured_once_and_change_nothing(batch, structure):
    for checkpointing in (False, True):
        model = make_lora_llama(target_modules=TARGETS)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        shared = estimate(model, [batch, make_batch(seed=5)], structure)
        own = estimate(model, [batch, make_batch(seed=5)], structure, share_inputs=False)
        expected = probe(own)
        for key, value in probe(shared).items():
            torch.testing.assert_close(value, expected[key])
        sides = [
            k
            for k in shared.tensors()
            if k.endswith("right.vectors") and ("_A" in k or ("_A" not in k and "_B" not in k))
        ]
        assert len(sides) == 2 * 4  # per layer: q, k, v; o; gate, up; down


def test_raises_when_shared_inputs_change():
    model = make_lora_llama(target_modules=["q_proj", "v_proj"])
    layer = model.base_model.model.model.layers[0].self_attn
    plain, calls = layer.v_proj.forward, []
    run = estimate_curvature

    def separate(x, *args, **kwargs):
        return plain(x, *args, **kwargs)

    layer.v_proj.forward = separate
    hook = layer.v_proj.register_forward_pre_hook(
        lambda m, args: (args[0].clone(),) if calls.append(1) or len(calls) > 1 else None
    )
    with pytest.raises(ValueError, match="share_inputs=False"):
        run(model, [make_batch(), make_batch(seed=4)], progress_bar=False)
    hook.remove()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_offloaded_sums_are_the_same(batch, structure):
    model = make_lora_llama()
    expected = probe(estimate(model, [batch], structure, rank=3, dense_limit=0))
    for key, value in probe(estimate(model, [batch], structure, rank=3, dense_limit=0, offload=True)).items():
        torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("structure,space", [(s, "adapter") for s in STRUCTURES] + [("diagonal", "delta_w"), ("kronecker", "delta_w"), ("ekfac", "delta_w")])  # fmt: skip
def test_memory_is_known_beforehand(batch, structure, space):
    model = make_lora_llama()
    precision = estimate(model, [batch], structure, space, rank=3, dense_limit=4, share_inputs=False)
    need = curvature_memory(AdapterState(model), structure, space, rank=3, dense_limit=4)
    held = sum(t.numel() * t.element_size() for t in precision.tensors().values() if t.is_floating_point())
    assert held <= need.result < 1.1 * held + 500
    assert need.sums <= need.total


def test_raises_when_it_does_not_fit_and_names_what_does(batch):
    model = make_lora_llama()
    need = curvature_memory(AdapterState(model), "dense").total
    with pytest.raises(
        ValueError, match=r"structure='dense'.*above memory_limit.*structure='kronecker'.*structure='diagonal'"
    ):
        estimate(model, [batch], "dense", memory_limit=need - 1)
    estimate(model, [batch], "dense", memory_limit=need)
    with pytest.raises(ValueError, match="smaller `rank`"):
        estimate(model, [batch], "kronecker", memory_limit=100)
    with pytest.raises(ValueError, match="a smaller adapter"):
        estimate(model, [batch], "diagonal", memory_limit=100)


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_beliefs_of_every_structure_are_saved_and_read(tmp_path, batch, structure):
    model = make_lora_llama(torch.float32, target_modules=TARGETS)
    belief = Belief.fit(model, [batch], structure=structure, space="adapter", fisher="rademacher", progress_bar=False)
    belief.save_pretrained(tmp_path)
    again = Belief.from_pretrained(tmp_path)
    again.check(model)
    assert again.info["curvature"]["fisher"] == "rademacher" and again.info["curvature"]["reduction"] == "token"
    state = {k: v + 0.1 for k, v in belief.mean.items()}
    torch.testing.assert_close(again.energy(state), belief.energy(state))
    assert torch.equal(again.energy(state), Belief.from_pretrained(tmp_path).energy(state))
