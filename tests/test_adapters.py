"""AdapterState: what it sees, and what it refuses by name."""

import pytest
import torch
from conftest import make_llama, make_lora_bert, make_lora_llama
from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from kalman_peft import AdapterState


def test_keys_are_those_of_the_saved_adapter_and_vectors_round_trip():
    model = make_lora_llama(rank_pattern={"q_proj": 3})
    state = AdapterState(model)
    assert set(state.parameters()) == set(get_peft_model_state_dict(model))
    vector = state.flatten()
    assert vector.shape == (state.num_parameters,)
    parts = state.unflatten(vector)
    assert all(torch.equal(parts[k], p) for k, p in state.parameters().items())
    state.load({k: v + 1 for k, v in state.snapshot().items()})
    torch.testing.assert_close(state.flatten(), vector + 1)


def test_scaling_of_lora_and_rslora():
    assert {p.scaling for p in AdapterState(make_lora_llama())} == {1.5}
    rs = {p.scaling for p in AdapterState(make_lora_llama(use_rslora=True))}
    assert rs == {3 / 2**0.5}


def test_only_the_named_adapter_is_seen():
    model = make_lora_llama()
    model.add_adapter("other", LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert len(AdapterState(model)) == 6
    other = AdapterState(model, "other")
    assert len(other) == 2 and other.pairs[0].rank == 1
    with pytest.raises(ValueError, match=r"No adapter 'third'"):
        AdapterState(model, "third")


def test_every_trainable_tensor_is_covered_or_excluded_by_name():
    for model in (make_lora_bert(), make_lora_llama(use_dora=True), make_lora_llama(modules_to_save=["lm_head"])):
        state = AdapterState(model, warn_excluded=False)
        covered = {id(p) for p in state.parameters().values()}
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert (id(p) in covered) != (name in state.excluded), name
        assert state.excluded
    with pytest.warns(UserWarning, match="modules_to_save"):
        AdapterState(make_lora_bert())
    with pytest.warns(UserWarning, match="DoRA magnitude"):
        AdapterState(make_lora_llama(use_dora=True))


def test_raises_when_the_layer_is_an_embedding():
    model = make_lora_llama(target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match="embed_tokens: LoRA on an embedding"):
        AdapterState(model)


def test_raises_when_a_bare_parameter_is_targeted():
    model = make_llama()
    model.model.layers[0].mlp.register_parameter("extra", nn.Parameter(torch.randn(2, 4, 4)))
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.extra"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="ParamWrapper is not supported"):
        AdapterState(get_peft_model(model, config))


def test_raises_when_a_convolution_is_targeted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x)

    with pytest.raises(ValueError, match="conv: LoRA on Conv2d is not supported"):
        AdapterState(get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv"])))


def test_raises_when_the_method_is_not_lora():
    model = get_peft_model(make_llama(), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="IA3"):
        AdapterState(model)


def test_raises_when_the_model_has_no_adapter():
    with pytest.raises(TypeError, match="must be a PeftModel"):
        AdapterState(make_llama())


def test_raises_when_a_state_does_not_fit():
    state = AdapterState(make_lora_llama())
    with pytest.raises(ValueError, match="does not fit adapter"):
        state.load({"foreign": torch.zeros(1)})
