"""One subclass of `transformers.Trainer` for every task.

A task gives three things: `count(batch)`, the number of loss terms in a batch; `step(trainer, model, batch,
terms)`, which runs forward and backward and returns the detached loss; `evaluate(model)`, a dict of metrics.
Everything else - scene batches, learning rate per module, atomic checkpoints, exact resume, the best model,
logs - is here, and is the same for all.
"""

import contextlib
import json
import math
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object
from peft.helpers import disable_input_dtype_casting
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, sort_checkpoints

from config import (
    DOOMED,
    PARTIAL,
    PROJECTOR_STAGE,
    InputError,
    held_folder,
    put_in_place,
    resolve_checkpoint,
    whole_folder,
)
from data import SceneSampler, digest_of, fitting_workers, refuse_resume_on_held_out, rows_digest
from report import write_atomic, write_json
from scenes import load_json, load_splits


class _Finished(Exception):
    """The checkpoint that is resumed is of the last step."""


class EarlyStopping(EarlyStoppingCallback):
    """Goes on counting after a resume. (transformers restores a callback only together with the patience it had.)"""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        kept = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.early_stopping_patience_counter = kept.get("early_stopping_patience_counter", 0)


class AsAskedNow(TrainerCallback):
    """A resumed Trainer takes over what its checkpoint says; what this run asks for goes before."""

    def __init__(self, trainer: "SceneTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, train_dataloader=None, **_):
        state.compute_steps(args, state.max_steps)  # --save_steps and its like may have changed
        resumed, over = self.trainer.resumed, state.global_step >= state.max_steps > 0
        if not resumed or over:
            return
        say = print if state.is_world_process_zero else lambda _: None
        before, best = load_json(Path(resumed) / "config.json").get("best_by"), self.trainer.best_checkpoint(resumed)
        why = None
        if before and before != self.trainer.settings["best_by"] and state.best_metric is not None:
            why = "resumed with another metric or other validation data"
        elif args.load_best_model_at_end and state.best_global_step and not best:
            why = f"checkpoint-{state.best_global_step}, the best step's, is not there any more"
        elif args.load_best_model_at_end and best:  # the Trainer looks where it was when it was written
            state.best_model_checkpoint = str(best)
        if why:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            state.stateful_callbacks.pop(EarlyStopping.__name__, None)
            say(f"{why}: the best step is looked for from here on")
        was, steps = load_json(Path(resumed) / "trainer_state.json")["epoch"], len(train_dataloader)
        now = state.global_step / math.ceil(steps / args.gradient_accumulation_steps)
        if abs(now - was) > 2 / steps:
            name = "max_steps" if args.max_steps > 0 else "num_train_epochs"
            end = f"--{name} {getattr(args, name):.10g}"
            say(
                f"step {state.global_step} was epoch {was:.2f} and is {now:.2f} with these batches: it goes on to {end}"
            )


class CheckpointAtSIGTERM(TrainerCallback):
    """SIGTERM (a job's time is over, its machine is taken away) ends training with a checkpoint of the step under way. Of one
    process alone: several might stop at different steps, and wait for each other for ever."""

    def __init__(self):
        self.asked, self.at_once = False, None

    @contextlib.contextmanager
    def scoring(self, save: Callable[[], None]):
        """While scores are made, perhaps for minutes, `save` is called at SIGTERM itself, or now where it came in the step: the
        job may be killed before they are there."""
        self.at_once = save
        try:
            if self.asked:
                save()
            yield
        finally:
            self.at_once = None

    @contextlib.contextmanager
    def waits(self, processes: int):
        before, thread = signal.getsignal(signal.SIGTERM), threading.current_thread()
        if processes > 1 or thread is not threading.main_thread() or before is signal.SIG_IGN:
            yield  # other threads can set no handler; who has it ignored wants it to be passed over
            return
        signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
        if self.at_once:
            self.at_once()

    @staticmethod
    def _ends_an_epoch(state) -> bool:
        return float(state.epoch).is_integer() or state.global_step >= state.max_steps

    def on_step_end(self, args, state, control, **_):
        if self.asked:  # what is scored at this step or at an epoch's end comes first: a resume would never score it
            control.should_training_stop = True
            control.should_save |= not self._ends_an_epoch(state)

    def on_epoch_end(self, args, state, control, **_):
        if self.asked:  # the Trainer says so in the middle of one, too
            control.should_training_stop = True
            control.should_save = self._ends_an_epoch(state)
            control.should_evaluate &= control.should_save


def _outliving_sigterm(begin, number: int) -> None:
    """A reading process begins. A job's end tells all of its processes: this one's batches are needed to end the step. The
    second one ends it, as torch does with one that hangs."""
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    begin(number)


class NoStepAfterTheLast(TrainerCallback):
    """The Trainer asks whether training is over after a step only, and would go one too far from a checkpoint of the end."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps > 0:
            raise _Finished


def check_best_metric(args, promised: Collection[str], evaluate: Callable[[], dict] | None = None) -> None:
    """Raises InputError unless the score that chooses the best step is `promised`, whatever the data, or one of those that
    `evaluate` finds. To be called before training: the first evaluation may be hours away."""
    best = args.metric_for_best_model.removeprefix("eval_") if args.load_best_model_at_end else None
    if best and best not in promised and best not in (found := evaluate() if evaluate else promised):
        raise InputError(f"--metric_for_best_model {best}: expected one of {', '.join(found)}")


@contextlib.contextmanager
def _read_whole(checkpoint):
    """What torch and pickle say of files that are cut short, or otherwise no checkpoint's, becomes an InputError."""
    try:
        yield
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in reason:
            raise
        raise InputError(f"{checkpoint}: a file in it cannot be read ({reason}); give an earlier checkpoint") from None


class SceneTrainer(Trainer):
    """Trains `model` on scenes; see the module's docstring for what `task` provides.

    `model` provides `save_pretrained(folder)`, `load_trained(folder)`, `trained_names()` and
    `parameter_groups()`. `settings` (JSON-able) is written to `config.json` of the run and of every checkpoint. `watched` are
    the scenes that the task evaluates on: a resume compares its scores with those of the same scenes and metric alone.
    """

    def __init__(
        self, *, model, task, args, train_dataset, collator, settings: dict, rates: dict, watched=(),
        early_stopping: int = 0,
    ):  # fmt: skip
        best_by = digest_of(json.dumps([args.metric_for_best_model, rows_digest(watched)]))
        # transformers looks for its version beside a tokenizer, and warns of a mistake in some where it is not.
        known = {"best_by": best_by, "transformers_version": transformers.__version__}
        self.task, self.settings, self.rates, self.resumed = task, settings | known, rates, None
        callbacks = [AsAskedNow(self), MetricsFile(), EpochOfSampler(self)]
        if early_stopping:
            callbacks.append(EarlyStopping(early_stopping))
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=collator, callbacks=callbacks,
            eval_dataset=train_dataset,  # the Trainer asks for one; `evaluate` below leaves evaluation to the task
        )  # fmt: skip
        self.sigterm = CheckpointAtSIGTERM()
        self.add_callback(self.sigterm)
        self.add_callback(NoStepAfterTheLast())  # after the progress bar's: it raises, and each that has begun is ended
        self.saved_step = self.trained = None
        self.moved = False  # whether a step had a rate above 0: the first of a warm-up has none
        first = range(min(len(train_dataset), self.args.train_batch_size))
        self.args.dataloader_num_workers = fitting_workers(
            self.args.dataloader_num_workers,
            lambda: collator([train_dataset[0, i] for i in first]),
            self.args.dataloader_prefetch_factor or 2,
        )
        if not self.args.dataloader_num_workers:  # torch takes these for reading processes alone
            self.args.dataloader_prefetch_factor, self.args.dataloader_persistent_workers = None, False
        self.args.dataloader_pin_memory &= self.args.device.type == "cuda"  # torch warns of pages that it cannot lock
        world, per_step = self.args.world_size, self.args.train_batch_size * self.args.world_size
        if world > 1 and len(train_dataset) < per_step:
            remedy = "start fewer processes" if len(train_dataset) < world else "lower --per_device_train_batch_size"
            raise InputError(
                f"{len(train_dataset)} training scenes do not fill one batch of {per_step} on {world} processes; {remedy}"
            )
        # Losses take scenes and texts of all processes by their numbers: a picture that one machine could not read shifts them.
        rows = gather_object([rows_digest(train_dataset.scenes)]) if world > 1 else []
        if other := [n for n, digest in enumerate(rows) if digest != rows[0]]:
            raise InputError(
                f"process {other[0]} has other training rows than process 0: the data, or what can be read of it, differs between"
                " the machines; copy it again"
            )

    # -- data and optimizer

    def _get_train_sampler(self, train_dataset=None):
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # Not the argument: --auto_find_batch_size lowers this one.
        batch = self._train_batch_size * self.args.world_size
        self.sampler = SceneSampler(len(self.train_dataset), batch, seed)
        return self.sampler

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if self.args.world_size == 1:
            inner = getattr(loader, "base_dataloader", loader)  # accelerate's own keeps what it wraps there
            inner.worker_init_fn = partial(_outliving_sigterm, inner.worker_init_fn)
        return loader

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model
            named = dict(model.named_parameters())
            # As OpenCLIP has it: matrices decay; biases, gains of norms and the temperature do not. Where nothing does, the
            # groups are the Trainer's, which checkpoints of earlier versions have.
            if self.args.weight_decay:
                decayed = {name for name, parameter in named.items() if parameter.ndim > 1}
            else:
                decayed = set(self.get_decay_parameter_names(model))
            groups = []
            for module, names in model.parameter_groups().items():
                rate = self.rates.get(module)
                rate = self.args.learning_rate if rate is None else rate
                for decay in (True, False):
                    chosen = [named[name] for name in names if (name in decayed) == decay]
                    if chosen:
                        kept = self.args.weight_decay if decay else 0.0
                        # initial_lr, too: of a schedule that follows the loss torch keeps none, and a resume asks for it.
                        groups.append({"params": chosen, "lr": rate, "initial_lr": rate, "weight_decay": kept})
            if not groups:
                raise InputError("nothing to train: every tower is frozen and there is no head")
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        # Rates start at zero and rise while it warms up: a run of one step would train nothing.
        if self.args.get_warmup_steps(num_training_steps) >= num_training_steps:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    # -- steps

    def _get_num_items_in_batch(self, batch_samples, device):
        """Loss terms of the whole optimizer step, over its micro-batches and all processes."""
        terms = torch.tensor(float(sum(self.task.count(batch) for batch in batch_samples)), device=device)
        if self.args.world_size > 1:
            terms = self.accelerator.gather(terms[None]).sum()
        return terms.clamp(min=1)

    def train(self, *args, **kwargs):
        # Under autocast a product takes its inputs to 16 bits. peft makes what LoRA reads float32 first: one more copy of
        # every layer's input, in time and in memory, for the same numbers.
        self.model.train()
        self.resumed = kwargs.get("resume_from_checkpoint")
        with (
            disable_input_dtype_casting(self.model, active=self.args.bf16 or self.args.fp16),
            self.sigterm.waits(self.args.world_size),
        ):
            try:
                made = super().train(*args, **kwargs)
            except _Finished:
                print(f"nothing is left to train: step {self.state.global_step} is the last of these settings")
                if self.args.load_best_model_at_end and self.state.best_global_step:
                    self._find_best(self.resumed)
                    self._load_best_model()
                self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
                made = TrainOutput(self.state.global_step, 0.0, {})
            except KeyboardInterrupt:
                self._say_what_is_kept()
                raise
            self._end_at_sigterm()
            return made

    def _finalize_training(self, *args, **kwargs):
        if self.sigterm.asked:  # before checkpoints are taken away that are of no use after training
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self._end_at_sigterm()
        return super()._finalize_training(*args, **kwargs)

    def _end_at_sigterm(self) -> None:
        if self.sigterm.asked:
            self._say_what_is_kept()
            raise SystemExit(128 + signal.SIGTERM)

    def _say_what_is_kept(self) -> None:
        folder = Path(self.args.output_dir)
        stage = folder.name in (PROJECTOR_STAGE, "blind") and (folder.parent / "config.json").is_file()  # of a run
        run = folder.parent if stage else folder
        try:
            said = f"{resolve_checkpoint(run)} is kept"
            if self.args.save_only_model:
                said += ", without the optimizer that a resume needs (--save_only_model)"
            else:
                said += f": --resume_from_checkpoint {run} goes on"
        except InputError:
            said = "no checkpoint is saved yet"
        if self.args.process_index == 0:
            print(f"\n{said}", file=sys.stderr)

    def best_checkpoint(self, resumed) -> str | Path | None:
        """Where the best checkpoint lies now: the run may have been moved, or end in another folder."""
        name = f"checkpoint-{self.state.best_global_step}"
        # What was written down may be another run's by now: what lies beside the resumed one goes before.
        known = [
            resumed and Path(resumed).parent / name,
            self.state.best_model_checkpoint,
            Path(self.args.output_dir) / name,
        ]
        return next((path for path in known if path and Path(path).is_dir()), None)

    def _find_best(self, resumed) -> None:
        """Raises InputError where the best checkpoint is gone."""
        found = self.best_checkpoint(resumed)
        if found is None:
            lost = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            raise InputError(
                f"{lost}: the best step's weights are not there any more; give the checkpoint to use itself"
            )
        self.state.best_model_checkpoint = str(found)

    @property
    def kept_step(self) -> int | None:
        """The step whose weights are kept after training."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return best or self.state.global_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.moved = self.moved or any(group["lr"] for group in self.optimizer.param_groups)
        return self.task.step(self, model, self._prepare_inputs(inputs), num_items_in_batch).detach()

    def _clip_grad_norm(self, model):
        # Listing a model's parameters visits all of its modules: 14 ms of CPU for Qwen2-VL-2B with LoRA, whose step takes some
        # 300 ms on an H100.
        if self.trained is None:
            self.trained = [p for p in model.parameters() if p.requires_grad]
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def floating_point_ops(self, inputs):
        return 0  # the Trainer's estimate is for one text model, not for two towers

    def log(self, logs, start_time=None):
        self._refuse_divergence(logs.get("loss", logs.get("train_loss", 0.0)))
        super().log(logs, start_time)

    def _refuse_divergence(self, loss: float) -> None:
        if not math.isfinite(loss):
            remedy = "--bf16 true instead of --fp16, or " if self.args.fp16 else ""
            raise InputError(
                f"the loss is {loss} at step {self.state.global_step}: training diverged, and nothing of these weights is kept;"
                f" try {remedy}a lower --learning_rate (now {self.args.learning_rate:g})"
            )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        start = time.perf_counter()
        training = self.model.training
        self.model.eval()
        with self.sigterm.scoring(self._save_unscored), self.accelerator.autocast():
            found = self.task.evaluate(self.model)
        if self.args.world_size > 1:  # one's word counts: what is saved and when to stop must not differ by a last bit
            (found,) = broadcast_object_list([found])
        self.model.train(training)  # here, not in every step: it visits thousands of modules
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - start, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics, trial):
        if not self.moved:  # these are the weights it began with
            return False
        better = super()._determine_best_metric(metrics, trial)
        if better and self.args.load_best_model_at_end:  # --eval_steps may be below --save_steps
            self.control.should_save = True
        return better

    # -- checkpoints: written beside, then renamed, so that a folder named checkpoint-N is always whole

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        output_dir = Path(output_dir or self.args.output_dir)
        self.model.save_pretrained(output_dir)
        write_json(output_dir / "config.json", self.settings)

    def _save_checkpoint(self, model, trial=None):
        run = Path(self.args.output_dir)
        final = run / f"checkpoint-{self.state.global_step}"
        if self.saved_step == self.state.global_step:  # step and epoch end together: it is already there, whole
            return
        self._refuse_divergence(self.accelerator.gather(self._tr_loss).mean().item())  # of the steps since the last log
        self.saved_step = self.state.global_step
        partial = final.with_name(final.name + PARTIAL)
        if self.args.should_save and partial.exists():
            shutil.rmtree(partial)
        self.accelerator.wait_for_everyone()
        self.save_model(str(partial), _internal_call=True)
        best = run / f"checkpoint-{self.state.best_global_step}"
        # Where the best is not asked for, the Trainer would keep it at the end in place of the last.
        if not self.args.load_best_model_at_end:
            self.state.best_model_checkpoint = None
        elif self.state.best_global_step and (best == final or best.exists()):
            self.state.best_model_checkpoint = str(best)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
        if self.args.should_save:
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(partial / "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            put_in_place(partial, final)  # one may be there from before this run went back to an earlier checkpoint
            self._drop_old(run)
        self.accelerator.wait_for_everyone()

    def _save_unscored(self) -> None:
        """A checkpoint of this step, which is written once more when its scores are there."""
        self._save_checkpoint(self.model)
        self.saved_step = None

    def _drop_old(self, run: Path) -> None:
        """Delete checkpoints above --save_total_limit, and those of a run that went back to an earlier one: a resume would
        take them for the newest."""
        limit, step = self.args.save_total_limit, self.state.global_step
        keep = {self.state.best_model_checkpoint, str(run / f"checkpoint-{step}")}
        found = [path for path in sort_checkpoints(str(run), use_mtime=False) if Path(path).name[11:].isdigit()]
        left = [path for path in found if int(Path(path).name[11:]) > step]
        found = [path for path in found if path not in left]
        old = [path for path in found if path not in keep and str(Path(path)) not in keep]
        for path in left + old[: max(0, len(found) - limit) if limit and limit > 0 else 0]:
            doomed = f"{path}{DOOMED}"
            os.replace(path, doomed)  # a kill while deleting leaves no half checkpoint under a whole one's name
            shutil.rmtree(doomed, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        names = {file.name for file in Path(resume_from_checkpoint).iterdir()}
        if not {"scheduler.pt", "optimizer.pt"} <= names:  # without them the Trainer would begin with new ones
            raise InputError(
                f"{resume_from_checkpoint}: cannot resume, it holds no optimizer and scheduler (was it saved with"
                " --save_only_model?); give another checkpoint"
            )
        self.model.load_trained(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """A checkpoint brings the rates and the decay that it was made with; what this run asks for goes before."""
        groups = self.optimizer.param_groups if checkpoint else []
        asked = [(group["initial_lr"], group["weight_decay"]) for group in groups]
        with _read_whole(checkpoint):
            try:
                super()._load_optimizer_and_scheduler(checkpoint)
            except ValueError as error:
                raise InputError(
                    f"{checkpoint}: cannot resume, its optimizer was made for other groups of parameters ({error}); resume with"
                    " the --weight_decay that the run began with, or begin a new run"
                ) from None
            except KeyError as error:
                raise InputError(
                    f"{checkpoint}: cannot resume, its schedule of rates was of another kind ({error} is missing); resume with"
                    " the --lr_scheduler_type that the run began with"
                ) from None
        for group, (rate, decay) in zip(self.optimizer.param_groups, asked):
            group["weight_decay"] = decay
            if group.get("initial_lr"):  # checkpoints of before kept none with a schedule that follows the loss
                group["lr"] *= rate / group["initial_lr"]
                group["initial_lr"] = rate
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if asked and hasattr(schedule, "base_lrs"):
            schedule.base_lrs = [rate for rate, _ in asked]
            schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_scaler(self, checkpoint):
        if self.accelerator.scaler is not None:  # else of a run with --fp16 that goes on without
            with _read_whole(checkpoint):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with _read_whole(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self):
        self.model.load_trained(self.state.best_model_checkpoint)

    def save_best(self, name: str = "best_model", write=None) -> Path:
        """Write the model as it stands (after training: the best one) to the run's folder `name`, whole or not at all.
        `write(folder)` writes another form of it than a checkpoint's."""
        final = Path(self.args.output_dir) / name
        if self.args.should_save:
            with whole_folder(final) as new:
                (write or self._save)(new)
        self.accelerator.wait_for_everyone()
        return final


