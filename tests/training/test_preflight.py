"""Before training: options that are refused, and the report on what training starts from."""

from __future__ import annotations

import http.server
import json
import sys
import threading

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments

from fastalign.config.preference import PreferenceConfig
from fastalign.config.sft import SFTConfig
from fastalign.errors import ConfigError
from fastalign.training import PreferenceTrainer, SFTTrainer
from fastalign.training.preflight import check_options, largest_batch

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def test_predicted_memory_counts_prompts_as_they_are_laid_out(make_trainer, tiny_llama, pairs):
    def tokens(**options) -> int:
        report = make_trainer(tiny_llama(), pairs, per_device_train_batch_size=8, **options).preflight_report()
        return int(report.split("longest batch (")[1].split()[0].replace(",", ""))

    assert tokens(share_prompts=False) - tokens() == sum(len(row["prompt"]) for row in pairs)


def test_preflight_report_says_what_training_starts_from(make_trainer, tiny_llama, pairs):
    trainer = make_trainer(
        tiny_llama(), pairs, peft_config=LoraConfig(**LORA), per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    report = trainer.preflight_report()
    assert "8 of 8 kept" in report
    assert "2 x 4 rows per step, packed, each prompt once" in report
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"{trainable:,} of " in report and "predicted memory" in report


def test_a_row_counts_its_prompt_as_it_is_laid_out():
    rows = [
        {"prompt_ids": [1, 2, 3], "completion_ids": [[4], [5, 6]]},
        {"prompt_ids": [], "completion_ids": [[1], [2]]},
    ]
    dataset = Dataset.from_list(rows)
    assert [largest_batch(dataset, layout, 1) for layout in ("shared", "packed", "padded")] == [6, 9, 9]
    assert largest_batch(dataset, "shared", 2) == largest_batch(dataset, "shared", 9) == 8


def test_options_that_would_fail_late_are_refused(tmp_path, monkeypatch):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, eval_strategy="epoch")
    check_options(args, has_eval_rows=True)
    with pytest.raises(ConfigError, match="eval_strategy is 'epoch', but there is no eval_dataset"):
        check_options(args, has_eval_rows=False)
    monkeypatch.setitem(sys.modules, "galore_torch", None)  # as where it is not installed
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, optim="galore_adamw", optim_target_modules=["mlp"])
    with pytest.raises(ConfigError, match="optim is 'galore_adamw', and cannot run here"):
        check_options(args, has_eval_rows=False)


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine that knows one token; yields the paths that were asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            known = self.headers.get("Authorization") == "Bearer hf_known"
            body = json.dumps({"name": "someone"} if known else {"error": "Invalid credentials"}).encode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("fastalign.training.preflight.is_offline_mode", lambda: False)
    yield asked
    server.shutdown()
    server.server_close()


def test_pushing_needs_a_hub_that_knows_the_user(hub, tmp_path):
    def options(token):
        return SFTConfig(output_dir=str(tmp_path), use_cpu=True, push_to_hub=True, hub_token=token)

    check_options(options("hf_known"), has_eval_rows=False)
    with pytest.raises(ConfigError, match="push_to_hub is True, but the hub cannot be used"):
        check_options(options("hf_other"), has_eval_rows=False)
    assert len(hub) >= 2
    check_options(SFTConfig(output_dir=str(tmp_path), use_cpu=True), has_eval_rows=False)


def test_pushing_is_refused_offline_before_anything_is_loaded(make_trainer, tmp_path, pairs, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("fastalign.training.preflight.is_offline_mode", lambda: False)
    with pytest.raises(ConfigError, match="leave push_to_hub out"):
        make_trainer("nowhere/at-all", pairs, push_to_hub=True, hub_token="hf_any")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"report_to": "wandb"}, "report_to is 'wandb', which is not installed: `pip install wandb`"),
        ({"report_to": ["tensorbord"]}, "did you mean 'tensorboard'"),
        ({"push_to_hub": True}, "push_to_hub is True, but there is no token"),
        ({"push_to_hub": True, "hub_token": "hf_x"}, "push_to_hub is True, but HF_HUB_OFFLINE is set"),
    ],
)
def test_what_needs_something_that_is_not_there_is_refused(tmp_path, monkeypatch, options, said):
    monkeypatch.setattr("fastalign.training.preflight.is_offline_mode", lambda: "hub_token" in options)
    monkeypatch.setattr("fastalign.training.preflight.get_token", lambda: None)
    monkeypatch.setattr("fastalign.training.preflight.get_available_reporting_integrations", list)
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    with pytest.raises(ConfigError, match=said):
        check_options(args, has_eval_rows=False)


def test_options_of_another_library_are_refused(tmp_path):
    for args in (None, TrainingArguments(str(tmp_path), use_cpu=True)):
        with pytest.raises(
            ConfigError, match=r"pass a PreferenceConfig, SFTConfig, DistillationConfig, RewardConfig or OnlineConfig"
        ):
            check_options(args, has_eval_rows=False)


@pytest.mark.parametrize(("trainer", "config"), [(SFTTrainer, SFTConfig), (PreferenceTrainer, PreferenceConfig)])
def test_arguments_that_would_do_nothing_are_refused(trainer, config, tmp_path):
    args = config(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigError, match="compute_metrics is not supported: evaluation forms no logits"):
        trainer("nowhere", args, [], compute_metrics=lambda predictions: {})
