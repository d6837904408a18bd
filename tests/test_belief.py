"""Belief files, and the checks that stand between a belief and the wrong model."""

import json
import os

import pytest
import torch
from conftest import make_batch, make_lora_llama

from kalman_peft import AdapterState, Belief, BeliefError


def fitted(model=None, **options):
    model = model or make_lora_llama(torch.float32)
    return model, Belief.fit(model, [make_batch()], progress_bar=False, **options)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
@pytest.mark.parametrize("space", ["adapter", "delta_w"])
def test_save_and_load_round_trip(tmp_path, structure, space):
    model, belief = fitted(structure=structure, space=space)
    belief.save_pretrained(tmp_path / "out")
    again = Belief.from_pretrained(tmp_path / "out")
    state = {k: v + 0.1 for k, v in AdapterState(model).snapshot().items()}
    energy, gradient = belief.energy_and_gradient(state)
    other, other_gradient = again.energy_and_gradient(state)
    assert energy > 0
    torch.testing.assert_close(energy, other)  # layers may be summed in another order
    assert all(torch.equal(gradient[k], other_gradient[k]) for k in gradient)
    assert again.info == belief.info
    assert again.info["curvature"]["num_sequences"] == 3
    assert sorted(os.listdir(tmp_path / "out")) == ["belief.safetensors", "belief_config.json"]
    again.check(model)


def test_source_data_travel_with_the_belief(tmp_path):
    _, belief = fitted()
    belief.source = {"input_ids": torch.arange(6, dtype=torch.int32).view(2, 3)}
    belief.info["source"] = {"kind": "self", "seed": 1}
    belief.to("cpu").save_pretrained(tmp_path)
    again = Belief.from_pretrained(tmp_path)
    assert torch.equal(again.source["input_ids"], belief.source["input_ids"])
    assert again.source["input_ids"].dtype == torch.int32
    assert again.info["source"] == {"kind": "self", "seed": 1}
    assert again.mean.keys() == belief.mean.keys()


def test_keys_do_not_carry_the_adapter_name(tmp_path):
    model, belief = fitted()
    belief.save_pretrained(tmp_path)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    state = Belief.from_pretrained(tmp_path).check(model)
    assert state.adapter_name == "second"
    from peft import get_peft_model_state_dict

    assert set(get_peft_model_state_dict(model, adapter_name="second")) == set(belief.mean)


def test_energy_is_zero_at_the_mean_and_follows_the_source_loss():
    # R is the second-order rise of the expected loss under the model's own labels: compare with the exact KL.
    model, belief = fitted(make_lora_llama(torch.float64), structure="diagonal", space="adapter", num_samples=400)
    batch = make_batch()
    state = AdapterState(model)
    torch.testing.assert_close(
        belief.energy(state.parameters()), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0
    )
    model.eval()
    keep = batch["labels"][:, 1:] != -100

    def log_p():
        with torch.no_grad():
            return (
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                .logits[:, :-1][keep]
                .log_softmax(-1)
            )

    before = log_p()
    key = state.pairs[0].key_b  # one weight at a time: the diagonal is then the whole matrix
    for index in range(4):
        p = state.parameters()[key].data.view(-1)
        p[index] += 0.01
        kl = (before.exp() * (before - log_p())).sum(-1).mean()
        torch.testing.assert_close(belief.energy(state.parameters()), kl, rtol=0.25, atol=1e-9)
        p[index] -= 0.01


def test_raises_when_rank_modules_scaling_or_base_differ(tmp_path):
    _, belief = fitted()
    belief.save_pretrained(tmp_path)
    belief = Belief.from_pretrained(tmp_path)
    with pytest.raises(BeliefError, match="use the rank `r`"):
        belief.check(make_lora_llama(torch.float32, r=3, lora_alpha=4.5))
    with pytest.raises(BeliefError, match="other layers"):
        belief.check(make_lora_llama(torch.float32, target_modules=["q_proj"]))
    with pytest.raises(BeliefError, match="other layers"):
        belief.check(make_lora_llama(torch.float32, target_modules=["q_proj", "v_proj", "down_proj", "up_proj"]))
    with pytest.raises(BeliefError, match="lora_alpha"):
        belief.check(make_lora_llama(torch.float32, lora_alpha=8))
    other = make_lora_llama(torch.float32)
    for p in other.base_model.model.model.layers[0].self_attn.q_proj.base_layer.parameters():
        p.data.mul_(1.1)
    with pytest.raises(BeliefError, match="base weights differ"):
        belief.check(other)
    belief.check(make_lora_llama(torch.bfloat16))  # the same base in another precision is the same base