class PackedTask:
    """Next-token loss of texts about images (`data.QuestionCollator`), for `SceneTrainer`; `evaluate(model)` -> metrics."""

    def __init__(self, evaluate):
        self.evaluate = evaluate

    def count(self, batch) -> int:
        return batch["targets"]

    def step(self, trainer, model, batch, terms) -> torch.Tensor:
        """Forward and backward of one micro-batch, a piece at a time: the sum over its targets, divided by the targets of
        the whole optimizer step (`terms`), so that neither pieces nor micro-batches nor processes weigh."""
        accelerator, pieces = trainer.accelerator, batch["pieces"]
        total = torch.zeros((), device=terms.device)
        for number, piece in enumerate(pieces):
            last = number + 1 == len(pieces)
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                loss = model(**piece) / terms
                accelerator.backward(loss * accelerator.num_processes)  # DDP averages gradients: this makes it the sum
            total += loss.detach()
        return total * accelerator.num_processes  # the Trainer logs the mean over processes of what is returned


def dtype_of(args) -> torch.dtype:
    """Of the parts of a model that are not trained."""
    return torch.bfloat16 if args.bf16 else torch.float32


@contextlib.contextmanager
def own_folder(args):
    """Hold the folder of a run: another training in it would take this one's checkpoints for its own, and remove them. Raises
    InputError."""
    folder = Path(args.output_dir)
    if args.process_index:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with held_folder(
        folder, f"{folder}: another training is writing to it; wait for its end, or give another --output_dir"
    ):
        if args.resume_from_checkpoint:  # which may have gone meanwhile
            resolve_checkpoint(args.resume_from_checkpoint)
        yield


