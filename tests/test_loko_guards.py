"""What LoKO refuses, so that nothing is trained, drawn or loaded by mistake."""

import pytest
import torch
from conftest import make_lora_bert, make_lora_llama
from peft import LoraConfig
from safetensors.torch import load_file
from training import dataset, make_tokenizer, trainer

from kalman_peft import AdapterState, CategoricalObservation, LikelihoodObservation, create_loko_optimizer


def observe(model, optimizer, batch):
    optimizer.observe(model(input_ids=batch["input_ids"]).logits, batch["labels"])
    optimizer.step()


def test_raises_when_the_named_adapter_is_not_trained():
    model = make_lora_llama()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"Adapter 'b' is not trained; call model.set_adapter"):
        create_loko_optimizer(model, adapter_name="b")


def test_raises_when_options_of_a_belief_come_without_one():
    with pytest.raises(ValueError, match="need `belief=`"):
        create_loko_optimizer(make_lora_llama(), belief_strength=2.0)
    with pytest.raises(ValueError, match=r"LikelihoodObservation\(f\) makes"):
        create_loko_optimizer(make_lora_llama(), observation=lambda z, y: z)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be callable"):
        LikelihoodObservation("poisson")  # type: ignore[arg-type]


def test_raises_when_logits_are_none_or_have_no_graph(batch):
    model = make_lora_llama()
    optimizer = create_loko_optimizer(model)
    with pytest.raises(ValueError, match="logits must be a tensor"):
        optimizer.observe(model(input_ids=batch["input_ids"]), batch["labels"])
    with pytest.raises(ValueError, match="labels must be a tensor"):
        optimizer.observe(model(input_ids=batch["input_ids"]).logits, None)  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(ValueError, match="no graph"):
        optimizer.observe(model(input_ids=batch["input_ids"]).logits, batch["labels"])


def test_raises_when_there_is_one_class():
    model = make_lora_bert(torch.float32, num_labels=1)
    optimizer = create_loko_optimizer(model, observation=CategoricalObservation(shift=False))
    with pytest.raises(ValueError, match="One class tells nothing"):
        optimizer.observe(model(input_ids=torch.tensor([[3, 4]])).logits, torch.tensor([0]))


def test_a_drawn_adapter_is_neither_trained_nor_taken_for_the_mean(batch):
    model = make_lora_llama(torch.float32)
    optimizer = create_loko_optimizer(model)
    observe(model, optimizer, batch)
    before = AdapterState(model).flatten().clone()
    with optimizer.sample(torch.Generator().manual_seed(0)):
        with pytest.raises(RuntimeError, match=r"observe\(\) inside sample"):
            optimizer.observe(model(input_ids=batch["input_ids"]).logits, batch["labels"])
        with pytest.raises(RuntimeError, match=r"belief\(\) inside sample"):
            optimizer.belief(model)
    assert torch.equal(AdapterState(model).flatten(), before)
    with pytest.raises(ValueError, match="scale must be"), optimizer.sample(scale=-1.0):
        pass
    observe(model, optimizer, batch)


def test_raises_when_the_saved_filter_is_over_other_parameters():
    saved = create_loko_optimizer(make_lora_bert(target_modules=["query"])).state_dict()
    with pytest.raises(ValueError, match=r"over '.*query.*' where this one has '.*key"):
        create_loko_optimizer(make_lora_bert(target_modules=["key"])).load_state_dict(saved)


def test_a_skipped_step_has_no_diagnostics(batch):
    model = make_lora_llama(torch.float32)
    optimizer = create_loko_optimizer(model)
    observe(model, optimizer, batch)
    assert "innovation" in optimizer.diagnostics
    assert optimizer.innovation == float(optimizer.diagnostics["innovation"])
    observe(model, optimizer, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert "innovation" not in optimizer.diagnostics
    assert optimizer.innovation is None


@pytest.mark.parametrize("evaluates", [False, True])
def test_checkpoints_hold_the_average_and_resume_bit_for_bit(tmp_path, evaluates):
    def build(folder):
        return trainer(
            tmp_path / folder, make_tokenizer(), optimizer="loko", loko_averaging=True, max_steps=4, save_steps=2,
            eval_dataset=dataset(4, seed=9), **{"eval_strategy": "steps", "eval_steps": 2} if evaluates else {},
        )  # fmt: skip

    whole = build("whole")
    whole.train()
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")
    for key, p in AdapterState(whole.model).parameters().items():  # a run with averaging ends at the average
        torch.testing.assert_close(saved["base_model.model." + key.removeprefix("base_model.model.")], p.detach())
    half = build("whole")
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(AdapterState(half.model).flatten(), AdapterState(whole.model).flatten())


def test_options_without_effect_are_said():
    with pytest.warns(UserWarning, match="rank: no effect with memory='diagonal'"):
        create_loko_optimizer(make_lora_llama(), memory="diagonal", rank=3)
    with pytest.raises(ValueError, match=r"trust_decay=1\.0 has no effect with max_decrease=None"):
        create_loko_optimizer(make_lora_llama(), max_decrease=None, trust_decay=1.0)
    for bad in ({"tempering": "0.5"}, {"rank": True}, {"process_noise": {"lora": "a"}}):
        with pytest.raises(ValueError, match=rf"{next(iter(bad))} must"):
            create_loko_optimizer(make_lora_llama(), **bad)
