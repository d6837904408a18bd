"""Structures of a precision against dense matrices in float64."""

import sys

import pytest
import torch
from conftest import make_lora_llama, randomise_b

from kalman_peft import AdapterState
from kalman_peft.precision import (
    BlockTridiagonalPrecision,
    DeltaDiagonalPrecision,
    DeltaEigenKroneckerPrecision,
    DeltaKroneckerPrecision,
    DensePrecision,
    DiagonalPrecision,
    EigenFactor,
    EigenKroneckerPrecision,
    KroneckerBlocks,
    KroneckerPrecision,
    LowRankPrecision,
    precision_from_tensors,
)
from kalman_peft.precision.base import Layout
from kalman_peft.precision.factor import apply_cells, shrink_cells


F64 = {"dtype": torch.float64}


def spd(n, seed, rank=None):
    x = torch.randn(n, rank or 2 * n, generator=torch.Generator().manual_seed(seed), **F64)
    return x @ x.T / n


def projected_cells(left, right, seed):
    """Random cells, and the dense matrix that they stand for: sum over directions of cell * projector."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.rand(left.values.shape[-1] + 1, right.values.shape[-1] + 1, generator=generator, **F64) + 0.1
    dense = 0
    for i in range(cells.shape[0]):
        for j in range(cells.shape[1]):
            dense = dense + cells[i, j] * torch.kron(projector(left, i), projector(right, j))
    return cells, dense


def projector(factor, i):
    if i < factor.values.shape[-1]:
        return torch.outer(factor.vectors[:, i], factor.vectors[:, i])
    return torch.eye(factor.size, **F64) - factor.vectors @ factor.vectors.T


def make(structure, space, model, rank=None, seed=0):
    """A random precision over the model's adapter, and its dense matrix in that space, block by block."""
    state = AdapterState(model)
    shapes = (
        {k: p.shape for k, p in state.parameters().items()} if space == "adapter"
        else {p.name: torch.Size((p.b.shape[0], p.a.shape[1])) for p in state}
    )  # fmt: skip
    scaling = {p.name: p.scaling for p in state}
    dense, size = {}, sum(shape.numel() for shape in shapes.values())
    if structure == "dense":
        whole = spd(size, seed)
        return DensePrecision(whole, shapes), {None: whole}
    if structure == "low_rank":
        generator = torch.Generator().manual_seed(seed)
        entries = torch.rand(size, generator=generator, **F64) + 0.1
        columns = torch.randn(size, rank or 5, generator=generator, **F64)
        return LowRankPrecision(entries, columns, shapes), {None: entries.diag() + columns @ columns.T}
    if structure == "block_tridiagonal":
        blocks = {}
        for i, pair in enumerate(state):
            o, d = pair.b.shape[0], pair.a.shape[1]
            gamma, s = EigenFactor.from_dense(spd(o, seed + i), rank), EigenFactor.from_dense(spd(d, seed + 50), rank)
            blocks[pair.name] = (gamma, s)
            a, b = pair.a.detach().clone(), pair.b.detach().clone()
            eye = torch.eye(o, **F64), torch.eye(d, **F64)
            jacobian = torch.cat([torch.kron(b, eye[1]), torch.kron(eye[0], a.mT.contiguous())], 1)  # dDW / d(A, B)
            dense[pair.name] = jacobian.T @ torch.kron(gamma.to_dense(), s.to_dense()) @ jacobian
        expansion = {k: p.detach().clone() for k, p in state.parameters().items()}
        return BlockTridiagonalPrecision(KroneckerBlocks(blocks), expansion), dense
    if structure == "diagonal":
        generator = torch.Generator().manual_seed(seed + 5)
        entries = {n: torch.rand(shape, generator=generator, **F64) for n, shape in shapes.items()}
        dense = {n: f.reshape(-1).diag() for n, f in entries.items()}
        return (DiagonalPrecision(entries) if space == "adapter" else DeltaDiagonalPrecision(entries, scaling)), dense
    blocks, cells, rights = {}, {}, {}
    for i, (n, (o, d)) in enumerate(shapes.items()):
        # Inputs of one size are shared, as those of q, k and v are.
        right = rights.setdefault(d, EigenFactor.from_dense(spd(d, seed + 50), rank))
        blocks[n] = (EigenFactor.from_dense(spd(o, seed + i), rank), right)
        if structure == "ekfac":
            cells[n], dense[n] = projected_cells(*blocks[n], seed + i)
        else:
            dense[n] = torch.kron(blocks[n][0].to_dense(), right.to_dense())
    blocks = KroneckerBlocks(blocks)
    if structure == "ekfac":
        if space == "adapter":
            return EigenKroneckerPrecision(blocks, cells), dense
        return DeltaEigenKroneckerPrecision(blocks, cells, scaling), dense
    return (KroneckerPrecision(blocks) if space == "adapter" else DeltaKroneckerPrecision(blocks, scaling)), dense