class Run:
    """What a run of any task has: its settings, its folder, its `splits`, what it is recorded as, and whether this process is
    the one that speaks and writes."""

    name: str
    splits: dict[str, list]

    def __init__(self, config, args, changed: dict):
        self.config, self.args, self.changed = config, args, changed
        self.folder, self.main_process = Path(args.output_dir), args.process_index == 0
        writes = self.main_process and not getattr(config, "eval_only", False)
        self.rejected = self.folder / "rejected.jsonl" if writes else None
        self.started = time.perf_counter()

    def load_splits(self, **how) -> dict[str, list]:
        """`scenes.load_splits` of the settings. Refuses to go on with a run that has seen what is held out now."""
        splits = load_splits(self.config, self.args.seed, self.rejected, **how)
        self.trained_on = rows_digest(splits["train"])
        refuse_resume_on_held_out(self.config, self.args, splits, self.trained_on, self.say)
        return splits

    @property
    def tested(self) -> str:
        """The split that the last scores are of."""
        return "test" if self.splits["test"] else "val"

    @property
    def images(self) -> dict[str, int]:
        """How many each split has."""
        return {name: len(scenes) for name, scenes in self.splits.items()}

    @property
    def record(self) -> dict:
        """What config.json keeps of the run, for those that resume it, score it or go on from it."""
        return {"task": self.name, "settings": self.changed, "trained_on": self.trained_on}

    def say(self, text: str) -> None:
        if self.main_process:
            print(text)

    def seconds(self) -> float:
        return round(time.perf_counter() - self.started, 1)


