"""transformers' `Trainer` with the same weight for every predicted token, and its log.

Import this only where it is used: transformers' Trainer takes seconds to import.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from fastllm.command import StopRequest, cause_of, is_fault, is_out_of_memory, log
from fastllm.device import autocast
from fastllm.finetuning.checkpoint import (
    checkpoint_folder,
    complete_or_absent,
    reading,
    remove_checkpoints,
)
from fastllm.finetuning.config import FinetuneConfig
from fastllm.integrations.trainer_checkpoints import STATE, step_of, whole_checkpoints
from fastllm.optim import AdamW
from fastllm.training.checkpoint import CheckpointError
from fastllm.training.evaluation import Evaluation
from fastllm.training.loop import TrainingError, derive_seed
from fastllm.training.metrics import MetricsLog, read_metrics, resident_mb, tokens_per_second

if TYPE_CHECKING:
    from datasets import Dataset

Batch = dict[str, torch.Tensor]


class RunMonitor(StopRequest, TrainerCallback):
    """Writes the progress bar and metrics.jsonl; after a signal, makes the Trainer save and stop.

    Args:
        run_dir: the folder of metrics.jsonl; None to write none.
        quiet: no progress bar.

    Attributes:
        training_s: seconds spent in the steps of this command.
        tokens: tokens of these steps.
        last_step: PyTorch's random state after the last step of this command, and the tokens seen
            by then; None before the first, and during an update, which changes weights one by one.
    """

    def __init__(self, run_dir: Path | None, quiet: bool) -> None:
        self.run_dir = run_dir
        self.quiet = quiet
        self.tokens, self.training_s = 0, 0.0
        self.last_step: tuple[torch.Tensor, int] | None = None
        self._log: MetricsLog | None = None
        self._opened = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        # A checkpoint brings the intervals of the command that saved it.
        state.compute_steps(args, state.max_steps)
        self._before = 0.0
        if self.run_dir is not None:
            path = self.run_dir / "metrics.jsonl"
            self._log = MetricsLog(path, state.global_step + 1 if state.global_step else 0)
            self._opened.callback(self._log.close)
            self._before = max((line["elapsed_s"] for line in read_metrics(path)), default=0.0)
        self._start = time.monotonic()
        self._first_tokens = self._logged_tokens = state.num_input_tokens_seen
        self._logged_s = 0.0
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            disable=self.quiet,
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )
        self._opened.callback(self._bar.close)

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._step_start = time.monotonic()

    def on_substep_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.poll()  # says that a signal was heard

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.last_step = None

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.last_step = torch.get_rng_state(), state.num_input_tokens_seen
        self.training_s += time.monotonic() - self._step_start
        self.tokens = state.num_input_tokens_seen - self._first_tokens
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self.poll():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        self._bar.update()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.poll():  # on_step_end had it saved
            control.should_save = control.should_evaluate = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.last_step:  # evaluating draws a random number
            self.last_step = torch.get_rng_state(), state.num_input_tokens_seen

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        values = others["logs"]
        if self._log is None or not ("loss" in values or "eval_loss" in values):
            return
        speed = None
        memory = resident_mb()
        if "loss" in values and self.training_s > self._logged_s:
            tokens = state.num_input_tokens_seen - self._logged_tokens
            speed = round(tokens_per_second(tokens, self.training_s - self._logged_s), 1)
            self._logged_tokens, self._logged_s = state.num_input_tokens_seen, self.training_s
            loss = "none" if values["loss"] is None else f"{values['loss']:.3f}"
            self._bar.set_postfix_str(
                f"loss {loss}, {speed:,.0f} tokens/s, {memory:,.0f} MiB",
                refresh=False,
            )
        self._log.write(
            step=state.global_step,
            epoch=math.ceil(state.epoch or 0),
            loss=values.get("loss"),
            val_loss=values.get("eval_loss"),
            lr=values.get("learning_rate"),
            grad_norm=values.get("grad_norm"),
            tokens=int(state.num_input_tokens_seen),
            tokens_per_second=speed,
            elapsed_s=round(self._before + time.monotonic() - self._start, 3),
            rss_mb=round(memory, 1),
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the progress bar and the log, if they have begun."""
        self._opened.close()


