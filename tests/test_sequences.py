"""Packed, padded and encoder-decoder batches give the curvature of their sequences taken one by one."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_batch, make_lora_llama, randomise_b
from peft import LoraConfig, get_peft_model
from test_curvature import probe, shifted_log_likelihood
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForTokenClassification,
    DataCollatorWithFlattening,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from kalman_peft import (
    AdapterState,
    CategoricalObservation,
    KalmanConfig,
    KalmanTrainer,
    create_loko_optimizer,
    estimate_curvature,
)
from kalman_peft.curvature.sequences import Sequences, encoder_inputs, find_segments
from kalman_peft.observations import negative_log_likelihood


CAUSAL, PLAIN = CategoricalObservation(shift=True), CategoricalObservation(shift=False)
SEQ2SEQ = CategoricalObservation(shift=False, seq2seq=True)
SPACES = [("diagonal", "adapter"), ("diagonal", "delta_w"), ("kronecker", "adapter"), ("kronecker", "delta_w")]


def run(model, batches, structure="kronecker", space="delta_w", fisher="empirical", **kwargs):
    precision, record = estimate_curvature(
        model, batches, structure, fisher, space=space, progress_bar=False, **kwargs
    )
    if structure == "diagonal":
        return precision.entries, record
    sides = precision.blocks.items().items()
    return {f"{n}.{s}": f.to_dense() for n, pair in sides for s, f in zip("lr", pair, strict=True)}, record


def assert_same(first, second, rtol=1e-8, atol=1e-11):
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=rtol, atol=atol)


def unpad(batch, rows=None):
    """Each sequence of a padded batch without its padding."""
    rows = range(len(batch["labels"])) if rows is None else rows
    return [{k: v[i][batch["attention_mask"][i].bool()] for k, v in batch.items()} for i in rows]


def pack(sequences, tail=0):
    """One row of several sequences and some padding; labels cross the boundaries on purpose."""
    row = {k: torch.cat([s[k] for s in sequences]) for k in ("input_ids", "labels")}
    row["position_ids"] = torch.cat([torch.arange(len(s["labels"])) for s in sequences])
    fill = {"input_ids": 0, "labels": -100, "position_ids": 0}
    return {k: F.pad(v, (0, tail), value=fill[k])[None] for k, v in row.items()}


def full_labels(batch):
    """Labels on every real token, the first of each sequence included."""
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    return batch


# -- packed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure,space", SPACES)
class TestPacking:
    def test_a_packed_row_equals_the_padded_batch(self, structure, space):
        model, batch = make_lora_llama(attn="sdpa"), full_labels(make_batch())
        padded, record = run(model, [batch], structure, space)
        packed, packed_record = run(model, [pack(unpad(batch))], structure, space)
        assert_same(padded, packed)
        assert {k: record[k] for k in ("num_tokens", "num_sequences")} == {"num_tokens": 12, "num_sequences": 3}
        assert packed_record == record

    def test_several_packed_rows_equal_the_padded_batch(self, structure, space):
        model, batch = make_lora_llama(attn="sdpa"), full_labels(make_batch(lengths=(6, 4, 5, 3, 2)))
        rows = [pack(unpad(batch, (0, 1))), pack(unpad(batch, (2,)), tail=5), pack(unpad(batch, (4, 3)), tail=5)]
        packed = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
        first, record = run(model, [batch], structure, space)
        second, packed_record = run(model, [packed], structure, space)
        assert_same(first, second)
        assert packed_record == record

    def test_flattening_collator(self, structure, space):
        # Eager attention takes its softmax in float32.
        model, batch = make_lora_llama(attn="eager"), full_labels(make_batch())
        features = [{k: s[k].tolist() for k in ("input_ids", "labels")} for s in unpad(batch)]
        flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(features)
        assert flat["input_ids"].shape == (1, 15)
        assert_same(run(model, [batch], structure, space)[0], run(model, [flat], structure, space)[0], 1e-4, 1e-6)


def test_exact_fisher_of_a_packed_row():
    model, batch = make_lora_llama(attn="sdpa", target_modules=["v_proj"]), make_batch(lengths=(4, 3), prompt=1)
    padded, _ = run(model, [batch], "diagonal", "adapter", "exact")
    packed, _ = run(model, [pack(unpad(batch))], "diagonal", "adapter", "exact")
    assert_same(padded, packed)


def test_a_four_dimensional_mask_keeps_sequences_apart_by_itself():
    model, batch = make_lora_llama(attn="sdpa"), full_labels(make_batch())
    flat = pack(unpad(batch))
    flat["seq_idx"] = torch.tensor([[0] * 6 + [1] * 4 + [2] * 5])
    same = flat["seq_idx"][0][:, None] == flat["seq_idx"][0]
    flat["attention_mask"] = (same & torch.ones(15, 15).tril().bool())[None, None]
    flat["position_ids"] = torch.arange(15)[None]  # rotary attention sees differences of positions only
    assert_same(
        run(model, [batch], "diagonal", "adapter")[0], run(model, [flat], "diagonal", "adapter")[0], 1e-5, 1e-7
    )


def test_segments_are_numbered_over_the_batch():
    ids = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    segments = find_segments({"position_ids": ids}, ids, CAUSAL)
    assert segments.tolist() == [[0, 0, 0, 1, 1], [2, 3, 3, 3, 3]]
    flat = {
        "position_ids": ids[:1],
        "cu_seq_lens_q": torch.tensor([0, 3, 5]),
        "seq_idx": torch.tensor([[7, 7, 7, 4, 4]]),
    }
    assert find_segments(flat, ids[:1], CAUSAL).tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    "batch",
    [
        {},
        {"position_ids": torch.arange(4)[None]},
        {"position_ids": torch.arange(4).expand(2, -1)},
        {"position_ids": torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]]), "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])},
        {"position_ids": torch.tensor([[1, 1, 0, 1], [0, 1, 2, 1]]), "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])},
        {"seq_idx": torch.zeros(2, 4)},
        {"position_ids": torch.zeros(3, 2, 4)},
    ],
)  # fmt: skip
def test_unpacked_rows_are_not_taken_for_packed_ones(batch):
    assert find_segments(batch, torch.zeros(2, 4).long(), CAUSAL) is None


def test_split_pads_packed_sequences_and_views_others():
    labels = torch.tensor([[5, 5, 5, 5, 5, -100], [5, 5, 5, 5, 5, 5]])
    ids = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 1, 2]])  # one token alone explains nothing
    x = torch.arange(1, 25.0).view(2, 6, 2)
    sequences = Sequences.from_batch({"position_ids": ids}, labels, CAUSAL)
    out = sequences.split(x, "layer")
    assert sequences.count == 4 and out.shape == (4, 3, 2)
    zero = torch.zeros(1, 2)
    parts = (x[0, :3], torch.cat([x[0, 3:5], zero]), torch.cat([x[1, :2], zero]), x[1, 3:])
    assert torch.equal(out, torch.stack(parts))
    plain = Sequences.from_batch({}, labels, CAUSAL)
    assert plain.count == 2 and plain.split(x, "layer").data_ptr() == x.data_ptr()
    assert plain.split(x.flatten(0, 1), "flattened").shape == (2, 6, 2)
    with pytest.raises(ValueError, match="expert sees 2 rows for a batch of 2"):  # two tokens, not two sequences
        plain.split(x[:, 0], "expert")
    whole = Sequences.from_batch({"input_ids": ids}, labels[:, 0], CategoricalObservation(shift=False))
    assert whole.split(x[:, 0], "pooler").shape == (2, 1, 2)


def test_real_keeps_what_can_carry_a_gradient():
    labels = torch.tensor([[5, 5, 5, 5, 5, -100]])
    x = torch.arange(6.0).view(1, 6, 1)
    packed = Sequences.from_batch({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])}, labels, CAUSAL)
    assert packed.real(x).flatten().tolist() == [0, 1, 3]
    plain = Sequences.from_batch({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}, labels, CAUSAL)
    assert plain.real(x).flatten().tolist() == [1, 2, 3]
    assert plain.real(x[0, :4]).shape == (4, 1)  # rows that are not (batch, time): all of them
    partly = Sequences.from_batch({}, torch.tensor([1, -100]), PLAIN)
    assert partly.real(torch.zeros(2, 3, 1)).shape == (3, 1)


def test_loko_does_not_predict_across_a_boundary():
    model, batch = make_lora_llama(attn="sdpa"), full_labels(make_batch())
    flat = pack(unpad(batch))
    segments = find_segments(flat, flat["labels"], CAUSAL)
    logits = model(**{k: flat[k] for k in ("input_ids", "position_ids")}, use_cache=False).logits
    loss = create_loko_optimizer(model).observe(logits, flat["labels"], segments)
    padded = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total, count = negative_log_likelihood(padded, batch["labels"], CAUSAL)
    assert count == 12
    torch.testing.assert_close(loss, (total / count).detach())


def test_trainer_with_loko_and_a_source_on_packed_data(tmp_path):
    sequences = [
        {k: s[k].tolist() for k in ("input_ids", "labels")} for s in unpad(full_labels(make_batch((6, 4, 5, 3))))
    ]
    trainer = KalmanTrainer(
        model=make_lora_llama(torch.float32, attn="sdpa"),
        args=KalmanConfig(
            str(tmp_path), optimizer="loko", max_steps=1, per_device_train_batch_size=4, per_device_eval_batch_size=2,
            source_samples=2, source_heldout=2, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=sequences,
        source_dataset=sequences,
        data_collator=lambda rows: pack([{k: torch.tensor(v) for k, v in row.items()} for row in rows]),
    )  # fmt: skip
    trainer.train()
    assert trainer.optimizer.optimizer.param_groups[0]["tokens"] == 18 - 4  # first labels are explained by nothing
    assert trainer.belief.info["curvature"]["num_sequences"] == 2
    assert trainer.belief.info["curvature"]["num_tokens"] == 10 - 2


def packed_inputs(**others):
    return {"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), **others}


@pytest.mark.parametrize(
    "batch,match",
    [
        (packed_inputs(attention_mask=torch.ones(1, 5)), "Leave attention_mask out"),
        ({"seq_idx": torch.tensor([[0, 0, 0, 1, 1]])}, "only if it is given position_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 5])}, "only if it is given position_ids"),
        (packed_inputs(seq_idx=torch.tensor([[0, 0, 1, 1, 1]])), "seq_idx and position_ids disagree"),
        (packed_inputs(cu_seq_lens_q=torch.tensor([0, 2, 5])), "cu_seq_lens_q and position_ids disagree"),
    ],
)
def test_raises_when_packed_sequences_would_see_each_other(batch, match):
    with pytest.raises(ValueError, match=match):
        Sequences.from_batch(batch, torch.zeros(1, 5).long(), CAUSAL)


def test_raises_when_flash_attention_gets_several_packed_rows():
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"))
    labels = torch.zeros(2, 5).long()
    batch = {"position_ids": packed_inputs()["position_ids"].expand(2, -1)}
    with pytest.raises(ValueError, match=r"batches of one row only.*has 2"):
        Sequences.from_batch(batch, labels, CAUSAL, model)
    assert Sequences.from_batch(packed_inputs(), labels[:1], CAUSAL, model).count == 2


@pytest.mark.parametrize("observation,labels", [(PLAIN, torch.zeros(1, 5).long()), (SEQ2SEQ, torch.zeros(1, 5).long()), (PLAIN, torch.zeros(1).long())])  # fmt: skip
def test_raises_when_packed_sequences_meet_a_model_that_is_not_causal(observation, labels):
    with pytest.raises(ValueError, match="causal language models only"):
        Sequences.from_batch(packed_inputs(), labels, observation)


def test_raises_when_a_layer_does_not_see_the_sequences():
    labels = torch.zeros(2, 5).long()
    plain = Sequences.from_batch({}, labels, CAUSAL)
    with pytest.raises(ValueError, match=r"experts sees 7 rows for a batch of 2.*structure='kronecker'"):
        plain.split(torch.zeros(7, 3), "experts")
    packed = Sequences.from_batch({"position_ids": packed_inputs()["position_ids"].expand(2, -1)}, labels, CAUSAL)
    for shape in ((2, 4, 3), (9, 3), (2, 3)):
        with pytest.raises(ValueError, match=r"packed shape \(2, 5\), 4 sequences.*structure='kronecker'"):
            packed.split(torch.zeros(shape), "experts")


# -- token classification --------------------------------------------------------------------------------------------


def make_token_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = BertForTokenClassification._from_config(config, attn_implementation="eager").double()
    lora = LoraConfig(r=2, target_modules=["query", "value", "output.dense"], task_type="TOKEN_CLS")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    randomise_b(model)
    return model


def make_token_batch():
    """Four sequences, the last one without labels."""
    batch = make_batch(lengths=(5, 3, 4, 6), prompt=1)
    batch["labels"] = (batch["labels"] % 3).where(batch["labels"] != -100, -100)
    batch["labels"][3] = -100
    return batch


def reference_scores(model, state, sequences, log_likelihood):
    """Sum over sequences of squared scores, by one autograd call for each."""
    total = {k: 0 for k in state.parameters()}
    model.eval()
    for sequence in sequences:
        grads = torch.autograd.grad(log_likelihood(sequence), list(state.parameters().values()))
        total = {k: total[k] + g.square() for k, g in zip(total, grads, strict=True)}
    return total


def labelled_log_likelihood(logits, labels):
    keep = labels != -100
    return logits.log_softmax(-1)[keep].gather(-1, labels[keep][:, None]).sum()


def test_token_classification_matches_autograd():
    model, batch = make_token_bert(), make_token_batch()
    state = AdapterState(model, warn_excluded=False)
    got, record = run(model, [batch], "diagonal", "adapter")

    def log_likelihood(sequence):
        return labelled_log_likelihood(model(input_ids=sequence["input_ids"][None]).logits[0], sequence["labels"])

    expected = reference_scores(model, state, unpad(batch, range(3)), log_likelihood)
    assert record["num_tokens"] == 9
    assert_same(got, {k: v / 9 for k, v in expected.items()})


@pytest.mark.parametrize("structure,space", SPACES)
def test_token_classification_counts_neither_padding_nor_sequences_without_labels(structure, space):
    model, batch = make_token_bert(), make_token_batch()
    one_by_one = [{k: v[None] for k, v in s.items()} for s in unpad(batch, range(3))]
    assert_same(run(model, [batch], structure, space)[0], run(model, one_by_one, structure, space)[0])


# -- encoder-decoders ------------------------------------------------------------------------------------------------


def make_t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=17, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, initializer_factor=3.0, dropout_rate=0.4,
    )  # fmt: skip
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="eager")
    return with_adapter(model, ["q", "k", "v", "o", "wi"])


def make_bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=17, d_model=8, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, max_position_embeddings=16, init_std=0.4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
        dropout=0.4, activation_dropout=0.3,
    )  # fmt: skip
    model = BartForConditionalGeneration._from_config(config, attn_implementation="eager")
    return with_adapter(model, ["q_proj", "k_proj", "v_proj", "fc1"])


def with_adapter(model, targets):
    lora = LoraConfig(r=2, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(model.double(), lora, autocast_adapter_dtype=False)
    randomise_b(model)
    return model


# T5's layer norm works in float32.
MODELS = {"t5": (make_t5, 2e-4, 1e-6), "bart": (make_bart, 1e-8, 1e-11)}


def make_seq2seq(decoder=(3, 5, 2), side="right"):
    """Encoder lengths (5, 3, 4), padded, with decoder labels of other lengths, padded."""
    batch = make_batch(lengths=(5, 3, 4), side=side)
    labels = make_batch(lengths=decoder, prompt=0, seed=5)["labels"]
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def single_sequences(batch):
    return [
        {
            "input_ids": batch["input_ids"][i][batch["attention_mask"][i].bool()][None],
            "labels": batch["labels"][i][batch["labels"][i] != -100][None],
        }
        for i in range(len(batch["labels"]))
    ]


CASES = [
    ("t5", (3, 5, 2), "right"),
    ("t5", (2, 3, 4), "left"),
    ("bart", (3, 5, 2), "right"),
    ("bart", (2, 3, 4), "right"),
]


@pytest.mark.parametrize("name,decoder,side", CASES)
def test_encoder_decoder_matches_autograd_on_each_sequence(name, decoder, side):
    make, rtol, atol = MODELS[name]
    model, batch = make(), make_seq2seq(decoder, side)
    state = AdapterState(model)
    got, record = run(model, [batch], "diagonal", "adapter")

    def log_likelihood(sequence):
        return labelled_log_likelihood(model(**sequence).logits, sequence["labels"])

    expected = reference_scores(model, state, single_sequences(batch), log_likelihood)
    assert record["num_tokens"] == sum(decoder) and record["num_sequences"] == 3
    assert_same(got, {k: v / sum(decoder) for k, v in expected.items()}, rtol, atol)


@pytest.mark.parametrize("structure,space", SPACES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("decoder", [(3, 4, 2), (3, 5, 2)])  # the second makes both sides five positions long
def test_encoder_decoder_padding_counts_nothing(name, structure, space, decoder):
    make, rtol, atol = MODELS[name]
    model, batch = make(), make_seq2seq(decoder)
    alone, _ = run(model, single_sequences(batch), structure, space)
    assert_same(run(model, [batch], structure, space)[0], alone, rtol, atol)
    longer = {k: F.pad(v, (0, 2), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    longer["decoder_attention_mask"] = (longer["labels"] != -100).long()
    longer["decoder_input_ids"] = model.get_base_model().prepare_decoder_input_ids_from_labels(longer["labels"])
    assert_same(run(model, [longer], structure, space)[0], alone, rtol, atol)


@pytest.mark.parametrize("name", MODELS)
def test_encoder_inputs_are_those_with_the_encoders_length(name):
    model = MODELS[name][0]()
    state = AdapterState(model)
    lengths = {}
    for index, pair in enumerate(state):
        pair.linear_a.register_forward_hook(lambda m, args, out, i=index: lengths.__setitem__(i, args[0].shape[1]))
    model(input_ids=torch.ones(1, 5).long(), labels=torch.ones(1, 3).long())
    assert set(lengths.values()) == {3, 5}
    assert encoder_inputs(state) == [lengths[i] == 5 for i in range(len(state))]


def test_encoder_inputs_of_a_decoder_are_none():
    assert not any(encoder_inputs(AdapterState(make_lora_llama())))


def test_real_follows_the_shape_where_it_contradicts_the_name():
    batch = make_seq2seq((3, 4, 2))
    sequences = Sequences.from_batch(batch, batch["labels"], SEQ2SEQ)
    encoder, decoder = torch.zeros(3, 5, 1), torch.zeros(3, 4, 1)
    assert sequences.real(encoder, encoder=True).shape == sequences.real(encoder).shape == (12, 1)
    assert sequences.real(decoder, encoder=True).shape == sequences.real(decoder).shape == (9, 1)


def test_encoder_of_a_sequence_without_labels_counts_nothing():
    batch = make_seq2seq()
    batch["labels"][1] = -100
    x = torch.zeros(3, 5, 1)
    assert Sequences.from_batch(batch, batch["labels"], SEQ2SEQ).real(x, encoder=True).shape == (9, 1)
    del batch["attention_mask"]
    assert Sequences.from_batch(batch, batch["labels"], SEQ2SEQ).real(x, encoder=True).shape == (10, 1)


def flattening_model():
    """A model that hands some layers (batch * time, d), as OPT's feed-forward layers are."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=17, hidden_size=8, ffn_dim=12, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=8,
        max_position_embeddings=64, pad_token_id=0, dropout=0.3, attention_dropout=0.2, layerdrop=0.2,
    )  # fmt: skip
    model = OPTForCausalLM._from_config(config, attn_implementation="sdpa").to(torch.float64)
    lora = LoraConfig(r=2, target_modules=["q_proj", "fc1", "fc2"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    randomise_b(model)
    return model


@pytest.mark.parametrize("structure", ["kronecker", "diagonal", "ekfac", "dense"])
def test_flattened_rows_are_told_by_sequence_and_padding(structure):
    model, batch = flattening_model(), make_batch()
    longer = {k: F.pad(v, (0, 20), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    alone = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    expected = probe(fit(model, [batch], structure))
    for other in ([longer], alone):
        for key, value in probe(fit(model, other, structure)).items():
            torch.testing.assert_close(value, expected[key])


def fit(model, batches, structure):
    return estimate_curvature(model, batches, structure, "empirical", space="adapter", progress_bar=False)[0]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["opt", "t5", "bart"])
def test_dropout_inside_checkpointed_layers_is_off(kind, reentrant):
    if kind == "opt":
        model, batch = flattening_model(), make_batch()
    else:
        model, batch = MODELS[kind][0](), make_seq2seq()
    plain = probe(fit(model, [batch], "diagonal"))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    before = {
        (n, k): v for n, m in model.named_modules() for k, v in vars(m).items() if "drop" in k and isinstance(v, float)
    }
    for _ in range(2):
        for key, value in probe(fit(model, [batch], "diagonal")).items():
            torch.testing.assert_close(value, plain[key], rtol=1e-6, atol=1e-9)
    after = {
        (n, k): v for n, m in model.named_modules() for k, v in vars(m).items() if "drop" in k and isinstance(v, float)
    }
    assert after == before and any(before.values())


@pytest.mark.parametrize("structure", ["diagonal", "ekfac", "dense", "low_rank", "kronecker"])
def test_shared_modules_are_right_or_refused(structure):
    model = make_lora_llama(target_modules=["v_proj", "down_proj"])
    layers = model.base_model.model.model.layers
    layers[1].mlp = layers[0].mlp  # one module, called twice
    batch = make_batch()
    if structure in ("diagonal", "ekfac"):
        with pytest.raises(ValueError, match="called several times in one forward pass"):
            fit(model, [batch], structure)
        return
    precision = fit(model, [batch], structure)
    if structure == "kronecker":
        return
    state = AdapterState(model)
    expected = 0
    for row in range(3):
        grads = torch.autograd.grad(shifted_log_likelihood(model, batch, row), list(state.parameters().values()))
        score = torch.cat([g.reshape(-1) for g in grads])
        expected = expected + torch.outer(score, score)
    torch.testing.assert_close(precision.to_dense(), expected / (batch["labels"][:, 1:] != -100).sum())
