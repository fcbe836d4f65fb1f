"""Shared by every test: one thread, since the tensors are small and other work may hold the second core; and a tiny
model with its tokenizer, since most of what is above the losses needs both.

What takes seconds to import is imported where it is used: tests of ops and losses do without.
"""

import inspect
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastalign.config

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background has them ignore Ctrl-C, which some of them send to themselves.
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="Write the files that are derived from code anew.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("regenerate"):  # only the tests that write such files
        items[:] = [item for item in items if "generated" in getattr(item, "fixturenames", ())]


@pytest.fixture
def generated(pytestconfig: pytest.Config) -> Callable[[Path, str], None]:
    """f(path, text): the file holds exactly this text; with --regenerate it is written instead."""

    def check(path: Path, text: str) -> None:
        if pytestconfig.getoption("regenerate"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file() and path.read_text(encoding="utf-8") == text, f"{path} is out of date: run make generated"

    return check


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, 256 in all, and three special ones, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tiny_llama():
    """A function that makes a randomly initialised Llama of 2 layers, the same one each time."""

    from transformers import LlamaConfig, LlamaForCausalLM

    def make(*, tied=True, dtype=torch.float32, seed=0, vocab_size=259, **options):
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            # Large enough that log-probs differ by more than rounding between tokens, contexts and weights.
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
            **options,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).to(dtype)

    return make


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tiny_llama, tokenizer):
    """A folder with the tiny model and its tokenizer, as a user has it. Read only."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs():
    """Eight rows of preferences with prompts and completions of many lengths."""
    return [
        {"prompt": "Name a colour." + "!" * i, "chosen": "red"[: 1 + i % 3] * (i + 1), "rejected": "Mauve. " * (9 - i)}
        for i in range(8)
    ]


@pytest.fixture(scope="session")
def labelled(pairs):
    """Six rows with a label each, in turn."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, row in enumerate(pairs[:6])
    ]


@pytest.fixture(scope="session")
def check_finish():
    """f(finish, head, entropy, gradients): a backend's `finish` against its definition, in float32 and in float64."""
    from fastalign.ops.head import epilogue
    from fastalign.ops.head.epilogue import Sums
    from fastalign.ops.head.transform import LogitTransform

    generator = torch.Generator().manual_seed(4)
    width = 1024 + 11  # more than one pass of a kernel's loop, and ragged
    # A target of probability nearly 1, one of nearly none, its logit far below, a masked one, and a common one.
    sums = Sums(
        torch.tensor([2.0, 3.0, 1.0, 1.0, 0.5]), torch.tensor([1e-9, 40.0, 5.0, 2.0, 7.0]),
        torch.tensor([-1e-8, -90.0, -1.0, -3.0, -12.0]), torch.tensor([2.5, -20.0, -99.0, -math.inf, 0.1]),
    )  # fmt: skip
    weight = torch.randn(9, width, generator=generator).to(torch.bfloat16)
    targets, (a, b) = torch.tensor([8, 0, 3, 3, 5]), torch.randn(2, 5, width, generator=generator)
    eps = torch.finfo(torch.float32).eps

    def check(finish, head, entropy, gradients):
        def finished(finish, dtype):
            own = Sums(*(t.to(dtype) for t in sums))
            grads = {"a": a.to(dtype, copy=True), "b": b.to(dtype, copy=True) if entropy else None} if gradients else {}
            logprobs, entropies, stats = finish(weight, targets, head, own, entropy=entropy, **grads)
            return [logprobs, entropies, *stats, *(t for t in grads.values() if t is not None)]

        ours = finished(finish, torch.float32)
        low, exact = (finished(epilogue.finish, dtype) for dtype in (torch.float32, torch.float64))
        for x, y, z in zip(ours, low, exact, strict=True):
            finite = z.isfinite()
            assert torch.equal(finite, x.isfinite()) and torch.equal(x[~finite].double(), z[~finite])
            off = (y - z)[finite].abs().max() + eps * z[finite].abs().max()
            assert (x - z)[finite].abs().max() <= 2 * off
        if head == LogitTransform():
            assert ours[0][0].item() == pytest.approx(exact[0][0].item(), rel=1e-5)
            assert -1e-8 < ours[0][0] < 0

    return check


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """A trainer of one SGD step after another, with everything that could differ between runs turned off."""

    from fastalign.training.preference import PreferenceTrainer

    def make(
        model, rows, kind=PreferenceTrainer, *, eval_rows=None, peft_config=None, regularizers=(), callbacks=None,
        teacher=None, adapter=None, dtype="auto", quantization="none", **options,
    ):  # fmt: skip
        # Every trainer says which options it takes. The other annotations name classes of peft, which is not imported.
        config = getattr(
            fastalign.config, inspect.signature(kind).parameters["args"].annotation.removesuffix(" | None")
        )
        defaults = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
            "logging_steps": 1, "max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant",
            "learning_rate": 0.01, "max_grad_norm": 0.0, "per_device_train_batch_size": 4,
            "overwrite_output_dir": True,
        }  # fmt: skip
        if "ref_cache_dir" in config.__dataclass_fields__:
            defaults["ref_cache_dir"] = str(tmp_path / "cache")
        return kind(
            model, config(**{**defaults, **options}), rows, eval_rows, tokenizer, peft_config, callbacks,
            regularizers=regularizers, adapter=adapter, dtype=dtype, quantization=quantization,
            **({} if teacher is None else {"teacher": teacher}),
        )  # fmt: skip

    return make
