"""The tax against plain torch on separate sequences, its command, and its page."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastalign.cli import main
from fastalign.evaluation.tax import TokenChanges, by_position, histogram, measure_tax
from fastalign.report.page import format_number

TEXT = "The quick brown fox jumps over the lazy dog. <script>alert(1)</script> Pack my box with five dozen jugs. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama, tokenizer, model_dir):
    """A tuned model, a run folder of a tuned model, and one of an adapter, and two files of text."""
    folder = tmp_path_factory.mktemp("tax")
    tuned = tiny_llama()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    tuned.save_pretrained(folder / "tuned")
    tokenizer.save_pretrained(folder / "tuned")
    tuned.save_pretrained(folder / "run" / "model")
    tokenizer.save_pretrained(folder / "run" / "model")
    torch.manual_seed(2)
    adapter = get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    adapter.save_pretrained(folder / "adapter")
    (folder / "prose.txt").write_text(TEXT)
    (folder / "talk.jsonl").write_text(json.dumps({"prompt": "Hello", "completion": " there, you."}) + "\n")
    return folder


def plain(base, tuned, tokenizer, ids):
    """KL, log-probs and entropies of the stock models, one window at a time."""
    p, q = (m.eval()(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1) for m in (base, tuned))
    at, targets = torch.arange(len(ids) - 1), torch.tensor(ids[1:])
    return {
        "kl": (p.exp() * (p - q)).sum(-1),
        "base": p[at, targets],
        "tuned": q[at, targets],
        "base_entropy": -(p.exp() * p).sum(-1),
        "tuned_entropy": -(q.exp() * q).sum(-1),
    }


def check(found, base, tuned, tokenizer, windows):
    with torch.no_grad():
        parts = [plain(base, tuned, tokenizer, ids) for ids in windows]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert found["tokens"] == len(whole["kl"])
    assert found["kl_mean"] == pytest.approx(whole["kl"].mean().item(), rel=1e-4)
    assert found["kl_sum"] == pytest.approx(whole["kl"].sum().item(), rel=1e-4)
    assert found["base_perplexity"] == pytest.approx((-whole["base"].mean()).exp().item(), rel=1e-5)
    assert found["tuned_perplexity"] == pytest.approx((-whole["tuned"].mean()).exp().item(), rel=1e-5)
    assert found["perplexity_change"] == pytest.approx(found["tuned_perplexity"] / found["base_perplexity"] - 1)
    change = (whole["tuned_entropy"].mean() - whole["base_entropy"].mean()).item()
    assert found["entropy_change"] == pytest.approx(change, abs=1e-5)
    assert found["kl_mean"] > 1e-3


@pytest.mark.parametrize("tuned", ["tuned", "run", "adapter"])
def test_numbers_are_those_of_the_stock_models(folder, model_dir, tiny_llama, tokenizer, tuned):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    files = [str(folder / "talk.jsonl"), str(folder / "prose.txt")]
    found = measure_tax(str(model_dir), str(folder / tuned), files, length=64, dtype="float32")
    if tuned == "adapter":
        stock = PeftModel.from_pretrained(tiny_llama(), folder / "adapter")
    else:
        stock = AutoModelForCausalLM.from_pretrained(folder / "tuned")
    ids = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    windows = [ids[at : at + 64] for at in range(0, len(ids), 64)]
    talk = [*tokenizer("Hello there, you.")["input_ids"], tokenizer.eos_token_id]
    check(found["files"][str(folder / "prose.txt")], tiny_llama(), stock, tokenizer, windows)
    check(found["files"][str(folder / "talk.jsonl")], tiny_llama(), stock, tokenizer, [talk])
    check(found["total"], tiny_llama(), stock, tokenizer, [talk, *windows])
    with torch.no_grad():
        kls = [plain(tiny_llama(), stock, tokenizer, ids)["kl"] for ids in [talk, *windows]]
    largest = max((kl.max().item(), n, int(kl.argmax()) + 1) for n, kl in enumerate(kls))
    first = found["most_changed"][0]
    assert first["kl"] == pytest.approx(largest[0], rel=1e-3)
    assert first["token"] == tokenizer.decode([[talk, *windows][largest[1]][largest[2]]])
    assert largest[1] > 0  # in the second file
    assert sum(kind["share"] for kind in found["kinds"]) <= 1 + 1e-9
    assert len(found["passages"]) == 3


def test_a_model_has_no_tax_over_itself(folder, model_dir):
    found = measure_tax(str(model_dir), str(model_dir), [str(folder / "talk.jsonl")], length=64)
    assert found["total"]["kl_sum"] == found["total"]["perplexity_change"] == found["total"]["entropy_change"] == 0.0


def test_a_folder_without_a_tokenizer_is_measured_by_the_bases(folder, model_dir, tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "bare")
    found = measure_tax(str(model_dir), str(tmp_path / "bare"), [str(folder / "talk.jsonl")], length=64)
    assert found["total"]["kl_sum"] == 0.0


def tokens(kl, positions) -> TokenChanges:
    n = len(kl)
    zeros = np.zeros(n)
    return TokenChanges(np.arange(n), np.zeros(n, int), np.array(positions), np.array(kl), zeros, zeros, zeros, zeros)


def test_positions_and_sizes_are_counted_in_their_bins():
    found = tokens([1.0, 3.0, 5.0, 0.0, 0.002], [1, 2, 3, 4, 9])
    assert [(p["from"], p["to"], p["tokens"], p["kl_mean"]) for p in by_position(found)] == [
        (1, 1, 1, 1.0), (2, 3, 2, 4.0), (4, 7, 1, 0.0), (8, 15, 1, 0.002),
    ]  # fmt: skip
    bins = histogram(found)
    assert sum(part["tokens"] for part in bins) == pytest.approx(1) and sum(p["kl"] for p in bins) == pytest.approx(1)
    assert bins[0]["tokens"] == 0.2 and bins[0]["kl"] == 0.0
    (one,) = [part for part in bins if part["from"] <= 0.002 < part["to"]]
    assert one["tokens"] == 0.2


def test_command_prints_and_writes(folder, model_dir, capsys):
    out = folder / "out"
    command = ["tax", str(model_dir), str(folder / "adapter"), "--text", str(folder / "prose.txt"), "--out", str(out)]
    assert main.main([*command, "--length", "64", "--max-tokens", "128"]) == 0
    text = capsys.readouterr().out
    for word in ("KL(base || tuned)", "Perplexity, change", "Entropy", "Tokens that changed most", "nats"):
        assert word in text
    rows = [line.replace(" to ", "-").split() for line in text.splitlines() if " to 63 " in line]
    found = json.loads((out / "tax.json").read_text())
    assert found["total"]["tokens"] == 126  # two windows, each without its first token
    assert rows == [["32-63", "64", format_number(found["by_position"][-1]["kl_mean"])]]
    page = (out / "tax.html").read_text()
    assert page.count("<svg") == 2 and "http://" not in page and "https://" not in page and "<script" not in page
    assert "By position" in page


@pytest.mark.parametrize(
    ("tuned", "text", "options", "said"),
    [
        ("nowhere", "prose.txt", [], "no model folder"),
        ("tuned", "nowhere.txt", [], "cannot be read"),
        ("tuned", "prose.txt", ["--length", "1"], "length is 1"),
        ("tuned", "prose.txt", ["--length", "300"], "256 positions"),
        ("other", "prose.txt", [], "different tokenizers"),
        ("smollm2-135m-instruct", "prose.txt", [], "different tokenizers"),  # no folder, but a tokenizer all the same
        ("larger", "prose.txt", [], "vocabulary has 260 entries where that of"),  # without a tokenizer
        ("pickled", "prose.txt", [], "nothing pickled is read"),
        ("misfit", "prose.txt", [], "does not fit"),
    ],
)
def test_bad_input_is_one_sentence(
    folder, model_dir, capsys, tokenizer, tiny_llama, tmp_path, tuned, text, options, said
):
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.add_tokens(["<new>"])
    tiny_llama(vocab_size=260).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    tiny_llama(vocab_size=260).save_pretrained(tmp_path / "larger")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text("{}")
    shutil.copytree(folder / "adapter", tmp_path / "misfit")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "misfit" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["nowhere"]}))
    path = {"tuned": folder / tuned, "nowhere": folder / tuned, "smollm2-135m-instruct": tuned}.get(tuned)
    assert (
        main.main(["tax", str(model_dir), str(path or tmp_path / tuned), "--text", str(folder / text), *options]) == 2
    )
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1] and lines[-1].startswith("fastalign: ")
