"""Commands in this process: rows in a file, and a command that must fail with one sentence."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="session")
def write_rows():
    """f(path, rows): the rows as a .jsonl file; returns its path."""

    def write(path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def rows(tmp_path, pairs, write_rows):
    """A file of preference rows."""
    return write_rows(tmp_path / "pairs.jsonl", pairs)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, model_dir, pairs, write_rows):
    """f(name): the folder of a run that a command left. Read only.

    dpo: an adapter on pairs, with held-out rows and a checkpoint. sft: all weights, on completions.
    """
    from fastalign.cli.main import main

    base, folders = tmp_path_factory.mktemp("runs"), {}
    completions = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    files = {name: write_rows(base / f"{name}.jsonl", rows) for name, rows in (("dpo", pairs), ("sft", completions))}
    own = {
        "dpo": ["learning_rate=1e-2", f"eval={files['dpo']}", "lora_rank=2", "samples=3", "max_new_tokens=6"],
        "sft": ["learning_rate=1e-3", "lora_rank=0", "dtype=float32"],
    }

    def trained(name):
        if name not in folders:
            options = [
                f"model={model_dir}", f"train={files[name]}", f"output_dir={base / name}", "max_steps=12",
                "save_steps=6", "logging_steps=1", "use_cpu=true", "disable_tqdm=true",
                "per_device_train_batch_size=4", *own[name],
            ]  # fmt: skip
            if name == "dpo":
                options.append(f"ref_cache_dir={base / 'cache'}")
            assert main([name, *options]) == 0
            folders[name] = base / name
        return folders[name]

    return trained


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail, and returns the one sentence it says."""
    from fastalign.cli.main import main

    def refused(*argv) -> str:
        assert main([str(item) for item in argv]) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("fastalign: "), captured.err
        return lines[0]

    return refused


@pytest.fixture
def shown(capsys):
    """f(*argv): what a command prints that ends by itself, such as --help."""
    from fastalign.cli.main import main

    def shown(*argv) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(list(argv))
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return shown


@pytest.fixture
def large_run(tmp_path):
    """The configuration of a run with a model of 8 billion parameters, of which only the config.json is there."""
    sizes = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    (tmp_path / "rows.jsonl").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text("method: dpo\nmodel: ../" + tmp_path.name + "\ntrain: ./rows.jsonl\ndtype: bfloat16\n")
    return str(path)
