"""Runs by `run_training`: the ways they differ from the one in test_train.py."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as tf

from fastalign.cli import run
from fastalign.cli.main import main
from fastalign.cli.run import quartiles, run_training
from fastalign.cli.run_options import RunOptions
from fastalign.config.preference import PreferenceConfig
from fastalign.config.sft import SFTConfig
from fastalign.errors import ConfigError, DataError
from fastalign.evaluation.answers import Answers
from fastalign.files import append_metrics, read_metrics
from fastalign.models.loading import load_model


@pytest.fixture
def options(tmp_path, pairs, model_dir):
    """Options of a run over pairs, or over rows given, with files in place."""

    def options(rows=pairs, **over):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return RunOptions(**{"model": str(model_dir), "train": str(tmp_path / "rows.jsonl"), **over})

    return options


@pytest.fixture
def config(tmp_path):
    def config(kind=PreferenceConfig, **over):
        cache = {"ref_cache_dir": str(tmp_path / "cache")} if kind is PreferenceConfig else {}
        defaults = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True, "max_steps": 1,
            "save_strategy": "no", "logging_steps": 1, "overwrite_output_dir": "resume_from_checkpoint" not in over,
        }  # fmt: skip
        return kind(**{**defaults, **cache, **over})

    return config


def test_whole_model_is_saved_and_the_run_keeps_its_options(options, config, pairs):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    folder = run_training(options(rows, lora_rank=0), config(SFTConfig, learning_rate=1e-3))
    kept = json.loads((folder / "run.json").read_text())
    assert kept["lora_rank"] == 0 and kept["learning_rate"] == 1e-3
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "model")
    assert isinstance(model, tf.LlamaForCausalLM)
    assert tf.AutoTokenizer.from_pretrained(folder / "model").chat_template
    assert (folder / "samples.jsonl").exists() is False  # no held-out rows, nothing to answer
    assert "learning_rate" in (folder / "report.html").read_text()


def test_an_adapter_s_run_folder_loads_in_plain_transformers_and_peft_and_in_the_next_command(
    options, config, model_dir, tmp_path, capsys
):
    """The run's options once lay there as config.json, and everything took them for a model's."""
    from peft import AutoPeftModelForCausalLM

    folder = run_training(options(lora_rank=2), config(learning_rate=0.1))
    assert not (folder / "config.json").exists()
    assert tf.AutoTokenizer.from_pretrained(folder).chat_template
    adapted = tf.AutoModelForCausalLM.from_pretrained(folder)
    by_peft = AutoPeftModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        found = [model(input_ids=ids).logits for model in (adapted, by_peft)]
        base = tf.AutoModelForCausalLM.from_pretrained(model_dir)(input_ids=ids).logits
    assert torch.equal(*found) and not torch.equal(found[0], base)
    (tmp_path / "prose.txt").write_text("The river rises in the hills. " * 5, encoding="utf-8")
    assert main(["tax", str(model_dir), str(folder), "--text", str(tmp_path / "prose.txt"), "--length", "64"]) == 0
    assert "KL(base || tuned)" in capsys.readouterr().out


def test_stages_chain(options, config, tmp_path, pairs):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    first = run_training(options(rows), config(SFTConfig, learning_rate=1e-2, max_steps=3))
    first = first.rename(tmp_path / "sft")
    ids, sft = torch.arange(5, 60)[None], load_model(first, dtype="float32")
    for way in ({}, {"adapter": "continue"}, {"lora_rank": 0}):
        folder = run_training(options(model=str(first), dtype="float32", **way), config(learning_rate=1e-9))
        last = load_model(folder / "model" if "lora_rank" in way else folder, dtype="float32")
        with torch.no_grad():
            assert (last(input_ids=ids).logits - sft(input_ids=ids).logits).abs().max() < 1e-3
        facts = json.loads((folder / "summary.json").read_text())["facts"]["method"]
        expected = "further" if "adapter" in way else "all weights" if way else "LoRA of rank 16"
        assert expected in facts
        assert "the adapter it came with" in (folder / "preflight.txt").read_text()
        shutil.rmtree(folder)


@pytest.mark.parametrize(("targets", "layers"), [("q_proj", {"q_proj"}), ("q_proj, up_proj", {"q_proj", "up_proj"})])
def test_adapters_are_where_they_were_asked_for(options, config, targets, layers):
    folder = run_training(options(lora_targets=targets, lora_rank=2, lora_alpha=6), config())
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == layers
    assert (adapter["r"], adapter["lora_alpha"]) == (2, 6)


def test_chat_rows_are_shown_by_their_question(options, config, tmp_path):
    def row(question, i):
        return {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "Well" * (i + 1)}],
        }

    rows = [row("Is it?", 0), row("Is it?", 1), row("Was it?", 2)]
    made = options(rows, eval=str(tmp_path / "rows.jsonl"), samples=5, max_new_tokens=3)
    folder = run_training(made, config(num_train_epochs=1))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == ["Is it?", "Was it?"]  # each question once


def test_run_goes_on_from_a_checkpoint(options, config, tmp_path):
    def steps(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    whole = run_training(
        options(), config(output_dir=str(tmp_path / "whole"), max_steps=2, lr_scheduler_type="constant")
    )
    saving = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    folder = run_training(options(), config(**saving))
    append_metrics(folder / "metrics.jsonl", {"step": 1, "note": "kept"})
    run_training(options(), config(max_steps=2, resume_from_checkpoint=str(folder / "checkpoint-1"), **saving))
    assert steps(folder) == steps(whole)
    assert len(steps(folder)) == 2
    assert '"kept"' in (folder / "metrics.jsonl").read_text()  # it did not begin again
    with pytest.raises(ConfigError, match="no folder"):
        run_training(options(), config(resume_from_checkpoint=str(folder / "checkpoint-9")))


def test_same_seed_same_run(options, config, tmp_path):
    weights = []
    for name in ("a", "b"):
        torch.manual_seed(len(weights))  # whatever was drawn before
        folder = run_training(options(lora_rank=2), config(output_dir=str(tmp_path / name), seed=7, max_steps=2))
        weights.append((folder / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_shown_answers_are_the_quartiles_of_the_change_in_length():
    old = Answers(["a"] * 5, [100, 100, 100, 100, 100], [True] * 5)
    new = Answers(["b"] * 5, [90, 10, 100, 50, 70], [True] * 5)
    assert quartiles(old, new) == [3, 4, 0]  # changes -50, -30, -10 of -90, -50, -30, -10, 0
    assert quartiles(Answers(["a"], [5], [True]), Answers(["b"], [5], [True])) == [0]


def test_without_held_out_rows_there_is_no_empty_table_and_one_time(options, config, capsys):
    folder = run_training(options(title="[bold]My run"), config())
    said = capsys.readouterr().out
    assert "held-out" not in said and "[bold]My run" in said
    shown = json.loads((folder / "summary.json").read_text())["facts"]["training time"].split(" on ")[0]
    assert shown in (folder / "report.html").read_text()
    assert max(line["time"] for line in read_metrics(folder / "metrics.jsonl")) < 60 and shown.endswith(" s")


def test_only_the_first_process_prints_generates_and_writes_the_report(options, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PreferenceConfig, "process_index", property(lambda self: 1))
    monkeypatch.setattr(run, "answer", lambda *args, **kwargs: pytest.fail("it generated"))
    made = options(eval=str(tmp_path / "rows.jsonl"), samples=2)
    folder = run_training(made, config())
    assert not (folder / "report.html").exists() and not (folder / "summary.json").exists()
    assert capsys.readouterr().out == ""


def test_text_of_models_and_data_is_no_markup_on_the_terminal(options, config, tmp_path, pairs, capsys):
    """A title with [/red] once ended the run with a traceback after all the training."""
    title = "[/red] [link=http://x]y[/link] \\[v2]"
    rows = [{**row, "prompt": f"[/bold] {row['prompt']}\x1b[2J"} for row in pairs]
    folder = tmp_path / "[run]"
    made = options(rows, title=title, eval=str(tmp_path / "rows.jsonl"), samples=3, max_new_tokens=3)
    assert run_training(made, config(output_dir=str(folder))) == folder
    said = capsys.readouterr().out
    assert title in said and "[/bold]" in said and "[run]" in said and "\x1b" not in said


def test_rows_come_from_several_files_and_evaluations_have_names(options, config, tmp_path, pairs):
    for name, rows in (("a", pairs[:4]), ("b", pairs[4:])):
        named = [{"q": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    train = [{"path": str(tmp_path / "a.jsonl"), "weight": 2}, str(tmp_path / "b.jsonl")]
    held_out = {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}
    run = options(train=train, eval=held_out, columns={"prompt": "q"}, samples=1, max_new_tokens=4)
    folder = run_training(run, config())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["dataset"] == "a.jsonl + b.jsonl" and summary["facts"]["training"].startswith("12 rows")
    metrics = [row["metric"] for row in summary["rows"]]
    assert {f"Held-out loss ({name})" for name in "ab"} <= {*metrics}, metrics
    assert json.loads((folder / "samples.jsonl").read_text().splitlines()[0])["prompt"] == pairs[0]["prompt"]


@pytest.mark.parametrize("which", ["train", "eval"])
def test_an_error_says_in_which_rows_it_is(options, config, tmp_path, which):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "half\n')
    with pytest.raises(DataError, match=rf"^{which}: .*bad\.jsonl, line 2: not valid JSON"):
        run_training(options(**{which: str(tmp_path / "bad.jsonl")}), config())


def test_prompts_of_content_parts_are_shown(options, config, tmp_path, pairs):
    parts = [{"type": "text", "text": "Name a colour."}]
    rows = [{**row, "prompt": [{"role": "user", "content": parts}]} for row in pairs]
    folder = run_training(options(rows, eval=str(tmp_path / "rows.jsonl"), samples=1, max_new_tokens=4), config())
    assert "Name a colour." in json.loads((folder / "samples.jsonl").read_text().splitlines()[0])["prompt"]