def test_raises_when_a_file_is_truncated_foreign_or_missing(tmp_path):
    _, belief = fitted()
    belief.save_pretrained(tmp_path)
    weights, config = tmp_path / "belief.safetensors", tmp_path / "belief_config.json"
    whole, text = weights.read_bytes(), config.read_text()

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BeliefError, match="truncated"):
        Belief.from_pretrained(tmp_path)
    weights.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(BeliefError, match="truncated or no safetensors"):
        Belief.from_pretrained(tmp_path)
    weights.write_bytes(whole)

    config.write_text(text[: len(text) // 2])
    with pytest.raises(BeliefError, match="truncated"):
        Belief.from_pretrained(tmp_path)
    config.write_text('["foreign"]')
    with pytest.raises(BeliefError, match="no belief config"):
        Belief.from_pretrained(tmp_path)
    config.write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(BeliefError, match="format 99"):
        Belief.from_pretrained(tmp_path)
    config.write_text(text)

    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no belief\.safetensors"):
        Belief.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        Belief.from_pretrained(tmp_path / "nowhere")


def test_weights_stand_for_themselves_when_the_config_is_of_another_save(tmp_path, caplog):
    # As after an interruption between the two writes.
    model, first = fitted()
    _, second = fitted(structure="diagonal", space="adapter")
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path / "second")
    (tmp_path / "second" / "belief.safetensors").replace(tmp_path / "belief.safetensors")
    belief = Belief.from_pretrained(tmp_path)
    assert belief.precision.structure == "diagonal" and belief.info == second.info
    assert "another save" in caplog.text
    belief.check(model)


def test_raises_when_a_tensor_was_altered(tmp_path):
    from safetensors.torch import load_file, save_file

    _, belief = fitted()
    belief.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "belief.safetensors")
    name = sorted(tensors)[0]
    config = (tmp_path / "belief_config.json").read_text()
    save_file(tensors | {name: tensors[name].roll(1)}, tmp_path / "belief.safetensors", {"config": config})
    with pytest.raises(BeliefError, match="was altered"):
        Belief.from_pretrained(tmp_path)
    save_file(tensors, tmp_path / "belief.safetensors")
    with pytest.raises(BeliefError, match="no belief config"):
        Belief.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_files(tmp_path):
    _, belief = fitted()
    belief.save_pretrained(tmp_path)
    before = (tmp_path / "belief.safetensors").read_bytes()
    next(iter(belief.mean.values()))[0, 0] = float("nan")
    with pytest.raises(BeliefError, match="NaN or Inf"):
        belief.save_pretrained(tmp_path)
    assert (tmp_path / "belief.safetensors").read_bytes() == before
    assert len(os.listdir(tmp_path)) == 2


def test_files_have_the_mode_of_the_umask(tmp_path):
    _, belief = fitted()
    for umask, mode in ((0o027, 0o640), (0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            belief.save_pretrained(tmp_path)
        finally:
            os.umask(before)
        assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {mode}


def test_raises_when_layers_are_left_out_of_the_precision(tmp_path):
    model, belief = fitted(structure="diagonal", space="adapter")
    belief.precision.entries.pop(next(iter(belief.precision.entries)))
    belief.save_pretrained(tmp_path)
    with pytest.raises(BeliefError, match="does not cover the adapter"):
        Belief.from_pretrained(tmp_path).check(model)


def test_info_may_hold_numbers_of_numpy(tmp_path):
    _, belief = fitted()
    belief.info["score"] = torch.tensor(0.5).numpy()
    belief.save_pretrained(tmp_path)
    assert Belief.from_pretrained(tmp_path).info["score"] == 0.5
    belief.info["model"] = object()
    with pytest.raises(TypeError, match="which JSON cannot"):
        belief.save_pretrained(tmp_path)


@pytest.mark.parametrize("structure", ["dense", "low_rank", "kronecker"])
def test_what_is_read_computes_bit_for_bit_as_what_was_saved(tmp_path, structure):
    model, belief = fitted(structure=structure, space="adapter")
    belief.save_pretrained(tmp_path)
    again = Belief.from_pretrained(tmp_path)
    state = {k: v + 0.1 for k, v in AdapterState(model).snapshot().items()}
    other = again.energy_and_gradient(state)[1]
    assert all(torch.equal(g, other[k]) for k, g in belief.energy_and_gradient(state)[1].items())
