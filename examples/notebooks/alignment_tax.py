# %% [markdown]
# # What tuning costs, and what holds the cost down
#
# Preference tuning changes a model on text that it was not tuned for. This notebook tunes a model twice, without and
# with a KL penalty to the start, and measures the change token by token: the alignment tax.
#
# Set `MODEL` to your model; with SmolLM2 it takes a few minutes on two cores.

# %%
import os
import tempfile
from pathlib import Path

from peft import LoraConfig

from fastalign import KLToStart, PreferenceConfig, PreferenceTrainer
from fastalign.evaluation import measure_tax
from fastalign.report import show_tax

MODEL = os.environ.get("MODEL", "smollm2-135m-instruct")
STEPS = int(os.environ.get("STEPS", "20"))
folder = Path(tempfile.mkdtemp())
prose = folder / "prose.txt"
prose.write_text("The river rises in the hills, and it is a day's walk to the first of the villages.\n" * 8)
PAIRS = [
    {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "There are so many colours that it is hard to say."},
    {"prompt": "What is 2 + 3?", "chosen": "5.", "rejected": "Let me think about this question for a while first."},
    {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "As requested, I am going to say hello to you now."},
    {"prompt": "Capital of France?", "chosen": "Paris.", "rejected": "France is a country, and it has a capital."},
]


# %%
def tune(name: str, regularizers: list) -> Path:
    """Trains a LoRA adapter with a learning rate that is too high on purpose, and saves it."""
    trainer = PreferenceTrainer(
        MODEL,
        PreferenceConfig(
            output_dir=str(folder / name),
            learning_rate=1e-3,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=PAIRS,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        regularizers=regularizers,
    )
    trainer.train()
    trainer.save_model()
    return folder / name


# %% [markdown]
# ## Without anything that holds the model

# %%
plain = measure_tax(MODEL, str(tune("plain", [])), [str(prose)], length=64)
show_tax(plain)

# %% [markdown]
# ## With the exact KL divergence to the start added to the loss

# %%
held = measure_tax(MODEL, str(tune("held", [KLToStart(1.0)])), [str(prose)], length=64)
print(f"KL(base || tuned) per token: {plain['total']['kl_mean']:.3f} nats, held {held['total']['kl_mean']:.3f}")