def reference_energy(dense, space, state, mean, model):
    """1/2 sum vec(x - x0)^T dense vec(x - x0), differentiable in `state`."""
    view = AdapterState(model)
    if space == "adapter":
        offsets = {n: state[n] - mean[n] for n in view.parameters()}
    else:
        offsets = {p.name: p.scaling * (state[p.key_b] @ state[p.key_a] - mean[p.key_b] @ mean[p.key_a]) for p in view}
    x = torch.cat([o.reshape(-1) for o in offsets.values()])
    return x @ torch.block_diag(*dense.values()) @ x / 2


ADAPTER = ["diagonal", "kronecker", "ekfac", "block_tridiagonal", "low_rank", "dense"]
CASES = [(s, "adapter", None) for s in ADAPTER] + [(s, "delta_w", None) for s in ADAPTER[:3]]
CASES += [(s, space, 1) for s in ("kronecker", "ekfac") for space in ("adapter", "delta_w")]
CASES += [("block_tridiagonal", "adapter", 1), ("block_tridiagonal", "adapter", 3), ("low_rank", "adapter", 2)]
PROXIMAL = [c for c in CASES if c[1] == "adapter" or c[0] == "kronecker"]


@pytest.fixture
def algebra(request):
    """A precision, its dense matrix, and the layout of its coordinates."""
    structure, space, rank = request.param
    model = make_lora_llama(target_modules=["v_proj", "down_proj"], rank_pattern={"v_proj": 3})
    precision, dense = make(structure, space, model, rank)
    return precision, torch.block_diag(*dense.values()), Layout(precision.coordinates())


def vector(layout, seed=3):
    return torch.randn(layout.size, generator=torch.Generator().manual_seed(seed), **F64)


