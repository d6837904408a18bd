"""Moment rules of single layers, against dense covariances, exact sums, quadrature and samples."""

import numpy as np
import pytest
import torch
from predictive import independent
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from kalman_peft.predictive import NoMomentRule, mean_of, moments, probit_probabilities, variance_of, with_variance
from kalman_peft.predictive.covariances import FactorCovariance
from kalman_peft.predictive.modules import MODULE_RULES, attach, register_rule, rule_for
from kalman_peft.predictive.tensor import FUNCTION_RULES


F64 = torch.float64


def draw(*shape, seed=0, positive=False):
    x = torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return x.abs() + 0.1 if positive else x


def uncertain(*shape, seed=0, scale=1.0):
    return with_variance(draw(*shape, seed=seed), scale * draw(*shape, seed=seed + 50, positive=True))


def run(module, x):
    """A module on an uncertain tensor, by its own rule if it has one."""
    rule = rule_for(module)
    handles = attach(module, rule) if rule else []
    with torch.no_grad():
        out = module(x)
    for handle in handles:
        handle.remove()
    return out


def jacobian_rule(function, x, shared=False):
    """diag(J C J^T), with J of the function at the mean: the delta method, all of it.

    C is diagonal; for `shared` the entries in one place of the last dimension are fully correlated.
    """
    jacobian = torch.autograd.functional.jacobian(function, mean_of(x))
    scaled = jacobian.reshape(-1, *x.shape) * variance_of(x).sqrt()
    if shared:
        scaled = scaled.flatten(1, -2).sum(1)
    return scaled.flatten(1).square().sum(1)


# -- LoRA and linear layers ------------------------------------------------------------------------------------------


def lora_case(seed=0):
    weight, a, b = draw(5, 6, seed=1), draw(2, 6, seed=2), draw(5, 2, seed=3)
    a_variance, b_variance = 0.3 * draw(2, 6, seed=4, positive=True), 0.2 * draw(5, 2, seed=5, positive=True)
    x, v = draw(6, seed=6), 0.4 * draw(6, seed=7, positive=True)
    return x, v, weight, (a, b), (a_variance, b_variance), 1.7


@pytest.mark.parametrize("known", [True, False])
def test_lora_layer_equals_samples(known):
    x, v, weight, (a, b), (a_variance, b_variance), s = lora_case()
    n, generator = 400_000, torch.Generator().manual_seed(9)

    def noise(mean, variance):
        return mean + variance.sqrt() * torch.randn(n, *mean.shape, dtype=F64, generator=generator)

    xs = x.expand(n, -1) if known else noise(x, v)
    u = torch.einsum("nri,ni->nr", noise(a, a_variance), xs)
    y = xs @ weight.T + s * torch.einsum("nor,nr->no", noise(b, b_variance), u)
    found = moments.lora_variance(x, None if known else v, weight, (a, b), independent(a_variance, b_variance), s)
    assert torch.allclose(found, y.var(0), rtol=0.01, atol=0)


@pytest.mark.parametrize("known", [True, False])
def test_lora_layer_equals_the_exact_sum_over_all_pairs(known):
    """E y_o^2 - (E y_o)^2 from E of every product of two terms, by loops."""
    x, v, weight, (a, b), (a_variance, b_variance), s = lora_case()
    v = torch.zeros_like(v) if known else v
    expected = torch.zeros(5, dtype=F64)
    for o in range(5):
        # y_o = sum_i x_i (w_i + s sum_k b_k a_ki) =: sum_i x_i m_i; x independent of m.
        m = weight[o] + s * b[o] @ a
        cov = torch.zeros(6, 6, dtype=F64)  # of m
        for k in range(2):
            cov += s**2 * b_variance[o, k] * torch.outer(a[k], a[k])
            cov += s**2 * torch.diag((b[o, k] ** 2 + b_variance[o, k]) * a_variance[k])
        second = torch.outer(x, x) + torch.diag(v)
        expected[o] = (second * (cov + torch.outer(m, m))).sum() - (x @ m) ** 2
    found = moments.lora_variance(x, None if known else v, weight, (a, b), independent(a_variance, b_variance), s)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)


