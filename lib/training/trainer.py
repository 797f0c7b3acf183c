"""One training loop: pairs in, a run directory out. One process, or several by accelerate."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from tqdm import tqdm

from lib.codec.codec import Codec
from lib.data.latents import LatentPairs
from lib.model.cascade import CascadeConfig
from lib.model.masks import MaskingConfig
from lib.training.batches import Pairs, TrainingOrder, evenly_spread, read_ahead
from lib.training.config import LENGTH, WITHOUT_EFFECT, LoopConfig, TrainConfig, resolved_precision
from lib.training.distributed import (
    StopSignals,
    join_processes,
    out_of_memory_advice,
    rng_state,
    seed_process,
    set_rng_state,
    sum_over_processes,
)
from lib.training.fusion_learner import FusionLearner
from lib.training.learner import Batch, Learner, Moment, evaluating
from lib.training.losses import Decode
from lib.training.nonfinite import NORM, NonFiniteError, find_in_batches
from lib.training.run import Run
from lib.training.telemetry import Callback, to_floats
from lib.util.configs import from_fields
from lib.util.errors import UserError
from lib.util.provenance import code_fingerprint
from lib.util.tensors import torch_threads

logger = logging.getLogger(__name__)

VAL_BATCH = 8


def train(
    out_dir: str | Path,
    index: str | Path,
    codec: Codec,
    cascade: CascadeConfig,
    config: TrainConfig,
    masking: MaskingConfig | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train a fusion model on the latents of `index` and return its run directory.

    With `resume`, a run in `out_dir` goes on from its last checkpoint, bit for bit on a CPU; only its length may differ
    now, the number of processes, and how data are read and metrics gathered; another config or other data is refused.
    A run that other code finished is trained again. Without `resume` a new run starts. Ctrl-C and SIGTERM save a
    checkpoint and raise `KeyboardInterrupt`. Under a launcher every process calls this, and all return.
    """
    masking = masking or MaskingConfig()
    config = dataclasses.replace(config, precision=resolved_precision(config.precision))
    wanted = {
        "cascade": cascade.to_dict(),
        "masking": dataclasses.asdict(masking),
        "train": dataclasses.asdict(config),
        "codec": {"name": codec.name, "fingerprint": codec.fingerprint},
        "data": Path(index).stem,  # names the pairs by their content
    }
    config.check_masking(masking)
    if config.loss.anti_modulation == "log" and config.loss.anti_modulation_weight:
        logger.warning("anti_modulation='log' has no bound: it is infinite where an output's envelope is a source's")
    pairs = {split: LatentPairs(index, split, codec_fingerprint=codec.fingerprint) for split in ("train", "val")}
    accelerator = open_accelerator()
    config.check_sizes({split: len(found) for split, found in pairs.items()}, accelerator.num_processes)
    if cascade.latent_dim != codec.dim:
        raise UserError(f"latent_dim={cascade.latent_dim} does not fit codec {codec.name}; use {codec.dim}")
    with accelerator.main_process_first():  # makes the run that the others open
        run = Run.start(
            out_dir,
            wanted,
            resume=resume or not accelerator.is_main_process,
            free={"train": LENGTH + WITHOUT_EFFECT},
            code=[code_fingerprint("lib.training.trainer")[:16]],
        )
    if isinstance(codec, nn.Module):  # one with weights decodes where they are
        codec.to(accelerator.device)
    try:
        fusion_trainer(run, pairs, codec.decode, callbacks).run_to_end(progress=progress)
    finally:
        if isinstance(codec, nn.Module):
            codec.to("cpu")
    accelerator.wait_for_everyone()
    return run


def fusion_trainer(
    run: Run, pairs: dict[str, Pairs], decode: Decode | None = None, callbacks: Sequence[Callback] = ()
) -> "Trainer":
    """The trainer of the fusion model that a run's config describes."""
    config = from_fields(TrainConfig, run.config["train"])

    def make_learner(accelerator: Accelerator) -> FusionLearner:
        cascade = CascadeConfig.from_dict(run.config["cascade"])
        masking = from_fields(MaskingConfig, run.config["masking"])
        return FusionLearner(config, cascade, masking, accelerator, decode)

    return Trainer(run, config, pairs, make_learner, callbacks)