def parameters_text(model) -> str:
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(n for n, _ in numbers), sum(n for n, learns in numbers if learns)
    return f"{total / 1e6:.1f} M parameters, {trained / 1e6:.2f} M trained"


def prepared_tokens(model, store, paths: list[str], cache_dir: str, args):
    """The model's `TokenStore` below `cache_dir`, with what its frozen vision tower makes of these images: every process
    encodes its share of those that are not in it yet."""
    tokens, images = model.token_store(cache_dir, store), list(dict.fromkeys(paths))
    shares = [(args.process_index, args.world_size)]
    if args.world_size > (local := int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))):
        shares.append((args.local_process_index, local))  # what another machine made may lie in a cache of its own
    for first, step in shares:
        model.prepare_tokens(tokens, store, images[first::step], args.eval_batch_size)
        if args.world_size > 1:
            torch.distributed.barrier()
    return tokens


@torch.no_grad()
def held_out_loss(model, dataset, collator, batch_size: int) -> float:
    """Nats per predicted token of all texts of a `data.QuestionDataset`; the model is in eval mode meanwhile."""
    training, total, terms = model.training, 0.0, 0
    model.eval()
    rows = [(0, i) for i in range(len(dataset))]
    for batch in torch.utils.data.DataLoader(dataset, batch_size, sampler=rows, collate_fn=collator):
        for piece in batch["pieces"]:
            total += float(model(**{name: value.to(model.device) for name, value in piece.items()}))
        terms += batch["targets"]
    model.train(training)
    return total / terms


