"""Names of methods: one spelling each, and refusals that say what is wrong."""

import pytest

from recipe_tools.methods import canonical, points, read_method


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("lora:lr=1e-3", "lora:lr=0.001"),
        ("lora:stop=1.0", "lora"),
        ("lora:stop=best,schedule=inverse", "lora:schedule=inverse,stop=best"),
        ("l2", "l2:strength=0.001"),
        ("l2:lr=0.123456789", "l2:strength=0.001,lr=0.123456789"),
        ("wise:alpha=.25/5e-1", "wise:alpha=0.25/0.5"),
        ("laplace:structure=kronecker,samples=64.0", "laplace:strength=100"),
        ("laplace:budget=5e-2,source=self", "laplace:source=self,budget=0.05"),
        ("init:weights=pissa_niter_4", "init:weights=pissa_niter_4"),
        ("ima:weight=.10,factors=both", "ima:weight=0.1"),
        ("loko:prior=10.0,memory=diagonal", "loko:prior=10,memory=diagonal"),
    ],
)
def test_one_spelling(text, name):
    assert canonical(text) == name == canonical(name)
    assert read_method(text) == read_method(name)


def test_points_are_names_of_their_own():
    assert points("lora:stop=0.25/1,lr=1e-3") == ["lora:lr=0.001,stop=0.25", "lora:lr=0.001"]
    assert points("kl") == ["kl:strength=1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sgd", "the kind is none of lora, wise"),
        ("lora:", "no options behind the colon"),
        ("lora:rate=1", "there is no option 'rate'; there are lr, schedule, stop"),
        ("loko:lr=1", "there is no option 'lr'"),
        ("lora:lr", "'lr' is not OPTION=VALUE"),
        ("lora:lr=1,lr=1", "lr is given twice"),
        ("lora:lr=0", r"lr must be a number in \(0, inf\), got 0"),
        ("lora:stop=2", r"stop must be a number in \(0, 1\] .* or best, got 2"),
        ("lora:stop=0.5/best", "stop must be"),
        ("lora:schedule=cosine", "schedule must be one of linear, constant, inverse, got 'cosine'"),
        ("wise:alpha=1.5", r"alpha must be a number in \[0, 1\]"),
        ("wise:alpha=0.5/0.50", "each value once"),
        ("l2:strength=nan", r"strength must be a number in \[0, inf\)"),
        ("kl:strength=1e999", "strength must be"),
        ("ewc:strength=-1", "strength must be"),
        ("ewc_dw:samples=1.5", "samples must be a whole number"),
        ("replay:share=1", r"share must be a number in \(0, 1\)"),
        ("replay:share=0", "share must be"),
        ("joint:share=0.5", "there is no option 'share'"),
        ("lora_plus:ratio=0.5", r"ratio must be a number in \[1, inf\)"),
        ("init:weights=milora", "weights must be one of pissa, pissa_niter_N"),
        ("init:weights=pissa_niter_x", "weights must be"),
        ("init:weights=olora,mode=kpm", "mode= goes with weights=corda"),
        ("init:weights=pissa,samples=3", "samples= goes with weights=corda or eva"),
        ("osf:keep=1", r"keep must be a number in \(0, 1\) or rank"),
        ("laplace:structure=dense", "structure must be one of"),
        ("laplace:structure=low_rank", "space='adapter'"),
        ("laplace:strength=often", "strength must be .* or evidence"),
        ("laplace:strength=evidence", "laplace_space"),
        ("laplace:strength=1,budget=0.1", "one of strength= and budget="),
        ("laplace:budget=0", "budget must be"),
        ("laplace:budget=1,source=proxy", "which source=proxy does not show"),
        ("laplace:source=proxy,fisher=empirical", "the target's own labels"),
        ("laplace:structure=diagonal,rank=4", "rank=4 has no effect"),
        ("laplace:replay=1", r"replay must be a number in \[0, 1\)"),
        ("ima:weight=-1", r"weight must be a number in \[0, inf\)"),
        ("ima:factors=c", "factors must be one of both, a, b"),
        ("ima:weight=0,factors=a", "factors= has no effect with weight=0"),
        ("loko:samples=8", "samples: no effect with prior=0"),
        ("loko:mode=prior", "mode: no effect with prior=0"),
        ("loko:prior=1,mode=prior", "needs space=adapter"),
        ("loko:memory=huge", "memory must be one of"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(ValueError, match=message):
        canonical(text)
