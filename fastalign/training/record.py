"""The run folder of a trainer in Python: the same files as those of a command, so that every command can read it.

run.json         the options. Objects have no name, so a sentence says why `fastalign train` cannot repeat such a run
preflight.txt    what training started from
summary.json     what was trained, and how fast
report.html      the page
the adapter, or a whole model in `model`
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from fastalign.config.record import NOT_REPEATABLE, RECORD, absolute, as_names, method_of_losses
from fastalign.files import write_json, write_text
from fastalign.memory import measure
from fastalign.models.adapters import adapter_base, causal_lm, lora_config
from fastalign.report.page import write_report
from fastalign.report.rendering import duration
from fastalign.training.checkpoint import AtomicCheckpoints
from fastalign.training.stopping import model_folder

if TYPE_CHECKING:
    from collections.abc import Mapping


class Given(NamedTuple):
    """The arguments of a trainer, as far as a command has options for them.

    Attributes:
        options: The options of a command, by name.
        objects: The arguments that are Python objects, which no option can name.
    """

    options: dict[str, Any]
    objects: list[str]


# Arguments of the trainers that no option can name.
_OBJECTS = ("processing_class", "regularizers", "callbacks")


def given_options(arguments: Mapping[str, Any], of_transformers: Mapping[str, Any]) -> Given:
    """The options that stand for the arguments of a trainer.

    Args:
        arguments: The arguments of `AlignmentTrainer` by name, and `way`, from `way_of`. Others are not read.
        of_transformers: Arguments of `transformers.Trainer`, which no option can name.
    """
    model, train, held_out = (arguments[name] for name in ("model", "train_dataset", "eval_dataset"))
    peft_config, way, dtype = (arguments[name] for name in ("peft_config", "way", "dtype"))
    options: dict[str, Any] = {
        name: arguments[name] for name in ("quantization", "double_quantization", "quantize_head")
    }
    options |= {"model": _name_of(model), "train": as_names(train), "eval": as_names(held_out)}
    options["dtype"] = str(dtype).removeprefix("torch.")
    objects = [] if isinstance(model, str | Path) else ["model"]
    objects += [name for name, rows in (("train_dataset", train), ("eval_dataset", held_out))
                if rows is not None and as_names(rows) is None]  # fmt: skip
    lora = _lora_options(peft_config)
    if lora is None:
        objects.append("peft_config")
    options |= lora or {}
    if isinstance(model, str | Path) and adapter_base(model) is not None:
        options["adapter"] = way
    rest = {**{name: arguments[name] for name in _OBJECTS}, **of_transformers}
    objects += [name for name, value in rest.items() if value is not None and value != () and value != []]
    return Given(options, objects)


def _name_of(model: nn.Module | str | Path) -> str:
    if isinstance(model, str | Path):
        return str(model)
    base: Any = causal_lm(model)
    return getattr(base, "name_or_path", "") or type(base).__name__


def _lora_options(peft_config: Any) -> dict[str, Any] | None:
    """The options of a new adapter; None where the options of a command cannot describe it."""
    if peft_config is None:
        return {"lora_rank": 0}
    found: dict[str, Any] = {
        key: getattr(peft_config, key, None) for key in ("r", "lora_alpha", "lora_dropout", "target_modules")
    }
    modules = found["target_modules"]
    targets = modules if isinstance(modules, str) else "default" if modules is None else ",".join(sorted(modules))
    rank, alpha, dropout = found["r"], found["lora_alpha"], found["lora_dropout"]
    if not isinstance(rank, int) or not targets:
        return None
    same = lora_config(rank=rank, alpha=alpha, dropout=dropout, targets=targets)
    theirs, ours = ({**config.to_dict(), "task_type": None} for config in (peft_config, same))
    if theirs != ours or (isinstance(modules, str) and modules not in ("all-linear", "default")):
        return None
    return {"lora_rank": rank, "lora_alpha": alpha, "lora_dropout": dropout, "lora_targets": targets}


def run_record(given: Given, args: Any) -> dict[str, Any]:
    """What run.json holds. In the place of a token for the hub `to_dict` puts a word."""
    losses = _losses(args)
    options = {
        key: absolute(value) if key in ("model", "train", "eval") else value for key, value in given.options.items()
    }
    record = {"method": method_of_losses(losses) if losses else args.method, **args.to_dict(), **options}
    if given.objects:
        record[NOT_REPEATABLE] = (
            f"{', '.join(given.objects)} {'was' if len(given.objects) == 1 else 'were'} given as Python objects, which "
            "have no name that a command could read"
        )
    return record


def _losses(args: Any) -> list[str]:
    """The losses of a preference method, which is called by them; none of a method that has a name."""
    losses = getattr(args, "loss_type", None)
    return losses if isinstance(losses, list) else []


def facts(trainer: Any) -> dict[str, str]:
    """What the report says of the training itself: rows, steps, time, speed and memory."""
    state, seconds, device = trainer.state, max(trainer.training_seconds, 1e-9), trainer.args.device
    rows = len(trainer.train_dataset)
    return {
        "training": f"{rows:,} rows, {state.epoch:.2g} epochs, {state.global_step} steps",
        "training time": f"{duration(seconds)} on {device}",
        "tokens/s": f"{trainer.tokens_seen / seconds:,.0f} (each prompt counted once)",
        "rows/s": f"{rows * state.epoch / seconds:.2f}",
        "peak memory": f"{measure.peak_bytes(device) / 1e9:.2f} GB, of the whole process",
    }


class RecordedRuns(AtomicCheckpoints):
    """The part of `AlignmentTrainer` that leaves a run folder as a command does.

    Attributes:
        given: What the trainer was given, as options of a command.
        recorded: Whether somebody else writes the files of the run folder, as the commands do.
    """

    given: Given
    recorded = False
    origin: Any
    preflight_report: Any
    stopping: Any

    def begin_record(self) -> None:
        """Writes the options and the preflight report, once it is certain that the folder may be used."""
        folder = Path(str(self.args.output_dir))
        if self.recorded or not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD, run_record(self.given, self.args))
        write_text(folder / "preflight.txt", self.preflight_report() + "\n")

    def train(self, *args, **kwargs):
        """`transformers.Trainer.train`. Afterwards the run folder holds the model and the report.

        With save_strategy="no" the model is not saved.
        """
        output = super().train(*args, **kwargs)
        if not self.recorded and self.stopping.received is None and kwargs.get("trial") is None:
            folder = Path(str(self.args.output_dir))
            if self.args.save_strategy != "no":
                self.save_model(str(model_folder(folder, self.model)))
            if self.is_world_process_zero():
                write_json(folder / "summary.json", self._summary())
                write_report(folder)
        return output

    def _summary(self) -> dict[str, Any]:
        args, options = self.args, self.given.options
        losses = " + ".join(_losses(args) or [args.method])
        how = f"{losses}, {self.origin.trained}, learning rate {args.learning_rate:g}"
        return {
            "title": f"{losses} of {options['model']}",
            "model": options["model"],
            "dataset": str(options["train"] or f"{len(self.train_dataset):,} rows given in memory"),
            "method": losses,
            "facts": {"method": how, **facts(self)},
        }