class EarlyStopping(TrainerCallback):
    """Stops after `patience` evaluations without a new best loss.

    They are counted in the log that checkpoints keep, so a resumed run goes on counting.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Finds the best model among those on the disk: a run without patience keeps no other."""
        checkpoints = Path(args.output_dir)
        step = state.best_global_step
        if step is None or not checkpoint_folder(checkpoints, step).exists():
            losses = [loss for step, loss in evaluations(state) if step == state.global_step > 0]
            state.best_metric = losses[-1] if losses else None
            state.best_global_step = step = state.global_step if losses else None
        state.best_model_checkpoint = step and str(checkpoint_folder(checkpoints, step))

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.best_metric is None or others["metrics"]["eval_loss"] < state.best_metric:
            return
        worse = [step for step, _ in evaluations(state) if step > (state.best_global_step or 0)]
        if len(worse) >= self.patience:
            control.should_training_stop = True


def evaluations(state: Any) -> list[tuple[int, float]]:
    """Step and loss of every evaluation of a run."""
    return [(line["step"], line["eval_loss"]) for line in state.log_history if "eval_loss" in line]


class FinetuneTrainer(Trainer):
    """`Trainer` for language models; the loss is the mean over the tokens that a step predicts.

    Some models ignore how many tokens a whole step predicts (BertForMaskedLM does), which makes
    gradients `gradient_accumulation_steps` times too large. So each model returns the mean over its
    batch, and the batches are weighted here.

    Args:
        tokenizer: needs a padding token.
        monitor: receives every event, and says whether to stop.
        mlm_probability: fraction of the tokens to mask and predict; None to predict the next token.
        others: as for `Trainer`; the rows of the datasets have `input_ids`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        monitor: RunMonitor,
        mlm_probability: float | None,
        **others: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self.monitor = monitor
        self.masking = None
        self._steps_since_log = self._empty_steps_since_log = 0
        if mlm_probability is not None:
            self.masking = DataCollatorForLanguageModeling(
                tokenizer, mlm_probability=mlm_probability
            )
        super().__init__(
            model,
            arguments,
            data_collator=self._pad,
            processing_class=tokenizer,
            callbacks=[monitor],
            **others,
        )

    def _pad(self, rows: list[dict[str, Any]]) -> Batch:
        return dict(self.tokenizer.pad(rows, padding_side="right", return_tensors="pt"))

    def _with_labels(self, batch: Batch, purpose: str, first: int) -> Batch:
        """Adds the labels. The masked tokens of a sequence depend on the seed, the purpose and the
        sequence's number alone; `first` is the number of the batch's first sequence."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if self.masking:
            ids, labels = ids.clone(), torch.full_like(ids, -100)
            with torch.random.fork_rng(devices=[]):
                for row, count in enumerate(mask.sum(1).tolist()):
                    torch.manual_seed(derive_seed(self.args.seed, purpose, first + row))
                    masked = self.masking.torch_mask_tokens(ids[row : row + 1, :count].clone())
                    ids[row, :count], labels[row, :count] = (tensor[0] for tensor in masked)
        else:
            labels = ids.masked_fill(mask == 0, -100)
        batch = {"input_ids": ids, "labels": labels}
        # Without padding, a mask only costs time.
        return batch if mask.all() else {**batch, "attention_mask": mask}

    def _predicted(self, batch: Batch) -> int:
        labels = batch["labels"] if self.masking else batch["labels"][:, 1:]
        return int((labels != -100).sum())

    def get_batch_samples(self, *arguments: Any, **others: Any) -> tuple[list[Batch], int]:
        batches, _ = super().get_batch_samples(*arguments, **others)
        self._steps_since_log += 1
        size = self.args.per_device_train_batch_size
        first = self.state.global_step * self.args.gradient_accumulation_steps * size
        batches = [
            self._with_labels(batch, "training", first + i * size)
            for i, batch in enumerate(batches)
        ]
        predicted = sum(map(self._predicted, batches))
        self._empty_steps_since_log += not predicted
        return batches, predicted

    def log(self, logs: dict[str, Any], *arguments: Any, **others: Any) -> None:
        """Leaves steps without a token to predict out of the mean loss; None if all were such."""
        if "loss" in logs:
            steps, empty = self._steps_since_log, self._empty_steps_since_log
            if empty:
                logs["loss"] = logs["loss"] * steps / (steps - empty) if steps > empty else None
            self._steps_since_log = self._empty_steps_since_log = 0
        super().log(logs, *arguments, **others)

    def _run_epoch(self, *arguments: Any, **others: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **others)
        else:  # resumed at its end
            self.control.should_training_stop = True

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves the checkpoint or leaves none; then removes all but the newest and the best."""
        checkpoints, step = Path(str(self.args.output_dir)), self.state.global_step
        with complete_or_absent(checkpoint_folder(checkpoints, step)) as partial:
            self.args.output_dir = str(partial.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(checkpoints)
        keep = {step}
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = self.state.best_global_step
            keep.add(best)
            self.state.best_model_checkpoint = str(checkpoint_folder(checkpoints, best))
        remove_checkpoints(checkpoints, keep)

    @contextmanager
    def saving_on_error(self) -> Iterator[None]:
        """Saves the last whole step before an exception ends the run.

        Raises:
            TrainingError: in place of any other error; the message says how to go on.
            CheckpointError: a checkpoint cannot be written or read.
        """
        try:
            yield
        except (TrainingError, CheckpointError):
            raise  # there is nothing good to save, or nowhere to
        except BaseException as error:
            cause = f"{cause_of(error).splitlines()[0]}, after step {self.state.global_step:,}"
            try:
                self._save_last_step()
            except CheckpointError as second:
                raise CheckpointError(f"{cause}; and {second}") from error
            if not is_fault(error):
                raise
            raise TrainingError(f"{cause}. {self._how_to_go_on(error)}") from error
        finally:
            self.monitor.close()

    def _save_last_step(self) -> None:
        """Saves what the last step of this command left, unless that is on the disk already."""
        whole = whole_checkpoints(Path(str(self.args.output_dir)))
        if self.monitor.last_step and self.state.global_step not in map(step_of, whole):
            random_state, self.state.num_input_tokens_seen = self.monitor.last_step
            torch.set_rng_state(random_state)
            self._save_checkpoint(self.model, trial=None)

    def _how_to_go_on(self, error: BaseException) -> str:
        remedy = "Remove the cause"
        if is_out_of_memory(error):
            remedy = "Free some memory, or add --gradient_checkpointing"
        whole = whole_checkpoints(Path(str(self.args.output_dir)))
        if not whole:
            return f"{remedy}, then start the run again"
        return (
            f"{remedy}, then continue from step {step_of(whole[-1]):,} with: fastllm finetune "
            f"--out_dir {self.monitor.run_dir} --resume"
        )

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:  # type: ignore[override]
        with reading(checkpoint):
            TrainerState.load_from_json(str(Path(checkpoint, STATE)))
            super()._load_from_checkpoint(checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads what a checkpoint counted; the settings are those of this command."""
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        base_lrs = scheduler.base_lrs
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        before = self._get_learning_rate()
        scheduler.base_lrs = base_lrs
        scheduler._last_lr = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, own, lr in zip(
            optimizer.param_groups, settings, scheduler._last_lr, strict=True
        ):
            group.update({**own, "lr": lr})
        now = self._get_learning_rate()
        if now != before:
            log(
                f"warning: the settings of the learning rate have changed; from step "
                f"{self.state.global_step + 1:,} on it is {now:.3g} instead of {before:.3g}"
            )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        count = self._predicted(inputs)
        if not count:  # the mean over no tokens would be NaN
            return next(p for p in model.parameters() if p.requires_grad).sum() * 0
        return model(**inputs)["loss"] * (count / num_items_in_batch)

    def training_step(self, *arguments: Any, **others: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **others)
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}. Try a lower --lr "
                "or more --warmup_steps; every checkpoint was saved before this"
            )
        return loss

    @torch.no_grad()
    def evaluate(self, *arguments: Any, **others: Any) -> dict[str, float]:
        """Mean loss over the evaluation set; every predicted token has the same weight."""
        model: Any = self.model
        model.eval()
        total, count = 0.0, 0
        for i, batch in enumerate(self.get_eval_dataloader()):
            if self.monitor.poll():
                self.control.should_save = self.control.should_training_stop = True
                return {"eval_loss": math.inf}  # no new best
            batch = self._with_labels(batch, "evaluation", i * self.args.eval_batch_size)
            predicted = self._predicted(batch)
            if predicted:
                with autocast("cpu", "bf16" if self.args.bf16 else "fp32"):
                    total += float(model(**batch)["loss"]) * predicted
                count += predicted
        if not count:
            raise TrainingError("the evaluation data has no token to predict; give more of it")
        result = Evaluation(total / count, count)
        metrics = {"eval_loss": result.loss, "eval_perplexity": result.perplexity}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def make_trainer(
    config: FinetuneConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_set: "Dataset | None",
    val_set: "Dataset | None",
    run_dir: Path | None,
) -> FinetuneTrainer:
    """The trainer of a run; without `run_dir`, for evaluation only."""
    trainer = FinetuneTrainer(
        model,
        training_arguments(config, run_dir, evaluates=val_set is not None),
        tokenizer=tokenizer,
        monitor=RunMonitor(run_dir, config.quiet),
        mlm_probability=config.mlm_probability if config.task == "mlm" else None,
        train_dataset=train_set,
        eval_dataset=val_set,
        optimizers=(make_optimizer(config, model), None),
    )
    trainer.remove_callback(PrinterCallback)
    if config.patience:
        trainer.add_callback(EarlyStopping(config.patience))
    if config.tensorboard and run_dir is not None:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(run_dir / "tensorboard"))))
    return trainer


