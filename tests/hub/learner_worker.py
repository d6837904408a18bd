"""A user who learns task after task, in a process of its own: `learner_worker.py push|load FOLDER`, see test_learner.py."""

import json
import shutil
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
FOLDER = Path(sys.argv[2])
NOISY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def push():
    import torch
    from conftest import make_llama
    from learning import TASKS, learner

    run = learner(FOLDER / "mine")
    for name in ("a", "b"):
        run.learn(name, TASKS[name])
    run.smooth()
    first = run.push_to_hub("me/tasks", token="write-me", private=True)
    try:
        run.push_to_hub("me/tasks", token="read-me")
    except OSError as error:
        refused = f"{type(error).__name__}: {error}"
    run.push_to_hub("me/tasks", token="write-me", revision="second", commit_message="Again")
    make_llama().save_pretrained(FOLDER / "base")
    run.learn("c", TASKS["c"])
    # A longer learner first, then a shorter one with a stray folder, in one repository.
    run.push_to_hub("me/again", token="write-me")
    short = learner(FOLDER / "short", process_noise={NOISY: torch.full((2, 8), 0.5)})
    short.learn("x", TASKS["a"])
    shutil.copytree(short.store.task(0), short.store.folder / "tasks" / ".001-y.tmp")
    shutil.copytree(short.store.task(0), short.store.folder / "smoothed" / "nothing")
    short.push_to_hub("me/again", token="write-me")
    return {"commit": first.oid, "message": first.commit_message, "refused": refused}


def load():
    import torch
    from conftest import make_llama
    from learning import TASKS, TOKENIZER, config, contents
    from peft import PeftModel
    from transformers import DataCollatorForSeq2Seq

    from kalman_peft import AdapterState, Belief, ContinualLearner

    found = {}
    try:
        ContinualLearner.from_pretrained("me/tasks", make_llama(torch.float32, "sdpa"), config(FOLDER / "refused"))
    except OSError as error:
        found["refused"] = f"{type(error).__name__}: {error}"
    # Two lines:
    learner = ContinualLearner.from_pretrained(
        "me/tasks", make_llama(torch.float32, "sdpa"), config(FOLDER / "theirs"), token="read-me", process_noise=1e-3,
        processing_class=TOKENIZER, data_collator=DataCollatorForSeq2Seq(TOKENIZER, label_pad_token_id=-100),
    )  # fmt: skip
    learner.learn("c", TASKS["c"])
    mine, theirs = contents(FOLDER / "mine"), contents(FOLDER / "theirs")
    found["same"] = mine == theirs and len(learner.records()) == 3
    belief = Belief.from_pretrained("me/tasks", token="read-me")
    found["lineage"] = [entry["name"] for entry in belief.info["lineage"]]
    plain = PeftModel.from_pretrained(make_llama(torch.float32, "sdpa"), "me/tasks", token="read-me")
    found["newest"] = all(torch.equal(t, belief.mean[k]) for k, t in AdapterState(plain).snapshot().items())
    smoothed = PeftModel.from_pretrained(
        make_llama(torch.float32, "sdpa"), "me/tasks", token="read-me", subfolder="smoothed/a"
    )
    short = ContinualLearner.from_pretrained(
        "me/again", make_llama(torch.float32, "sdpa"), config(FOLDER / "went on"), token="read-me"
    )
    noise = short.transition.process_noise
    found["again"] = [[entry["name"] for entry in short.tasks], float(noise[NOISY].sum())]
    found["smoothed"] = any(not torch.equal(t, belief.mean[k]) for k, t in AdapterState(smoothed).snapshot().items())
    return found


if __name__ == "__main__":
    result = {"push": push, "load": load}[sys.argv[1]]()
    (FOLDER / f"{sys.argv[1]}.json").write_text(json.dumps(result))