def dense_covariance(cov, m, n):
    """(m, n, m, n), from bases that are completed by others than the code's."""
    sides = []
    for basis, size in ((cov.left, m), (cov.right, n)):
        full = torch.eye(size, dtype=F64) if basis is None else torch.linalg.svd(basis, full_matrices=True).U
        if basis is not None:
            full[:, : basis.shape[1]] = basis
        sides.append(full)
    rows, columns = ((torch.arange(k).clamp(max=c - 1)) for k, c in zip((m, n), cov.cells.shape, strict=True))
    cells = cov.cells[rows][:, columns]
    return torch.einsum("xa,yb,ab,za,wb->xyzw", sides[0], sides[1], cells, sides[0], sides[1])


def kronecker_like(m, n, k_left, k_right, seed):
    left, right = (torch.linalg.qr(draw(s, k, seed=seed + s)).Q for s, k in ((m, k_left), (n, k_right)))
    return FactorCovariance(
        0.3 * draw(k_left + (k_left < m), k_right + (k_right < n), seed=seed, positive=True), left, right
    )


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kept", [(3, 6, 5, 3), (2, 4, 3, 2), (3, 2, 2, 1)], ids=str)
def test_lora_layer_of_correlated_factors_equals_the_dense_covariance(kept, known):
    """Bases full, and with complements."""
    x, v, weight, s = draw(6), 0.4 * draw(6, seed=7, positive=True), draw(5, 6, seed=1), 1.7
    a, b = draw(3, 6, seed=2), draw(5, 3, seed=3)
    covariances = kronecker_like(3, 6, *kept[:2], seed=11), kronecker_like(5, 3, *kept[2:], seed=12)
    of_a, of_b = dense_covariance(covariances[0], 3, 6), dense_covariance(covariances[1], 5, 3)
    inputs = torch.outer(x, x) + (0 if known else torch.diag(v))  # E x x^T
    expected = []
    for o in range(5):  # y_o = m x with a random row m = W_o + s B_o A
        row = weight[o] + s * b[o] @ a
        cov = torch.einsum("kl,kilj->ij", torch.outer(b[o], b[o]) + of_b[o, :, o], of_a) + a.T @ of_b[o, :, o] @ a
        expected.append((inputs * (s**2 * cov + torch.outer(row, row))).sum() - (row @ x) ** 2)
    found = moments.lora_variance(x, None if known else v, weight, (a, b), covariances, s)
    assert torch.allclose(found, torch.stack(expected), rtol=1e-10, atol=0)


def test_linear_network_of_depth_two_is_exact():
    """Both layers uncertain: every weight of the second meets a unit of its own, so that marginals are exact."""
    x, first, second = draw(4), draw(3, 4, seed=1), draw(2, 3, seed=2)
    v1, v2 = draw(3, 4, seed=3, positive=True), draw(2, 3, seed=4, positive=True)
    hidden, spread = first @ x, v1 @ x.square()
    exact = torch.stack(
        [
            sum((w**2 + v) * h2 for w, v, h2 in zip(second[o], v2[o], hidden.square() + spread, strict=True))
            for o in range(2)
        ]
    ) - (second.square() @ hidden.square())
    found = moments.lora_variance(x, None, torch.zeros(2, 4, dtype=F64), (first, second), independent(v1, v2), 1.0)
    assert torch.allclose(found, exact, rtol=1e-12, atol=0)


