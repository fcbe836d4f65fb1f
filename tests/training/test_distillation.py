"""The distillation trainer: off-policy, on the student's own samples, and from the command line."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from fastalign.cli import main
from fastalign.errors import ConfigError, DataError
from fastalign.reference import logits_divergence
from fastalign.regularizers.distillation import Distillation
from fastalign.training.distillation import DistillationTrainer
from fastalign.training.sft import SFTTrainer

EXACT = 1e-9


@pytest.fixture(scope="module")
def text_rows():
    return [{"prompt": "ab"[: 1 + i % 2] * (1 + i), "completion": "cde" * (1 + i % 3) + "f" * i} for i in range(8)]


def test_off_policy_is_fine_tuning_with_the_regulariser(make_trainer, gpt2, text_rows):
    one, other = gpt2(), gpt2()
    make_trainer(one, text_rows, DistillationTrainer, teacher=gpt2(seed=1), weight=0.3, temperature=2.0).train()
    regularizers = [Distillation(gpt2(seed=1), 0.3, 2.0)]
    make_trainer(other, text_rows, SFTTrainer, regularizers=regularizers).train()
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), gpt2().parameters(), strict=True))


@pytest.mark.parametrize("accumulated", [1, 4])
def test_on_policy_learns_the_divergence_alone_on_the_students_samples(make_trainer, gpt2, text_rows, accumulated):
    student, teacher = gpt2(), gpt2(seed=1)
    trainer = make_trainer(
        student, text_rows, DistillationTrainer, teacher=gpt2(seed=1), weight=0.25, temperature=1.5, on_policy=1.0,
        divergence="jsd", jsd_beta=0.1, sample_tokens=9, per_device_train_batch_size=4 // accumulated,
        gradient_accumulation_steps=accumulated,
    )  # fmt: skip
    seen, inner = [], trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kw: (seen.extend(inputs["batch"].rows), inner(model, inputs, **kw))[
        1
    ]
    trainer.train()
    assert len(seen) == 4
    own = {tuple(row["prompt_ids"]): row["completion_ids"][0] for row in trainer.train_dataset}
    for row in seen:
        (completion,) = row["completion_ids"]
        assert tuple(row["prompt_ids"]) in own and completion != own[tuple(row["prompt_ids"])]
        assert len(completion) == 9 or completion[-1] == 2
    plain, parts = gpt2(), []
    for row in seen:
        ids, start = torch.tensor([row["prompt_ids"] + row["completion_ids"][0]]), len(row["prompt_ids"])
        ours, theirs = (m(input_ids=ids).logits[0, start - 1 : -1] for m in (plain, teacher))
        parts.append(logits_divergence(ours, theirs.detach(), divergence="jsd", temperature=1.5, jsd_beta=0.1))
    (0.75 * 1.5**2 * torch.cat(parts).mean()).backward()
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        assert (ours - (theirs - 0.01 * theirs.grad)).abs().max() < EXACT


def test_on_policy_steps_are_spread_evenly(make_trainer, gpt2, text_rows):
    trainer = make_trainer(gpt2(), text_rows, DistillationTrainer, teacher="start", on_policy=0.3)
    steps = [trainer._on_policy(step) for step in range(1000)]
    assert sum(steps) == 300
    assert all(abs(sum(steps[a : a + 50]) - 15) <= 1 for a in range(950))


def test_samples_are_the_same_for_the_same_seed(make_trainer, gpt2, text_rows):
    weights = []
    for _ in range(2):
        torch.manual_seed(len(weights))
        student = gpt2()
        make_trainer(
            student, text_rows, DistillationTrainer, teacher=gpt2(seed=1), on_policy=0.5, max_steps=2, sample_tokens=5
        ).train()
        weights.append([p.detach().clone() for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_bad_input_is_one_sentence(make_trainer, gpt2, text_rows):
    with pytest.raises(ConfigError, match="teacher is missing"):
        make_trainer(gpt2(), text_rows, DistillationTrainer)
    with pytest.raises(DataError, match="samples from prompts"):
        make_trainer(gpt2(), [{"text": "abc"}], DistillationTrainer, teacher="start", on_policy=0.5)


# From files and the command line


@pytest.fixture
def files(tmp_path, model_dir, tiny_llama, tokenizer, text_rows):
    tiny_llama(seed=5).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    for name, rows in (("rows", text_rows), ("prose", [{"text": "Some text."}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model": str(model_dir), "train": "./rows.jsonl", "output_dir": str(tmp_path / "run"), "max_steps": 2,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "lora_rank": 2,
        "learning_rate": 0.01,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    return tmp_path


def logged(folder, run="run"):
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def test_distill_command(files):
    assert (
        main.main(["distill", "--config", str(files / "run.yaml"), f"teacher={files / 'teacher'}", "on_policy=0.5"])
        == 0
    )
    lines = [line for line in logged(files) if "distillation" in line]
    assert len(lines) == 2 and lines[0]["distillation"] > 0
    assert json.loads((files / "run" / "summary.json").read_text())["method"] == "distillation"


def test_regularizers_of_a_file_and_of_the_command_line(files):
    recipe = yaml.safe_load((files / "run.yaml").read_text())
    recipe |= {"method": "sft", "regularizers": [{"name": "replay", "text": "./prose.jsonl", "share": 0.2}]}
    (files / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main.main(["train", str(files / "recipe.yaml")]) == 0
    assert any("replay/nll" in line for line in logged(files))
    every = (
        "[{name: kl_to_start, strength: 1}, {name: l2_sp, strength: 0.5}, {name: layerwise, stages: [1, 2]}, "
        f"{{name: replay, text: {files / 'prose.jsonl'}, share: 0.5}}, "
        "{name: distillation, teacher: start, weight: 0.5}]"
    )
    assert main.main(["train", str(files / "recipe.yaml"), f"regularizers={every}", "overwrite_output_dir=true"]) == 0
    last = next(line for line in reversed(logged(files)) if "loss" in line)
    assert {"kl_to_start", "l2_sp", "layers_trained", "replay/nll", "distillation"} <= last.keys()
    assert json.loads((files / "run" / "run.json").read_text())["regularizers"][1]["name"] == "l2_sp"


def test_fisher_of_a_text_holds_an_adapter_in_place(files, model_dir):
    fisher = files / "fisher.safetensors"
    command = ["fisher", str(model_dir), "--text", str(files / "prose.jsonl"), "--out", str(fisher), "--bits", "8"]
    assert main.main(command) == 0
    regularizers = f"regularizers=[{{name: ewc, fisher: {fisher}, strength: 1e3}}]"
    assert main.main(["sft", "--config", str(files / "run.yaml"), regularizers, "overwrite_output_dir=true"]) == 0
    penalties = [line["ewc"] for line in logged(files) if "ewc" in line]
    assert penalties[0] == 0 < penalties[1]
    # of several files beside the configuration, 1.25 F in all
    recipe = yaml.safe_load((files / "run.yaml").read_text()) | {"method": "sft", "output_dir": str(files / "online")}
    several = ["./fisher.safetensors", "./fisher.safetensors"]
    recipe["regularizers"] = [{"name": "ewc", "fisher": several, "decay": 0.25, "strength": 800}]
    (files / "online.yaml").write_text(yaml.safe_dump(recipe))
    assert main.main(["train", str(files / "online.yaml")]) == 0
    assert [line["ewc"] for line in logged(files, "online") if "ewc" in line] == pytest.approx(penalties, rel=1e-4)


@pytest.mark.parametrize(
    ("regularizers", "said"),
    [
        ("[{name: ewcc, strength: 1}]", "name of a regularizer is 'ewcc'; did you mean 'ewc'?"),
        ("[{strength: 1}]", "name of a regularizer is None"),
        ("[{name: l2_sp, strenth: 1}]", "Unknown option 'strenth' of L2SP; did you mean 'strength'?"),
        ("[{name: l2_sp}]", "strength of L2SP is missing"),
        ("[{name: l2_sp, strength: much}]", "strength is 'much'; expected float"),
        ("[{name: l2_sp, strength: -1}]", "strength of L2SP is -1"),
        ("[{name: replay, text: nowhere.jsonl}]", "nowhere.jsonl is not a file"),
        ("[{name: layerwise, stages: [0]}]", "stages of LayerWise is [0]"),
        ("[{name: ewc, fisher: nowhere.safetensors, strength: 1}]", "nowhere.safetensors"),
        ("l2_sp", "regularizers is 'l2_sp'; expected list"),
    ],
)
def test_bad_regularizers_are_one_sentence(files, capsys, regularizers, said):
    command = ["sft", "--config", str(files / "run.yaml"), f"regularizers={regularizers}"]
    assert main.main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1] and lines[-1].startswith("fastalign: ")
    assert not (files / "run" / "metrics.jsonl").exists()