@pytest.mark.parametrize("algebra", CASES, indirect=True, ids=str)
class TestAlgebra:
    def test_products_solves_and_determinants(self, algebra):
        precision, dense, layout = algebra
        x, eye = vector(layout), torch.eye(layout.size, **F64)
        torch.testing.assert_close(layout.flatten(precision.matvec(layout.unflatten(x))), dense @ x)
        torch.testing.assert_close(precision.quadratic(layout.unflatten(x)), x @ dense @ x)
        damped = 1.7 * dense + 0.2 * eye
        solved = precision.solve(layout.unflatten(x), damping=0.2, scale=1.7)
        torch.testing.assert_close(layout.flatten(solved), torch.linalg.solve(damped, x))
        torch.testing.assert_close(precision.logdet(damping=0.2, scale=1.7), torch.logdet(damped))
        scaled = precision.scale(1.7)
        torch.testing.assert_close(scaled.to_dense(), 1.7 * dense)
        torch.testing.assert_close(scaled.logdet(damping=0.2), torch.logdet(damped))

    def test_without_damping(self, algebra):
        precision, dense, layout = algebra
        x = vector(layout)
        if precision.structure == "block_tridiagonal":  # the gauge directions have no precision
            assert torch.linalg.eigvalsh(dense)[: 2 * (9 + 4)].abs().max() < 1e-9
            assert precision.logdet() == -torch.inf
            for call in (lambda: precision.solve(layout.unflatten(x)), precision.sample):
                with pytest.raises(ValueError, match="pass `damping` > 0"):
                    call()
            return
        torch.testing.assert_close(layout.flatten(precision.solve(layout.unflatten(x))), torch.linalg.solve(dense, x))
        torch.testing.assert_close(precision.logdet(), torch.logdet(dense))

    @pytest.mark.parametrize("noise", [0.0, 0.3])
    def test_draws_have_the_covariance(self, algebra, noise):
        # A draw is linear in the noise it is made of, so its covariance follows exactly from unit noise vectors.
        precision, dense, layout = algebra
        eye = torch.eye(layout.size, **F64)
        covariance = 0
        for unit in unit_noises(precision.predict(noise)):
            draw = layout.flatten(unit)
            covariance = covariance + torch.outer(draw, draw)
        expected = torch.linalg.inv(dense @ torch.linalg.inv(eye + noise * dense) + 0.2 * eye)
        torch.testing.assert_close(covariance, expected)

    def test_predict(self, algebra):
        precision, dense, layout = algebra
        eye, x = torch.eye(layout.size, **F64), vector(layout)
        torch.testing.assert_close(precision.predict(0.0).to_dense(), dense)
        predicted = precision.predict(0.1).predict(0.2)
        expected = dense @ torch.linalg.inv(eye + 0.3 * dense)
        torch.testing.assert_close(predicted.to_dense(), expected)
        solved = predicted.solve(layout.unflatten(x), damping=0.2, scale=1.7)
        torch.testing.assert_close(layout.flatten(solved), torch.linalg.solve(1.7 * expected + 0.2 * eye, x))
        torch.testing.assert_close(predicted.logdet(0.2, 1.7), torch.logdet(1.7 * expected + 0.2 * eye))
        torch.testing.assert_close(predicted.scale(0.5).to_dense(), 0.5 * expected)
        with pytest.raises(ValueError, match="process_noise"):
            precision.predict(-1.0)

    def test_merge(self, algebra):
        precision, dense, _ = algebra
        torch.testing.assert_close(precision.merge(precision, 0.3, 0.5).to_dense(), 0.8 * dense)

    def test_tensors_round_trip(self, algebra):
        precision, _, layout = algebra
        for one in (precision, precision.predict(0.3)):
            tensors = dict(reversed(list(one.tensors().items())))  # a file keeps no order
            again = precision_from_tensors(one.structure, one.space, tensors)
            x = layout.unflatten(vector(layout))
            expected = one.matvec(x)
            assert again.matvec(x).keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(again.matvec(x)[key], value)
            torch.testing.assert_close(one.to("cpu").to_dense(), one.to_dense())


def unit_noises(precision):
    """One draw per unit vector of the noise that a draw consumes."""
    modules = [m for n, m in sys.modules.items() if n.startswith("kalman_peft.precision.") and hasattr(m, "normal")]

    def draw_with(noise):
        with pytest.MonkeyPatch.context() as patch:
            for module in modules:
                patch.setattr(module, "normal", noise)
            return precision.sample(damping=0.2)

    sizes = []
    draw_with(lambda shape, like, generator: (sizes.append(torch.Size(shape).numel()), like.new_zeros(shape))[1])
    for unit in torch.eye(sum(sizes), **F64):
        parts = iter(unit.split(sizes))
        yield draw_with(lambda shape, like, generator, parts=parts: next(parts).view(shape))