def test_blocks_of_a_wide_layer_equal_the_whole(monkeypatch):
    v, weight = draw(3, 6, positive=True), draw(10, 6, seed=1)
    x, _, w, factors, factor_variances, s = lora_case()
    whole = (
        moments.linear_variance(v, weight),
        moments.lora_variance(x, x.square(), w, factors, independent(*factor_variances), s),
    )
    monkeypatch.setattr(moments, "BLOCK", 18)
    parts = (
        moments.linear_variance(v, weight),
        moments.lora_variance(x, x.square(), w, factors, independent(*factor_variances), s),
    )
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(6, 4), Conv1D(4, 6), nn.Dropout(0.3).eval(), nn.Flatten(0), nn.Identity(),
        nn.Sequential(nn.Linear(6, 6), nn.Unflatten(-1, (2, 3))),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_linear_modules_equal_the_dense_covariance(module):
    module, x = module.double(), uncertain(2, 6)
    out = run(module, x)
    assert torch.equal(mean_of(out), module(mean_of(x)))
    assert torch.allclose(variance_of(out).reshape(-1), jacobian_rule(module, x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2}])
def test_convolution_equals_the_dense_covariance(options):
    module, x = nn.Conv2d(2, 4, 3, **options).double(), uncertain(1, 2, 5, 5)
    assert torch.allclose(variance_of(run(module, x)).reshape(-1), jacobian_rule(module, x), rtol=1e-12, atol=0)