def open_accelerator() -> Accelerator:
    """The process's device and its link to those it trains with; `UserError` where a launcher asks for more than plain
    data parallelism."""
    join_processes()
    accelerator = Accelerator(mixed_precision="no")  # the config says it, not the launcher
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(f"launcher: {kind.value} is not supported; use plain data parallelism")
    return accelerator


@dataclass
class TakenStep:
    """A step whose metrics are still on the device, with what it takes to repeat it."""

    facts: dict[str, Any]  # split, step and epoch, and what the host knew of it
    metrics: dict[str, Tensor]
    batches: Sequence[Batch]
    rng: dict[str, Any]
    moment: Moment


class Trainer:
    """The loop over a run's steps. Everything it needs to go on after a kill is in the run's checkpoints.

    `pairs` are the data of 'train' and 'val': anything with a length whose items are (first, second) tensors, that
    knows its `clip_length` in samples and its `sample_rate`. `make_learner` gives what is trained on them, with
    random weights of the config's seed.
    """

    def __init__(
        self,
        run: Run,
        config: LoopConfig,
        pairs: dict[str, Pairs],
        make_learner: Callable[[Accelerator], Learner],
        callbacks: Sequence[Callback] = (),
    ):
        self.run, self.config, self.pairs = run, config, pairs
        most = {"train": self.config.max_train_pairs, "val": self.config.max_val_pairs}
        self.chosen = {split: evenly_spread(len(pairs[split]), most[split]) for split in pairs}
        self.accelerator = Accelerator(mixed_precision="no")
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.order = TrainingOrder(len(self.chosen["train"]), self.config, rank, processes)
        self.callbacks = callbacks if self.accelerator.is_main_process else ()
        torch.manual_seed(self.config.seed)
        self.learner = make_learner(self.accelerator)
        self.ungathered: list[TakenStep] = []  # steps whose metrics have not been gathered
        self.finished = False  # neither stopped nor failed
        self.step = 0
        self.best_loss = math.inf
        self.stale = 0  # validations since the best one
        self.warned: set[Hashable] = set()  # keys of the learner's warnings that have been logged
        self.stop = StopSignals(run.stop_file)
        if run.has_checkpoint():
            self.load()
        elif self.accelerator.process_index:
            seed_process(self.config.seed, 0, self.accelerator.process_index)

    @property
    def out_of_patience(self) -> bool:
        return self.config.patience is not None and self.stale >= self.config.patience

    def run_to_end(self, *, progress: bool = True) -> None:
        """Train the steps that are left, with a progress bar on stderr or without one.

        After a stop signal: save, and raise `KeyboardInterrupt`. Out of memory: `UserError` that says what to lower.
        """
        total = self.order.total_steps(self.step)
        if self.step >= total or self.out_of_patience:
            return
        if self.accelerator.is_main_process:
            self.run.forget_metrics_after(self.step)
            self.run.plan(total)
        bar = tqdm(
            total=total,
            initial=self.step,
            desc="training",
            unit="step",
            mininterval=1.0,
            # unnamed, tqdm's own environment variables decide
            **({} if progress and self.accelerator.is_main_process else {"disable": True}),
        )
        try:
            with (
                self.stop,
                bar,
                torch_threads(self.config.cpu_threads),
                out_of_memory_advice(self.memory_advice),
                contextlib.closing(self.steps()) as batches_of_steps,
            ):
                for callback in self.callbacks:  # a dashboard may ask for a stop from here on
                    callback.on_start(self)
                for batches in batches_of_steps:
                    self.train_step(batches)
                    bar.update()
                    if self.after_step(bar, last=self.step == total):
                        self.finished = True
                        return
        except BaseException:
            if self.accelerator.num_processes == 1:  # another might not answer
                with contextlib.suppress(Exception):
                    self.gather()  # the steps before a failure are those that explain it
            raise
        finally:
            for callback in self.callbacks:
                callback.on_end(self)

    def after_step(self, bar: tqdm, *, last: bool) -> bool:
        """Gather the metrics, tell the callbacks, validate and save where it is time. Whether training is over."""
        save, epoch_over = last or self.step % self.config.checkpoint_every == 0, self.order.position == 0
        # a signal is looked for at once where no other process must be asked
        asked = self.stop.asked is not None and self.accelerator.num_processes == 1
        if not (save or epoch_over or asked or len(self.ungathered) == self.config.gather_every):
            return False
        rows, stop = self.gather()
        bar.set_postfix(loss=f"{rows[-1]['loss']:.3f}", refresh=False)
        if epoch_over:
            for callback in self.callbacks:
                callback.on_epoch(self, self.order.epoch)
        if save:
            self.validate_and_save()
        elif stop:
            self.save(is_best=False)
        over = last or self.out_of_patience
        if stop and not over:
            name = self.stop.asked or "SIGTERM"  # to another process
            raise KeyboardInterrupt(f"stopped by {name}; step {self.step} is saved in {self.run.path}")
        return over

    # --- data ----------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[list[Batch]]:
        """The batches of every step that is left, read while the steps before are taken."""
        yield from self.read("train", self.order.steps())

    def read(self, split: str, steps: Iterable[list[Tensor]]) -> Iterator[list[Batch]]:
        on_gpu = self.accelerator.device.type == "cuda"
        pairs, chosen, threads = self.pairs[split], self.chosen[split], self.config.num_workers
        return read_ahead(pairs, chosen, steps, threads=threads, pin_memory=on_gpu)

    def to_device(self, batch: Batch) -> Batch:
        return tuple(clips.to(self.accelerator.device, non_blocking=True) for clips in batch)

    # --- steps ---------------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step on one batch or several. What it measured waits for `gather`."""
        moment, rng = Moment(self.step, self.order.epoch), rng_state()
        batches = [self.to_device(batch) for batch in batches]
        progress = self.order.progress(self.step)
        metrics = self.learner.learn(self.step, batches, progress=progress, epoch=moment.epoch)
        self.step += 1
        self.order.advance()
        facts = {"split": "train", "step": self.step, "epoch": moment.epoch} | self.learner.facts(moment)
        self.ungathered.append(TakenStep(facts, metrics, batches, rng, moment))

    def gather(self) -> tuple[list[dict[str, Any]], bool]:
        """Log, show the callbacks and return the metrics of the steps since the last call, in one transfer from the
        device, and whether some process was asked to stop. Raises `NonFiniteError`, in every process; from the bad step
        on none was taken then."""
        taken, self.ungathered = self.ungathered, []
        asked = torch.full((), float(self.stop.asked is not None), device=self.accelerator.device)
        tensors = {(i, name): value for i, step in enumerate(taken) for name, value in step.metrics.items()}
        floats = self.to_floats(tensors | {"stop": asked})
        rows = []
        for i, step in enumerate(taken):
            row = step.facts | {name: floats[i, name] for name in step.metrics}
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                self.stop_non_finite("train", row["step"], step.batches, step.rng, step.moment)
            if not all(math.isfinite(value) for name, value in row.items() if name.startswith("discriminator/")):
                self.end_non_finite("train", row["step"], None, "the discriminator's loss or gradient")
            self.log(row)
            self.warn(row)
            for callback in self.callbacks:
                callback.on_step(self, row)
            rows.append(row)
        return rows, floats["stop"] > 0

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss and metrics over the validation pairs of all processes, in eval mode. Raises
        `NonFiniteError`."""
        sums = {"pairs": 0.0}
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        places = torch.arange(len(self.chosen["val"]))[rank::processes, None].expand(-1, 2)
        # where there are fewer pairs than processes, none are left for some
        steps = [[batch] for batch in places.split(VAL_BATCH)] if len(places) else []
        bad = None
        with evaluating(self.learner.kept_model) as model:
            for (clips,) in self.read("val", steps):
                batch = self.to_device(clips)
                loss, terms, _ = self.learner.loss(model, batch)
                metrics = to_floats({"loss": loss} | terms)
                if not math.isfinite(metrics["loss"]):  # finite gradients can still take weights to infinity
                    bad = batch
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value * len(batch[0])
                sums["pairs"] += len(batch[0])
            sums = sum_over_processes(sums)
            if not math.isfinite(sums["loss"]):
                self.stop_non_finite("val", self.step, [bad] if bad else [], rng_state())
        pairs = sums.pop("pairs")
        return {name: value / pairs for name, value in sums.items()}

    def validate_and_save(self) -> None:
        row = {"split": "val", "step": self.step} | self.validate()
        self.log(row)
        is_best = row["loss"] < self.best_loss
        self.best_loss = min(self.best_loss, row["loss"])
        self.stale = 0 if is_best else self.stale + 1
        if self.out_of_patience and self.accelerator.is_main_process:
            self.run.plan(self.step)
        for callback in self.callbacks:
            callback.on_validation(self, row)
        self.save(is_best=is_best)

    def to_floats(self, values: dict[Hashable, Tensor]) -> dict[Hashable, float]:
        """Means over the processes, on the host, in one transfer."""
        if self.accelerator.num_processes == 1:
            return to_floats(values)
        stacked = torch.stack([value.detach().float() for value in values.values()])
        return dict(zip(values, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def log(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.run.log(row)

    # --- saving and going on -------------------------------------------------------------------------------------

    def save(self, *, is_best: bool) -> None:
        random = gather_object([rng_state()])  # one of each process
        model = self.learner.kept_model.train().eval()  # aligns the projections' σ with the weights of this step
        if not self.accelerator.is_main_process:
            return
        training = {
            "optimizer": self.learner.optimizer.state_dict(),
            "epoch": self.order.epoch,
            "position": self.order.position,
            "best_loss": self.best_loss,
            "stale": self.stale,
            "warned": sorted(self.warned),
            "random": random,
        }
        if self.learner.average is not None:
            training["weights"] = self.learner.plain_model.state_dict()  # the checkpoint's own are the average
        if self.learner.adversary is not None:
            training["adversary"] = self.learner.adversary.state_dict()
        self.run.save(self.step, model, training, is_best=is_best)

    def load(self) -> None:
        self.step, training = self.run.load_training(self.learner.kept_model)
        if self.learner.average is not None:
            self.learner.plain_model.load_state_dict(training["weights"])
        if self.learner.adversary is not None:
            self.learner.adversary.load_state_dict(training["adversary"])
        self.learner.optimizer.load_state_dict(training["optimizer"])
        self.order.epoch, self.order.position = training["epoch"], training["position"]
        self.best_loss, self.stale = training["best_loss"], training["stale"]
        self.warned = set(training["warned"])
        rank = self.accelerator.process_index
        if len(training["random"]) == self.accelerator.num_processes:
            set_rng_state(training["random"][rank])
        else:  # another number of processes than before
            seed_process(self.config.seed, self.step, rank)

    def memory_advice(self) -> str:
        seconds = self.pairs["train"].clip_length / self.pairs["train"].sample_rate
        kept = f"; {self.run.path / 'last'} is kept" if self.run.has_checkpoint() else ""
        return f"out of memory at step {self.step + 1}: {self.config.memory_advice(seconds)}{kept}"

    # --- signs of trouble ----------------------------------------------------------------------------------------

    def warn(self, row: dict[str, Any]) -> None:
        for key, message in self.learner.warnings(row).items():
            if key not in self.warned:
                self.warned.add(key)
                if self.accelerator.is_main_process:
                    logger.warning("step %d: %s", row["step"], message)

    def stop_non_finite(
        self, split: str, step: int, batches: Sequence[Batch], rng: dict[str, Any], moment: Moment | None = None
    ) -> None:
        """Find where the non-finite value appeared first, in whichever process, record it and raise in all."""
        learner = self.learner
        model = learner.plain_model if split == "train" else learner.kept_model

        def forward(batch: Batch) -> Tensor:
            set_rng_state(rng)
            return learner.loss(model, batch, moment)[0]

        watchable = torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext()
        with watchable:
            found = find_in_batches(model, batches, learner.batch_names, forward)
        reports = [report for report in gather_object([found]) if report]
        stage, tensor = next((report for report in reports if report[1] != NORM), reports[0])
        self.end_non_finite(split, step, stage, tensor)

    def end_non_finite(self, split: str, step: int, stage: int | None, tensor: str) -> None:
        self.log({"split": split, "step": step, "event": "non_finite", "stage": stage, "tensor": tensor})
        raise NonFiniteError(step, stage, tensor, self.run.path / "last" if self.run.has_checkpoint() else None)