@pytest.mark.parametrize("structure", ["diagonal", "dense", "low_rank"])
def test_merge_of_different_precisions_is_their_sum(structure):
    model = make_lora_llama(target_modules=["v_proj"])
    (one, first), (two, second) = (make(structure, "adapter", model, rank=3, seed=s) for s in (0, 9))
    merged = one.merge(two, 0.3, 2.0)
    total = torch.block_diag(*(0.3 * a + 2.0 * b for a, b in zip(first.values(), second.values(), strict=True)))
    if structure == "low_rank":  # cut to rank 3: its diagonal is exact, the rest the best of that rank
        torch.testing.assert_close(merged.to_dense().diagonal(), total.diagonal())
        assert merged.rank == 3
        columns = torch.cat([0.3**0.5 * one.columns, 2.0**0.5 * two.columns], 1)
        whole = LowRankPrecision.compress(0.3 * one.entries + 2 * two.entries, columns, one.layout.shapes, 6)
        torch.testing.assert_close(whole.to_dense(), total)
        kept = torch.linalg.svdvals(columns)[:3].square()
        torch.testing.assert_close(torch.linalg.eigvalsh(merged.columns.T @ merged.columns).flip(0), kept)
    else:
        torch.testing.assert_close(merged.to_dense(), total)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("structure", ["kronecker", "ekfac", "block_tridiagonal"])
def test_kronecker_merge_pools_the_factors(structure, rank):
    model = make_lora_llama(target_modules=["v_proj"])
    (one, first), (two, second) = (make(structure, "adapter", model, rank=rank, seed=s) for s in (0, 9))
    merged = one.merge(two, 0.3, 1.2)
    for name, (left, right) in merged.blocks.items().items():
        mine, theirs = one.blocks.items()[name], two.blocks.items()[name]
        pooled_left = 0.3 * mine[0].to_dense() + 1.2 * theirs[0].to_dense()
        pooled_right = (0.3 * mine[1].to_dense() + 1.2 * theirs[1].to_dense()) / 1.5
        torch.testing.assert_close(left.trace(), pooled_left.trace())
        torch.testing.assert_close(right.trace(), pooled_right.trace())
        if rank is None:
            torch.testing.assert_close(left.to_dense(), pooled_left)
            torch.testing.assert_close(right.to_dense(), pooled_right)
        else:  # the best of that rank: the largest eigenpairs of the sum
            torch.testing.assert_close(right.values, torch.linalg.eigvalsh(pooled_right)[-right.values.shape[0] :])
    if structure == "ekfac":  # carried over as the diagonal in the pooled basis
        total = torch.block_diag(*(0.3 * a + 1.2 * b for a, b in zip(first.values(), second.values(), strict=True)))
        torch.testing.assert_close(merged.to_dense().trace(), total.trace())
        if rank is None:
            blocks = merged.blocks.items()
            basis = torch.block_diag(*(torch.kron(le.vectors, ri.vectors) for le, ri in blocks.values()))
            torch.testing.assert_close((basis.T @ merged.to_dense() @ basis).diagonal(), (basis.T @ total @ basis).diagonal())  # fmt: skip