def training_arguments(
    config: FinetuneConfig, run_dir: Path | None, evaluates: bool
) -> TrainingArguments:
    """The settings as transformers' Trainer takes them."""
    strategy = "no"
    if evaluates:
        strategy = "steps" if config.eval_interval else "epoch"
    schedule = config.lr_schedule
    saving: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": config.save_interval,
    }
    if config.patience:
        saving = {
            "save_strategy": strategy,
            "save_steps": config.eval_interval or 500,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    return TrainingArguments(
        output_dir=str(run_dir / "checkpoints") if run_dir else "unused",
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.lr,
        lr_scheduler_type="constant_with_warmup" if schedule == "constant" else schedule,
        warmup_steps=config.warmup_steps,
        max_grad_norm=0 if config.accelerate else config.max_grad_norm,  # our AdamW clips itself
        seed=config.seed,
        use_cpu=True,
        bf16=config.precision == "bf16",
        activation_checkpointing=config.gradient_checkpointing,
        logging_steps=config.log_interval,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all" if config.packing else "non_padding",
        eval_strategy=strategy,
        eval_steps=config.eval_interval or None,
        eval_on_start=evaluates and not config.resume,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        **saving,
    )


def make_optimizer(config: FinetuneConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW, without weight decay for vectors: biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.accelerate:
        return AdamW(groups, lr=config.lr, max_grad_norm=config.max_grad_norm or None)
    return torch.optim.AdamW(groups, lr=config.lr)
