"""A user of the Hub, in a process of its own: `worker.py push|load|offline FOLDER`, see test_hub.py."""

import json
import sys
from pathlib import Path
from unittest import mock

import torch

from kalman_peft import Belief


# Imports are where they are used: most of the time of these processes is spent on them.
sys.path.insert(0, str(Path(__file__).parents[1]))
MINE, READER, OTHER = "write-me", "read-me", "write-you"
FOLDER = Path(sys.argv[2])
ERRORS = {}


def attempt(name, call, *args, **kwargs):
    """Keep what `call` raises; nothing where it returns."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        causes, cause = [], error.__cause__
        while cause is not None:
            causes, cause = [*causes, type(cause).__name__], cause.__cause__
        ERRORS[name] = {"type": type(error).__name__, "message": str(error), "causes": causes}


def base_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 15).view(2, 6)).logits


def changed(belief, factor):
    return Belief({k: factor * m for k, m in belief.mean.items()}, belief.precision, belief.info)


def same(one, other):
    mine, theirs = one._tensors(), other._tensors()
    return (
        one.info == other.info and mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    )


def train(strategy, **options):
    from peft import LoraConfig, get_peft_model
    from training import dataset, make_tokenizer, trainer

    lora = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = trainer(
        FOLDER / strategy, make_tokenizer(), model=get_peft_model(base_model(), lora), source=dataset(12, seed=9),
        max_steps=2, save_steps=1, push_to_hub=True, hub_model_id=f"me/{strategy}", hub_token=MINE,
        hub_strategy=strategy, **options,
    )  # fmt: skip
    run.train()
    return run


def push():
    from conftest import make_llama

    make_llama(torch.float32, attn="sdpa").save_pretrained(FOLDER / "base")
    for strategy in ("checkpoint", "all_checkpoints"):
        train(strategy)
    run = train("every_save", hub_private_repo=False)
    run.push_to_hub()
    run.belief.save_pretrained(FOLDER / "belief")
    torch.save(logits(run.model), FOLDER / "logits.pt")
    belief = run.belief
    commit = belief.push_to_hub("alone", private=True, token=MINE, commit_message="A belief")
    belief.push_to_hub("me/every_save", token=MINE, subfolder="kept")
    changed(belief, 2).push_to_hub("me/every_save", revision="second", token=MINE)
    pull = changed(belief, 3).push_to_hub("me/every_save", create_pr=True, token=OTHER)
    belief.push_to_hub("me/cut-in-flight", token=MINE)
    belief.push_to_hub("me/bit-flipped", token=MINE)
    attempt("no token", belief.push_to_hub, "me/new")
    attempt("unknown token", belief.push_to_hub, "me/new", token="nonsense")
    attempt("reader", belief.push_to_hub, "me/every_save", token=READER)
    attempt("other", belief.push_to_hub, "me/every_save", token=OTHER)
    attempt("other's private", belief.push_to_hub, "me/alone", token=OTHER)
    attempt("pull request on a branch", belief.push_to_hub, "me/every_save", create_pr=True, revision="second")
    attempt("no stored token", belief.push_to_hub, "me/new", token=True)
    attempt("failed upload", changed(belief, 5).push_to_hub, "me/no-storage", token=MINE)
    with mock.patch("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9"):
        attempt("unreachable", belief.push_to_hub, "me/new", token=MINE)
    belief.mean[next(iter(belief.mean))][0, 0] = torch.nan
    attempt("not finite", belief.push_to_hub, "me/every_save", token=MINE)
    return {"commit": commit.oid, "message": commit.commit_message, "pull": pull.pr_url}


def load():
    from peft import PeftModel

    belief = Belief.from_pretrained(FOLDER / "belief")
    model = PeftModel.from_pretrained(base_model(), "me/every_save")
    assert torch.equal(logits(model), torch.load(FOLDER / "logits.pt"))
    Belief.from_pretrained("me/every_save").check(model)
    loaded = {
        "with the adapter": ("me/every_save", {}),
        "subfolder": ("me/every_save", {"subfolder": "kept"}),
        "last checkpoint": ("me/checkpoint", {"subfolder": "last-checkpoint"}),
        "checkpoint's top": ("me/checkpoint", {}),
        "a checkpoint": ("me/all_checkpoints", {"subfolder": "checkpoint-1"}),
        "alone and private": ("me/alone", {"token": READER}),
    }
    found = {}
    for name, (repo, options) in loaded.items():
        other = Belief.from_pretrained(repo, **options)
        mine = belief if name in ("with the adapter", "subfolder", "alone and private") else None
        found[name] = same(other, mine) if mine else len(other.mean) == len(belief.mean)
    second = Belief.from_pretrained("me/every_save", revision="second", cache_dir=FOLDER / "cache")
    found["revision"] = same(second, changed(belief, 2)) and any((FOLDER / "cache").iterdir())
    found["pull request"] = same(Belief.from_pretrained("me/every_save", revision="refs/pr/1"), changed(belief, 3))
    attempt("private without token", Belief.from_pretrained, "me/alone", cache_dir=FOLDER / "new")
    attempt("private for others", Belief.from_pretrained, "me/alone", token=OTHER, cache_dir=FOLDER / "new")
    attempt("no such repository", Belief.from_pretrained, "me/nowhere", token=MINE)
    attempt("no such revision", Belief.from_pretrained, "me/every_save", revision="third")
    attempt("no belief", Belief.from_pretrained, "me/every_save", subfolder="elsewhere")
    attempt("no id", Belief.from_pretrained, "out/of/nowhere")
    attempt("cut in flight", Belief.from_pretrained, "me/cut-in-flight")
    attempt("bit flipped", Belief.from_pretrained, "me/bit-flipped")
    attempt("cut on disk", load_cut)
    attempt("not cached", Belief.from_pretrained, "me/every_save", local_files_only=True, cache_dir=FOLDER / "new")
    return found


def load_cut():
    """What the cache holds was damaged; `force_download` mends it."""
    options = {"cache_dir": FOLDER / "cut"}
    belief = Belief.from_pretrained("me/every_save", **options)
    (cached,) = (FOLDER / "cut").glob("**/snapshots/*/belief.safetensors")
    whole = cached.read_bytes()
    cached.write_bytes(whole[: len(whole) // 2])
    try:
        Belief.from_pretrained("me/every_save", **options)
    finally:
        assert same(Belief.from_pretrained("me/every_save", force_download=True, **options), belief)


def offline():
    """After the Hub went away; the cache is that of `load`."""
    belief = Belief.from_pretrained(FOLDER / "belief")
    found = {"cached": same(Belief.from_pretrained("me/every_save"), belief)}
    attempt("not cached", Belief.from_pretrained, "me/bit-flipped-never-asked")
    attempt("push", belief.push_to_hub, "me/every_save", token=MINE)
    attempt("forced", Belief.from_pretrained, "me/every_save", force_download=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = {"push": push, "load": load, "offline": offline}[sys.argv[1]]()
    (FOLDER / f"{sys.argv[1]}.json").write_text(json.dumps({"result": result, "errors": ERRORS}))