def test_merge_refuses_what_does_not_belong_together():
    model, other = make_lora_llama(), make_lora_llama(r=3)
    diagonal = make("diagonal", "adapter", model)[0]
    with pytest.raises(ValueError, match="Cannot merge a diagonal precision in adapter space with a kronecker"):
        diagonal.merge(make("kronecker", "adapter", model)[0])
    with pytest.raises(ValueError, match="different coordinates"):
        diagonal.merge(make("diagonal", "adapter", other)[0])
    tridiagonal = make("block_tridiagonal", "adapter", model)[0]
    with pytest.raises(ValueError, match="after predict"):
        tridiagonal.merge(tridiagonal.predict(0.1))
    for weights in ((-1.0, 1.0), (1.0, float("nan")), (0.0, 0.0)):
        for precision in (diagonal, tridiagonal):
            with pytest.raises(ValueError, match=r"must be >= 0|weights 0 and 0"):
                precision.merge(precision, *weights)
    with pytest.raises(ValueError, match="must be >= 0"):
        diagonal.scale(-1.0)
    randomise_b(model, seed=8)
    with pytest.raises(ValueError, match="different adapter weights"):
        tridiagonal.merge(make("block_tridiagonal", "adapter", model)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_tridiagonal_is_solved_with_little_damping(dtype):
    model = make_lora_llama(target_modules=["v_proj", "down_proj"])
    exact, _ = make("block_tridiagonal", "adapter", model, rank=2)
    tensors = exact.tensors()
    tensors |= {k: t.to(dtype) for k, t in tensors.items() if t.is_floating_point() and k != "process_noise"}
    precision = BlockTridiagonalPrecision.from_tensors(tensors)
    layout, dense = Layout(exact.coordinates()), exact.to_dense()
    x, eye = vector(layout), torch.eye(layout.size, **F64)
    largest = torch.linalg.eigvalsh(dense)[-1]
    for relative in (1e-4, 1e-8):
        damping = float(relative * largest)
        solved = layout.flatten(precision.solve(layout.unflatten(x), damping)).double()
        expected = torch.linalg.solve(dense + damping * eye, x)
        assert (solved - expected).norm() < 1e-5 * expected.norm()
    for noise in (1e-10, 1e-6, 1e-2):  # noise takes precision away, and little noise next to none
        ratio = precision.predict(noise).quadratic(layout.unflatten(x)) / precision.quadratic(layout.unflatten(x))
        assert 1 - 10 * noise * largest - 1e-5 < ratio < 1 + 1e-5
    with pytest.raises(ValueError, match="too ill-conditioned"):
        precision.solve(layout.unflatten(x), float(1e-25 * largest))


def test_singular_precisions_ask_for_damping():
    model = make_lora_llama(target_modules=["v_proj"])
    singular = EigenFactor.from_dense(spd(8, 0, rank=3))  # rounding leaves tiny eigenvalues
    state = AdapterState(model)
    blocks = {
        k: (EigenFactor.from_dense(spd(p.shape[0], 1)), EigenFactor.from_dense(spd(p.shape[1], 2)))
        for k, p in state.parameters().items()
    }
    key = state.pairs[0].key_a
    blocks[key] = (blocks[key][0], singular)
    precision = KroneckerPrecision(KroneckerBlocks(blocks))
    with pytest.raises(ValueError, match="pass `damping` > 0"):
        precision.sample()


def test_process_noise_by_block():
    model = make_lora_llama(target_modules=["v_proj"])
    for structure in ("diagonal", "low_rank"):
        precision, dense = make(structure, "adapter", model)
        noise = {k: 0.1 * (i + 1) for i, k in enumerate(precision.coordinates())}
        flat = torch.cat([torch.full((s.numel(),), noise[k], **F64) for k, s in precision.coordinates().items()])
        expected = torch.linalg.inv(torch.linalg.inv(torch.block_diag(*dense.values())) + flat.diag())
        torch.testing.assert_close(precision.predict(noise).to_dense(), expected)
    with pytest.raises(ValueError, match="name every block"):
        make("diagonal", "adapter", model)[0].predict({"x": 0.1})


def test_shared_inputs_are_held_and_written_once():
    model = make_lora_llama(target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"])
    for structure, space in (("kronecker", "adapter"), ("kronecker", "delta_w"), ("ekfac", "adapter")):
        precision, _ = make(structure, space, model)
        tensors = precision.tensors()
        written = [k for k in tensors if k.endswith("right.vectors")]
        rights = {id(right) for _, right in precision.blocks.items().values()}
        assert len(written) == len(rights) == (1 if space == "delta_w" else 2)  # A's inputs, and B's of size r
        for moved in (precision.to("cpu"), precision.scale(2.0), precision_from_tensors(structure, space, tensors)):
            assert len({id(right) for _, right in moved.blocks.items().values()}) == len(rights)


def test_linearized_delta_w_is_the_second_order_expansion():
    model = make_lora_llama(target_modules=["v_proj"])
    precision, dense = make("kronecker", "delta_w", model)
    state = {k: p.detach().clone() for k, p in AdapterState(model).parameters().items()}
    gaussian = precision.linearized(state)
    layout = Layout(gaussian.coordinates())

    def energy(flat):
        return reference_energy(dense, "delta_w", layout_views(layout, flat), state, model)

    hessian = torch.autograd.functional.hessian(energy, layout.flatten(state))
    torch.testing.assert_close(gaussian.to_dense(), hessian)


def layout_views(layout, flat):
    parts = flat.split(layout.sizes)
    return {k: part.view(s) for (k, s), part in zip(layout.shapes.items(), parts, strict=True)}


def test_to_dense_refuses_what_does_not_fit():
    entries = {"a.lora_A.weight": torch.ones(200, 200)}
    with pytest.raises(ValueError, match="to_dense"):
        DiagonalPrecision(entries).to_dense()


@pytest.mark.parametrize("structure,space,rank", CASES)
@pytest.mark.parametrize("zero_start", [True, False])
def test_energy_gradient_and_gauss_newton_diagonal(structure, space, rank, zero_start):
    model = make_lora_llama(random_b=not zero_start, rank_pattern={"v_proj": 3})
    precision, dense = make(structure, space, model, rank)
    view = AdapterState(model)
    mean = {k: p.detach().clone() for k, p in view.parameters().items()}
    for p in view.parameters().values():
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), **F64))
    state = {k: p.detach().clone().requires_grad_(True) for k, p in view.parameters().items()}
    energy, gradient = precision.energy_and_gradient(state, mean)
    expected = reference_energy(dense, space, state, mean, model)
    torch.testing.assert_close(energy, expected.detach())
    expected.backward()
    assert gradient.keys() == state.keys()
    for k, g in gradient.items():
        torch.testing.assert_close(g, state[k].grad)

    # Gauss-Newton diagonal: second derivative along each weight, with what is bilinear in B and A held fixed.
    diagonal = precision.diagonal(state)
    pair = view.pairs[1]
    for key in (pair.key_a, pair.key_b):
        one = state[key].detach()

        def along(x, key=key):
            return reference_energy(dense, space, {**{k: v.detach() for k, v in state.items()}, key: x}, mean, model)

        hessian = torch.autograd.functional.hessian(along, one).reshape(one.numel(), -1)
        torch.testing.assert_close(diagonal[key].reshape(-1), hessian.diagonal())


