"""A tiny chat model, its tokenizer and its data, shared by the tests around TRL and the command line."""

import torch
from conftest import make_lora_llama
from datasets import Dataset
from transformers import PreTrainedTokenizerFast


WORDS = "abcdefghijklmnop"
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>"]
VOCAB = len(SPECIAL) + len(WORDS)
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
SFT = {
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "use_cpu": True, "report_to": [], "bf16": False,
    "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "max_steps": 2, "max_length": 16,
    "gradient_checkpointing": False,
}  # fmt: skip


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        extra_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def model(dtype=torch.float32, **options):
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return make_lora_llama(dtype, attn="sdpa", model_overrides=ids, **options)


def words(n=12, seed=0, least=3, most=8):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(least, most, (n,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(16, (size,), generator=generator)) for size in sizes]


def texts(n=12, seed=0):
    return Dataset.from_list([{"text": text} for text in words(n, seed)])


def pairs(n=12, seed=0):
    asked, answered = words(n, seed, 2, 5), words(n, seed + 100, 2, 5)
    return Dataset.from_list([{"prompt": a, "completion": " " + b} for a, b in zip(asked, answered, strict=True)])


def chats(n=12, seed=0):
    asked, answered = words(n, seed, 2, 5), words(n, seed + 100, 2, 5)
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
            for a, b in zip(asked, answered, strict=True)
        ]
    )