class EpochOfSampler(TrainerCallback):
    """Tells the sampler its epoch. accelerate does so itself, but not through the two wrappers a run on several
    processes has after it resumes inside an epoch: it would draw the first epoch's order, silently."""

    def __init__(self, trainer: SceneTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **_):
        self.trainer.sampler.set_epoch(int(state.epoch))


class MetricsFile(TrainerCallback):
    """Every log row as a line of `metrics.jsonl`; a resumed run goes on after the step it resumes from."""

    def on_train_begin(self, args, state, control, **_):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in [*folder.glob(f"checkpoint-*{PARTIAL}"), *folder.glob(f"*{DOOMED}")]:
            shutil.rmtree(leftover, ignore_errors=True)
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_history(folder) if row["step"] <= state.global_step] if state.global_step else []
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and logs and hasattr(self, "path"):
            # Not the infinite gradient of a step that fp16's scaling left out: that is no JSON.
            numbers = {k: v for k, v in logs.items() if isinstance(v, (int, float)) and math.isfinite(v)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step} | numbers) + "\n")


def read_history(run: str | Path) -> list[dict]:
    """Rows of a run's metrics.jsonl; what is none, as a last line cut short by a kill, is left out."""
    rows = []
    path = Path(run) / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def gather_rows(accelerator, tensor: torch.Tensor, fill: int = 0) -> list[torch.Tensor]:
    """Each process's (n_r, ...) tensor, in rank order; n_r and the second axis may differ. No gradient."""
    if accelerator.num_processes == 1:
        return [tensor]
    sizes = accelerator.gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    for axis in range(min(2, tensor.dim())):
        tensor = accelerator.pad_across_processes(tensor.detach(), dim=axis, pad_index=fill)
    parts = accelerator.gather(tensor).split(len(tensor))
    return [part[:size] for part, size in zip(parts, sizes)]