@pytest.mark.parametrize("structure,space,rank", PROXIMAL)
@pytest.mark.parametrize("zero_start", [True, False])
def test_proximal_solves_its_stationarity_condition(structure, space, rank, zero_start):
    model = make_lora_llama(random_b=not zero_start)
    precision, _ = make(structure, space, model, rank)
    view = AdapterState(model)
    mean = view.tensors()
    mean = {k: v.clone() for k, v in mean.items()}
    randomise_b(model, seed=7)
    start = {k: p.detach().clone() for k, p in view.parameters().items()}
    step = 0.7
    new = precision.proximal(start, mean, step)
    if space == "adapter":
        _, gradient = precision.energy_and_gradient(new, mean)
        for k in new:
            torch.testing.assert_close(new[k] + step * gradient[k], start[k])
    else:  # block by block: B against the old A, then A against the new B
        middle = {k: new[k] if "lora_B" in k else start[k] for k in new}
        _, gradient = precision.energy_and_gradient(middle, mean)
        for k in (k for k in new if "lora_B" in k):
            torch.testing.assert_close(new[k] + step * gradient[k], start[k])
        _, gradient = precision.energy_and_gradient(new, mean)
        for k in (k for k in new if "lora_A" in k):
            torch.testing.assert_close(new[k] + step * gradient[k], start[k])