FUNCTIONS = {
    "first token": lambda x: x[:, 0],
    "turned": lambda x: x.transpose(1, 2).reshape(2, -1).contiguous()[..., None].squeeze(-1),
    "split and joined": lambda x: torch.cat([part * (i + 1.0) for i, part in enumerate(x.chunk(2, -1))], dim=-1),
    "joined with known": lambda x: torch.cat([torch.ones_like(x), x], dim=1),
    "rotated": lambda x: x * 0.6 + torch.cat((-x[..., 2:], x[..., :2]), dim=-1) * 0.8,
    "shifted": lambda x: 3.0 - (x - 1.0) / 2.0 + MASK,
    "twice itself": lambda x: x + x,
    "nothing left": lambda x: x - x,
    "filled": lambda x: x.masked_fill(MASK == 0, -5.0),
    "chosen": lambda x: torch.where(MASK > 0, x, torch.zeros((), dtype=F64)),
    "addmm": lambda x: torch.addmm(WEIGHTS[0, :, :1].T.expand(3, 3), x[0], WEIGHTS[1].new_ones(4, 3), alpha=2.0),
    "expanded": lambda x: x[:, None].expand(2, 2, 3, 4).sum(-1),
}  # fmt: skip
OVER_POSITIONS = {
    "pooling": lambda x: x[0].mean(0),
    "pooling kept": lambda x: torch.mean(x, dim=(0, 2), keepdim=True),
    "everything": lambda x: x.sum(),
    "masked pooling": lambda x: torch.sum(x * MASK, (0, 1)) / MASK.sum().clamp(min=1e-9),
    "mixed": lambda x: torch.matmul(WEIGHTS[:1], x[:1]),
    "mixed by a vector": lambda x: WEIGHTS[0, 0] @ x[1],
}
MASK = torch.tensor([[1.0, 1, 0], [1, 1, 1]], dtype=F64)[..., None]
WEIGHTS = draw(2, 3, 3, seed=8).softmax(-1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_linear_functions_equal_the_dense_covariance(name):
    function, x = FUNCTIONS[name], uncertain(2, 3, 4)
    out = function(x)
    assert torch.equal(mean_of(out), function(mean_of(x)))
    assert variance_of(out).shape == mean_of(out).shape
    assert torch.allclose(variance_of(out).reshape(-1), jacobian_rule(function, x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", OVER_POSITIONS)
def test_sums_over_positions_count_as_shared(name):
    """Exact for entries that are fully correlated over positions."""
    function, x = OVER_POSITIONS[name], uncertain(2, 3, 4)
    out = function(x)
    assert torch.equal(mean_of(out), function(mean_of(x)))
    assert variance_of(out).shape == mean_of(out).shape
    assert torch.allclose(variance_of(out).reshape(-1), jacobian_rule(function, x, shared=True), rtol=1e-12, atol=0)


def test_sums_and_products_of_independent_tensors():
    x, y, n = uncertain(3, scale=0.3), uncertain(3, seed=1, scale=0.3), 400_000
    generator = torch.Generator().manual_seed(1)
    xs, ys = (mean_of(t) + variance_of(t).sqrt() * torch.randn(n, 3, dtype=F64, generator=generator) for t in (x, y))
    for function in (torch.add, torch.sub, torch.mul):
        assert torch.allclose(variance_of(function(x, y)), function(xs, ys).var(0), rtol=0.015, atol=0)
    assert torch.allclose(variance_of(x * x), (xs * xs).var(0), rtol=0.015, atol=0)
    columns = x[:, None] @ y[None]
    assert torch.allclose(variance_of(columns), (xs[:, :, None] * ys[:, None]).var(0), rtol=0.015, atol=0)


# -- activations and norms -------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": F.relu, "gelu": F.gelu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid,
}  # fmt: skip
ACTIVATION_MODULES = [
    "relu",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "silu",
    "tanh",
    "gelu_python",
]


def quadrature(function, x):
    """Variance of function(x) by Gauss-Hermite quadrature, entry by entry."""
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()
    values = function(mean_of(x)[..., None] + variance_of(x).sqrt()[..., None] * nodes)
    mean = (values * weights).sum(-1, keepdim=True)
    return ((values - mean).square() * weights).sum(-1)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_functions_equal_quadrature_for_small_variances(name):
    x = with_variance(draw(20), 1e-8 * draw(20, seed=1, positive=True))
    out = ACTIVATIONS[name](x)
    assert torch.equal(mean_of(out), ACTIVATIONS[name](mean_of(x)))
    assert torch.allclose(variance_of(out), quadrature(ACTIVATIONS[name], x), rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize("name", ACTIVATION_MODULES)
def test_activation_modules_equal_quadrature_for_small_variances(name):
    module, x = ACT2FN[name], with_variance(draw(20), 1e-8 * draw(20, seed=1, positive=True))
    assert torch.allclose(variance_of(run(module, x)), quadrature(module, x), rtol=1e-4, atol=1e-15)


def norms():
    llama, gemma = LlamaRMSNorm(6, 1e-3), GemmaRMSNorm(6, 1e-3)
    llama.weight.data, gemma.weight.data = draw(6, seed=4), draw(6, seed=4)
    return {
        "layer": lambda x: F.layer_norm(x, (6,), draw(6, seed=4), draw(6, seed=5), 1e-3),
        "layer over two": lambda x: F.layer_norm(x, (3, 6), None, None, 1e-3),
        "rms": lambda x: F.rms_norm(x, (6,), draw(6, seed=4), 1e-3),
        "rms over two": lambda x: F.rms_norm(x, (3, 6), None, 1e-3),
        "llama": llama.double(),
        "gemma": gemma.double(),
    }


@pytest.mark.parametrize("name", ["layer", "layer over two", "rms", "rms over two", "llama", "gemma"])
def test_norms_equal_the_dense_delta_method(name):
    norm, x = norms()[name], uncertain(2, 3, 6)
    found = variance_of(run(norm, x) if isinstance(norm, nn.Module) else norm(x)).reshape(-1)
    # transformers' norms work in float32 inside
    assert torch.allclose(found, jacobian_rule(norm, x), rtol=1e-5 if isinstance(norm, nn.Module) else 1e-10)


def test_norms_of_one_uncertain_direction_are_not_negative():
    """Along the mean itself a norm takes all variance away: what is left is rounding."""
    x = with_variance(torch.tensor([[3.0, 0, 0]], dtype=F64), torch.tensor([[1.0, 0, 0]], dtype=F64))
    found = variance_of(F.rms_norm(x, (3,), None, 0.0))
    assert bool((found >= 0).all()) and bool((found < 1e-15).all())


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_of_wide_layers_equal_samples(kind):
    x, n = with_variance(draw(2000), 1e-3 * draw(2000, seed=1, positive=True)), 4000

    def norm(t):
        return F.layer_norm(t, (2000,)) if kind == "layer" else F.rms_norm(t, (2000,), eps=1e-6)

    samples = mean_of(x) + variance_of(x).sqrt() * torch.randn(
        n, 2000, dtype=F64, generator=torch.Generator().manual_seed(0)
    )
    ratio = variance_of(norm(x)) / norm(samples).var(0)
    assert abs(ratio.mean() - 1) < 0.01


# -- attention -------------------------------------------------------------------------------------------------------


def attention_case(groups=1):
    q = draw(2, 2 * groups, 5, 3)
    return q, draw(2, 2, 5, 3, seed=1), uncertain(2, 2, 5, 4, seed=2)


def masks():
    boolean = torch.ones(5, 5, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    boolean[0, :, :, 0] = False  # the first query of the first sequence sees nothing
    return {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": boolean},
        "added": {"attn_mask": draw(2, 1, 5, 5, seed=3)},
        "scaled": {"scale": 0.3},
    }


def shared_attention(attend, values):
    """The delta method for values that are fully correlated over positions: (J sqrt(v))^2, channel by channel."""
    total = 0
    for channel in range(values.shape[-1]):
        spread = variance_of(values).sqrt() * (torch.arange(values.shape[-1]) == channel)
        total = total + torch.autograd.functional.jvp(attend, mean_of(values), spread)[1].square()
    return total.reshape(-1)


@pytest.mark.parametrize("name", ["none", "causal", "boolean", "added", "scaled"])
def test_attention_equals_the_dense_covariance(name, monkeypatch):
    q, k, v = attention_case()

    def attend(values):
        return F.scaled_dot_product_attention(q, k, values, **masks()[name])

    out = attend(v)
    assert torch.equal(mean_of(out), attend(mean_of(v)))
    expected = shared_attention(attend, v)
    assert torch.allclose(variance_of(out).reshape(-1), expected, rtol=1e-12, atol=1e-15)
    monkeypatch.setattr(moments, "BLOCK", 40)  # two queries at a time
    assert torch.allclose(variance_of(attend(v)).reshape(-1), expected, rtol=1e-12, atol=1e-15)


def test_long_causal_attention_equals_the_dense_covariance():
    """In blocks that leave out later keys."""
    q, k, v = draw(1, 2, 70, 3), draw(1, 2, 70, 3, seed=1), uncertain(1, 2, 70, 4, seed=2)

    def attend(values):
        return F.scaled_dot_product_attention(q, k, values, is_causal=True)

    assert torch.allclose(variance_of(attend(v)).reshape(-1), shared_attention(attend, v), rtol=1e-10, atol=0)


def test_grouped_attention_equals_the_dense_covariance():
    q, k, v = attention_case(groups=3)

    def attend(values):
        return F.scaled_dot_product_attention(q, k, values, is_causal=True, enable_gqa=True)

    assert torch.allclose(variance_of(attend(v)).reshape(-1), shared_attention(attend, v), rtol=1e-12, atol=0)


def test_queries_and_keys_count_as_known():
    q, k, v = attention_case()
    spread = with_variance(q, torch.ones_like(q)), with_variance(k, torch.ones_like(k))
    plain = variance_of(F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(variance_of(F.scaled_dot_product_attention(*spread, v)), plain)
    eager = F.softmax(spread[0] @ spread[1].mT * 3**-0.5, dim=-1)
    assert variance_of(eager) is None
    assert torch.allclose(variance_of(eager @ v), plain, rtol=1e-12, atol=0)


# -- probabilities ---------------------------------------------------------------------------------------------------


def test_probit_probabilities():
    logits, variance = draw(3, 2), draw(3, 2, seed=1, positive=True)
    assert torch.equal(probit_probabilities(logits, torch.zeros_like(variance)), logits.softmax(-1))
    found = probit_probabilities(logits, variance)
    assert torch.allclose(found.sum(-1), torch.ones(3, dtype=F64))
    # Two classes, one logit of which is 0 and known: E sigmoid(z), by quadrature. MacKay's approximation: within 0.02.
    z = with_variance(2 * draw(20), 4 * draw(20, seed=1, positive=True))
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(80))
    sigmoids = (mean_of(z)[:, None] + variance_of(z).sqrt()[:, None] * nodes).sigmoid()
    expected = (sigmoids * weights / weights.sum()).sum(-1)
    pair = torch.stack([mean_of(z), torch.zeros(20, dtype=F64)], -1), torch.stack([variance_of(z)] * 2, -1)
    assert (probit_probabilities(*pair)[:, 0] - expected).abs().max() < 0.02


# -- refusals, dtypes, own rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.pow(2), lambda x: x.exp(), lambda x: x.add_(1.0), lambda x: torch.zeros(3, dtype=F64).copy_(x),
        lambda x: x.__iadd__(1.0), lambda x: torch.zeros(3, dtype=F64).__setitem__(0, x[0]), lambda x: x[0].item(),
        lambda x: variance_of(1.0 / x), lambda x: x.cumsum(0), lambda x: variance_of(F.dropout(x, 0.1, training=True)),
    ],
)  # fmt: skip
def test_raises_when_a_function_has_no_rule(call):
    with pytest.raises(NoMomentRule, match="egister"):
        call(uncertain(3))


def test_keywords_are_arguments():
    x, weight = uncertain(3, 4), draw(4, seed=1)
    pairs = (
        (torch.add(input=x, other=2 * x.detach()), torch.add(x, 2 * x.detach())),
        (F.layer_norm(x, normalized_shape=(4,), weight=weight), F.layer_norm(x, (4,), weight)),
        (F.linear(input=x, weight=weight[None]), F.linear(x, weight[None])),
        (torch.transpose(input=x, dim0=0, dim1=1), x.T),
        (torch.matmul(x, other=weight), x @ weight),
    )
    for a, b in pairs:
        assert torch.equal(variance_of(a), variance_of(b))


def test_a_variance_may_lie_otherwise_in_memory_than_its_mean():
    mean = draw(2, 3, 4)
    x = with_variance(mean, mean.square().permute(2, 1, 0).contiguous().permute(2, 1, 0))
    assert torch.equal(variance_of(x.view(6, 4)), mean.square().view(6, 4))


def test_patterns_are_no_content():
    mask, x = torch.ones(3, 1, dtype=F64), uncertain(3, 4)
    for out in (mask.expand_as(x), mask.to(x), torch.zeros_like(x)):
        assert variance_of(out) is None


def test_shapes_and_comparisons_pass():
    x = uncertain(3)
    assert (x.shape, x.dtype, x.dim(), len(x)) == ((3,), F64, 1, 3)
    assert torch.equal(x > 0, mean_of(x) > 0)
    assert x.argmax() == mean_of(x).argmax()


def test_variances_of_16_bit_means_are_float32():
    x = with_variance(torch.randn(4, dtype=torch.bfloat16), torch.rand(4))
    for out in (x + x, x * 2, x.float(), x.to(torch.float16), F.gelu(x), F.linear(x, torch.randn(2, 4).bfloat16())):
        assert variance_of(out).dtype == torch.float32
    assert (x + 1).dtype == torch.bfloat16


def test_own_rules(monkeypatch):
    class Cube(nn.Module):
        def forward(self, x):
            return x**3

    class Exponential(nn.Module):
        def forward(self, x):
            return x.exp()

    monkeypatch.setattr("kalman_peft.predictive.modules.MODULE_RULES", dict(MODULE_RULES))
    monkeypatch.setitem(FUNCTION_RULES, torch.Tensor.exp, None)
    x = uncertain(3)
    with pytest.raises(NoMomentRule, match=r"pow\(\).*called by module of type Cube.*register_rule"):
        run(Cube(), x)
    register_rule(Cube, lambda module, out, x: (3 * mean_of(x) ** 2) ** 2 * variance_of(x))
    register_rule(torch.Tensor.exp, lambda out, x: out**2 * variance_of(x))
    assert torch.allclose(variance_of(run(Cube(), x)), 9 * mean_of(x) ** 4 * variance_of(x))
    assert torch.allclose(variance_of(run(Exponential(), x)), mean_of(x).exp() ** 2 * variance_of(x))
    with pytest.raises(TypeError, match="register_rule"):
        register_rule("Cube", lambda *a: None)
