"""`fastalign generate`: answers of a run's model, of a model folder, of a stopped run; prompts that are refused."""

from __future__ import annotations

import json
import shutil

import pytest

from fastalign.cli.main import main


def answers(capsys, *argv):
    capsys.readouterr()
    assert main(["generate", *map(str, argv)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run_answers_as_its_report_says(trained, capsys, tmp_path):
    """The prompts of the run are plain strings, so --plain gives the answers that the run made after training."""
    folder = trained("dpo")
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    prompts = [word for sample in samples for word in ("--prompt", sample["prompt"])]
    found = answers(capsys, folder, *prompts, "--plain", "--max-new-tokens", 6)
    assert [row["answer"] for row in found] == [sample["after"] for sample in samples]
    assert all(row["tokens"] <= 6 for row in found)
    out = tmp_path / "answers.jsonl"
    assert main(["generate", str(folder), *prompts, "--plain", "--max-new-tokens", "6", "--out", str(out)]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == found


def test_every_kind_of_folder_answers(trained, model_dir, capsys, tmp_path, pairs):
    whole, adapter = trained("sft"), trained("dpo")
    stopped = shutil.copytree(whole, tmp_path / "stopped", ignore=shutil.ignore_patterns("model", "summary.json"))
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in pairs))

    def texts(source):
        found = answers(capsys, source, "--prompts", file, "--max-new-tokens", 5, "--dtype", "float32")
        assert [row["prompt"] for row in found] == [row["prompt"] for row in pairs]
        return [row["answer"] for row in found]

    assert texts(whole) == texts(whole / "model") == texts(stopped)  # max_steps is a multiple of save_steps
    assert texts(whole) != texts(model_dir)
    assert texts(adapter) == texts(adapter / "checkpoint-12") != texts(model_dir)
    assert texts(whole)[:2] == texts(whole)[:2]


def test_messages_and_lines_of_text_are_prompts(model_dir, capsys, tmp_path):
    turns = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "red"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "lines.txt").write_text("Name a colour.\n\n")
    by_file = [
        answers(capsys, model_dir, "--prompts", tmp_path / name, "--max-new-tokens", 5)[0]["answer"]
        for name in ("rows.jsonl", "lines.txt")
    ]
    assert by_file[0] == by_file[1]  # the answer in the file is not part of the prompt
    plain = answers(capsys, model_dir, "--prompt", "Name a colour.", "--max-new-tokens", 5, "--plain")
    assert plain[0]["answer"] != by_file[0]


def test_the_seed_decides_the_draws(model_dir, capsys):
    def drawn(seed):
        words = ("--prompt", "Hello", "--max-new-tokens", 8, "--temperature", 1, "--seed", seed)
        return answers(capsys, model_dir, *words)[0]["answer"]

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "There is no prompt"),
        (["--prompt", " "], "A --prompt is empty"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a" * 300], "has 256 positions"),
        (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--prompt", "a", "--max-new-tokens", "5", "--out", "nowhere/a.jsonl"], "--out nowhere/a.jsonl"),
    ],
)
def test_what_cannot_work_is_one_sentence(refused, model_dir, argv, said):
    assert said in refused("generate", model_dir, *argv)


def test_files_without_prompts_are_refused(refused, model_dir, tmp_path):
    for text, said in (('{"text": "a"}', "none of which holds prompts"), ('{"prompt": ""}', "is empty")):
        (tmp_path / "rows.jsonl").write_text(text + "\n")
        assert said in refused("generate", model_dir, "--prompts", tmp_path / "rows.jsonl")