@pytest.mark.parametrize("structure,space", sorted({c[:2] for c in PROXIMAL}))
def test_proximal_limits(structure, space):
    model = make_lora_llama(random_b=False)
    precision, _ = make(structure, space, model)
    view = AdapterState(model)
    mean = view.snapshot()
    randomise_b(model)
    start = {k: p.detach().clone() for k, p in view.parameters().items()}
    for k, v in precision.proximal(start, mean, 0.0).items():
        torch.testing.assert_close(v, start[k])
    strong = precision.proximal(start, mean, 1e12)
    assert precision.energy(strong, mean) < 1e-9 * precision.energy(start, mean)


def test_delta_w_energy_is_invariant_to_the_gauge():
    model = make_lora_llama()
    precision, _ = make("kronecker", "delta_w", model)
    state = AdapterState(model).snapshot()
    state = {k: v.double() for k, v in state.items()}
    mean = {k: torch.zeros_like(v) for k, v in state.items()}
    turned = {}
    for i, pair in enumerate(AdapterState(model)):
        m = torch.randn(2, 2, generator=torch.Generator().manual_seed(i), **F64)
        turned[pair.key_a], turned[pair.key_b] = torch.linalg.solve(m, state[pair.key_a]), state[pair.key_b] @ m
    torch.testing.assert_close(precision.energy(turned, mean), precision.energy(state, mean))


def test_delta_w_proximal_is_refused_for_the_diagonal():
    precision, _ = make("diagonal", "delta_w", make_lora_llama())
    with pytest.raises(ValueError, match="proximal form is not supported for structure='diagonal'"):
        precision.proximal({}, {}, 1.0)


def test_raises_when_the_structure_is_unknown():
    with pytest.raises(ValueError, match="Unknown precision structure 'banded'"):
        precision_from_tensors("banded", "adapter", {})


def test_factor_keeps_top_pairs_and_trace():
    matrix = spd(12, 0)
    factor = EigenFactor.from_dense(matrix, 4)
    values = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(factor.values, values[-4:])
    torch.testing.assert_close(factor.tail, values[:-4].mean())
    torch.testing.assert_close(factor.trace(), matrix.trace())
    torch.testing.assert_close(factor.to_dense().diagonal(), factor.diagonal())
    torch.testing.assert_close(EigenFactor.from_dense(matrix).to_dense(), matrix)


def test_sketch_is_exact_at_low_rank_and_close_on_decaying_spectra():
    omega = torch.randn(60, 24, generator=torch.Generator().manual_seed(1), **F64)
    low = spd(60, 2, rank=7)
    factor = EigenFactor.from_sketch(low @ omega, omega, low.trace(), 8)
    torch.testing.assert_close(factor.to_dense(), low, rtol=1e-7, atol=1e-8)

    basis = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(3), **F64))[0]
    decaying = basis @ torch.diag(torch.arange(1, 61, **F64) ** -1.5) @ basis.T
    factor = EigenFactor.from_sketch(decaying @ omega, omega, decaying.trace(), 8)
    best = EigenFactor.from_dense(decaying, 8)
    torch.testing.assert_close(factor.trace(), decaying.trace())
    error = (factor.to_dense() - decaying).norm()
    assert error < 1.6 * (best.to_dense() - decaying).norm()


@pytest.mark.parametrize("ranks", [(None, None), (2, None), (None, 2), (2, 2)])
def test_division_in_the_joint_eigenbasis(ranks):
    left, right = EigenFactor.from_dense(spd(4, 0), ranks[0]), EigenFactor.from_dense(spd(5, 1), ranks[1])
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), **F64)
    y = apply_cells(left, right, shrink_cells(left, right, 0.3), x)
    dense = torch.eye(20, **F64) + 0.3 * torch.kron(left.to_dense(), right.to_dense())
    torch.testing.assert_close(y.reshape(-1), torch.linalg.solve(dense, x.reshape(-1)))
