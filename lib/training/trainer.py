"""The training loop of any model: pairs in, a run directory out. One process, or several by accelerate."""

import contextlib
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from tqdm import tqdm

from lib.model.projection import realign_projections
from lib.training.batches import Batch, Splits, TrainingOrder, evenly_spread, prefetch_batches
from lib.training.config import LoopConfig
from lib.training.learner import Learner, StepInfo, evaluating, to_floats
from lib.training.nonfinite import NORM, Finding, NonFiniteError, find_non_finite
from lib.training.run import Run
from lib.util.errors import UserError
from lib.util.files import FULL
from lib.util.signals import StopSignals
from lib.util.tensors import torch_threads

logger = logging.getLogger(__name__)

VAL_BATCH = 8
OUT_OF_MEMORY = ("can't allocate memory", "_ALLOC_FAILED", "_ALLOCATION_FAILED", "CUDA error: out of memory")
MakeLearner = Callable[[Accelerator], Learner]


class Callback:
    """Watches training, in the main process. It must not change the model."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step, of a resumed run too."""

    def on_step(self, trainer: "Trainer", row: dict[str, Any]) -> None:
        """For every optimizer step, with its row of metrics.jsonl, once its metrics are gathered."""

    def on_epoch(self, trainer: "Trainer", epoch: int) -> None:
        """After the last step of an epoch; `epoch` is the number of finished ones."""

    def on_validation(self, trainer: "Trainer", row: dict[str, Any]) -> None:
        """After every validation, before its checkpoint."""

    def on_end(self, trainer: "Trainer") -> None:
        """When training ends, stops or fails."""


class Taken(NamedTuple):
    """A step that was taken, and all that it takes to repeat it."""

    info: StepInfo | None  # None: of a validation
    metrics: dict[str, Tensor]  # on the device
    batches: Sequence[Batch]
    places: Sequence[Tensor]  # of each batch's pairs, among those chosen, `[B, 2]`: of the first and of the second
    rng: dict[str, Any]


class Trainer:
    """The loop over a run's steps. All the state that resuming needs is in the run's checkpoints. `make_learner` builds
    the model in training, with random weights of the config's seed."""

    def __init__(
        self, run: Run, config: LoopConfig, pairs: Splits, make_learner: MakeLearner, callbacks: Sequence[Callback] = ()
    ):
        self.run, self.config, self.pairs = run, config, pairs
        most = {"train": config.max_train_pairs, "val": config.max_val_pairs}
        self.chosen = {split: evenly_spread(len(pairs[split]), most[split]) for split in pairs}
        self.accelerator = open_accelerator()
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.order = TrainingOrder(len(self.chosen["train"]), config, self.rank, self.processes)
        self.callbacks = callbacks if self.accelerator.is_main_process else ()
        torch.manual_seed(config.seed)
        self.learner = make_learner(self.accelerator)
        # steps whose metrics are still on the device, each with all it takes to repeat it
        self.ungathered: list[Taken] = []
        self.finished = False  # neither stopped nor failed
        self.step = 0
        self.best_loss = math.inf
        self.stale = 0  # validations since the best one
        self.warned: set[Hashable] = set()  # keys of the learner's warnings that have been logged
        self.stop = StopSignals(file=run.stop_file, second_acts=self.processes == 1)
        if run.has_checkpoint():
            self.load()
        elif self.rank:
            seed_process(config.seed, 0, self.rank)

    @property
    def out_of_patience(self) -> bool:
        return self.config.patience is not None and self.stale >= self.config.patience

    def run_to_end(self, *, progress: bool = True) -> None:
        """Train the steps that are left. A stop signal saves, then `KeyboardInterrupt`; out of memory: `UserError`."""
        run, total = self.run, self.order.total_steps(self.step)
        if self.step >= total or self.out_of_patience:
            for callback in self.callbacks:
                callback.on_end(self)
            return
        if self.accelerator.is_main_process:
            run.forget_metrics_after(self.step)
            run.plan(total)
        # without `disable`, tqdm's own environment variables decide
        shown = {} if progress and self.accelerator.is_main_process else {"disable": True}
        bar = tqdm(total=total, initial=self.step, desc="training", unit="step", mininterval=1.0, **shown)
        steps, threads = self.read("train", self.order.steps()), torch_threads(self.config.cpu_threads)
        try:
            with self.stop, bar, threads, contextlib.closing(steps) as batches_of_steps:
                for callback in self.callbacks:  # a dashboard may ask for a stop from here on
                    callback.on_start(self)
                for places, batches in zip(self.order.steps(), batches_of_steps, strict=True):
                    self.train_step(batches, places)
                    bar.update()
                    if self.after_step(bar, last=self.step == total):
                        self.finished = True
                        return
        except BaseException as error:
            with contextlib.suppress(Exception):
                if self.processes == 1:  # another one might not answer
                    self.gather()  # the steps before a failure are those that explain it
            kept = f"; {run.path / 'last'} is kept" if run.has_checkpoint() else ""
            # which have no class of their own: the CPU's allocator, cuBLAS, cuDNN and the driver
            other = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
            if other or isinstance(error, torch.OutOfMemoryError):
                advice = self.config.memory_advice(self.pairs["train"].clip_length / self.pairs["train"].sample_rate)
                raise UserError(f"out of memory at step {self.step + 1}: {advice}{kept}") from error
            if isinstance(error, OSError) and error.errno in FULL:
                fix = "make room there, then resume"
                raise UserError(f"{run.path}: step {self.step} not saved ({error.strerror}); {fix}{kept}") from error
            raise
        finally:
            for callback in self.callbacks:
                callback.on_end(self)

    def after_step(self, bar: tqdm, *, last: bool) -> bool:
        """Gather the metrics, call the callbacks, validate and save when due. Returns whether training is over."""
        save, epoch_over = last or self.step % self.config.checkpoint_every == 0, self.order.position == 0
        # several processes must agree to stop, so they look for a signal only when they gather
        asked = self.stop.asked is not None and self.processes == 1
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

    def read(self, split: str, steps: Iterable[list[Tensor]]) -> Iterator[list[Batch]]:
        """The batches of some steps, prefetched."""
        on_gpu = self.accelerator.device.type != "cpu"
        pairs, chosen, threads = self.pairs[split], self.chosen[split], self.config.num_workers
        return prefetch_batches(pairs, chosen, steps, threads=threads, pin_memory=on_gpu)

    def to_device(self, batch: Batch) -> Batch:
        return tuple(clips.to(self.accelerator.device, non_blocking=True) for clips in batch)

    def train_step(self, batches: Sequence[Batch], places: Sequence[Tensor]) -> None:
        """One optimizer step on one batch or several, of pairs at these places. Its metrics wait for `gather`."""
        info = StepInfo(self.step, self.order.epoch, self.order.progress(self.step))
        rng, batches = rng_state(), [self.to_device(batch) for batch in batches]
        metrics = self.learner.train_step(batches, info)
        self.step += 1
        self.order.advance()
        self.ungathered.append(Taken(info, metrics, batches, places, rng))

    def gather(self) -> tuple[list[dict[str, Any]], bool]:
        """Fetch the metrics of the steps since the last call in one transfer, log them and call the callbacks. Returns
        their rows, and whether any process was asked to stop. Raises `NonFiniteError` in every process."""
        taken, self.ungathered = self.ungathered, []
        asked = torch.full((), float(self.stop.asked is not None), device=self.accelerator.device)
        tensors = {(i, name): value for i, step in enumerate(taken) for name, value in step.metrics.items()}
        floats = to_floats(tensors | {"stop": asked}, self.accelerator)
        rows = []
        for i, step in enumerate(taken):
            row = {"split": "train", "step": step.info.step + 1, "epoch": step.info.epoch}
            row |= self.learner.facts(step.info) | {name: floats[i, name] for name in step.metrics}
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                self.stop_non_finite("train", row["step"], step)
            if not all(math.isfinite(value) for name, value in row.items() if name.startswith("discriminator/")):
                self.end_non_finite("train", row["step"], Finding(None, "the discriminator's loss or gradient"))
            self.log(row)
            for key, message in self.learner.warnings(row).items():
                if key not in self.warned and self.accelerator.is_main_process:
                    logger.warning("step %d: %s", row["step"], message)
                self.warned.add(key)
            for callback in self.callbacks:
                callback.on_step(self, row)
            rows.append(row)
        return rows, floats["stop"] > 0

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss and metrics over the validation pairs of all processes, in eval mode. Raises `NonFiniteError`."""
        own, sums, bad = Counter(pairs=0.0), Counter(), Taken(None, {}, [], [], rng_state())
        places = torch.arange(len(self.chosen["val"]))[self.rank :: self.processes, None].expand(-1, 2)
        # with fewer pairs than processes, some processes have none
        steps = [[batch] for batch in places.split(VAL_BATCH)] if len(places) else []
        with evaluating(self.learner.eval_model) as model:
            for (places,), (clips,) in zip(steps, self.read("val", steps), strict=True):
                batch = self.to_device(clips)
                loss, terms, _ = self.learner.loss(model, batch)
                metrics = to_floats({"loss": loss} | terms)
                if not math.isfinite(metrics["loss"]):  # finite gradients can still take weights to infinity
                    bad = bad._replace(batches=[batch], places=[places])
                own.update({name: value * len(batch[0]) for name, value in (metrics | {"pairs": 1.0}).items()})
            for process_sums in gather_object([own]):
                sums.update(process_sums)
            if not math.isfinite(sums["loss"]):
                self.stop_non_finite("val", self.step, bad)
        pairs = sums.pop("pairs")
        return {name: value / pairs for name, value in sums.items()}

    def validate_and_save(self) -> None:
        row = {"split": "val", "step": self.step} | self.validate()
        self.log(row)
        is_best = row["loss"] < self.best_loss
        self.best_loss, self.stale = (row["loss"], 0) if is_best else (self.best_loss, self.stale + 1)
        if self.out_of_patience and self.accelerator.is_main_process:
            self.run.plan(self.step)
        for callback in self.callbacks:
            callback.on_validation(self, row)
        self.save(is_best=is_best)

    def log(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.run.log(row)

    def save(self, *, is_best: bool) -> None:
        random, model = gather_object([rng_state()]), self.learner.eval_model  # of every process
        realign_projections(model)  # with the weights of this step
        if not self.accelerator.is_main_process:
            return
        training = {"optimizer": self.learner.optimizer.state_dict(), "random": random, "warned": sorted(self.warned)}
        training |= {"epoch": self.order.epoch, "position": self.order.position}
        training |= {"best_loss": self.best_loss, "stale": self.stale}
        if self.learner.ema_model is not None:
            training["weights"] = self.learner.unwrapped_model.state_dict()  # the checkpoint's own are the EMA
        if self.learner.adversary is not None:
            training["adversary"] = self.learner.adversary.state_dict()
        self.run.save(self.step, model, training, is_best=is_best)

    def load(self) -> None:
        self.step, training = self.run.load_training(self.learner.eval_model)
        if self.learner.ema_model is not None:
            self.learner.unwrapped_model.load_state_dict(training["weights"])
        if self.learner.adversary is not None:
            self.learner.adversary.load_state_dict(training["adversary"])
        self.learner.optimizer.load_state_dict(training["optimizer"])
        self.order.epoch, self.order.position = training["epoch"], training["position"]
        self.best_loss, self.stale = training["best_loss"], training["stale"]
        self.warned = set(training["warned"])
        states = training["random"]
        if len(states) == self.processes and len(states[self.rank]["cuda_rng"]) == torch.cuda.device_count():
            set_rng_state(states[self.rank])
        else:
            seed_process(self.config.seed, self.step, self.rank)

    def stop_non_finite(self, split: str, step: int, taken: Taken) -> None:
        """Find where the non-finite value appeared first, in whichever process, record it and raise in all."""
        learner, reports = self.learner, []
        model = learner.unwrapped_model if split == "train" else learner.eval_model

        def forward(batch: Batch) -> Tensor:
            with torch.set_grad_enabled(split == "train"):
                return learner.loss(model, batch, taken.info)[0]

        set_rng_state(taken.rng)  # one batch after the other draws from it, as in the step
        with torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext():
            for batch, places in zip(taken.batches, taken.places, strict=True):
                found = find_non_finite(model, batch, learner.batch_names, forward, self.config.max_norm)
                reports.append((found, [self.name_of_pair(split, *places[i].tolist()) for i in found.clips]))
        reports = gather_object(reports)
        self.end_non_finite(split, step, *next((r for r in reports if r[0].tensor != NORM), reports[0]))

    def name_of_pair(self, split: str, first: int, second: int) -> str:
        """The clips of a batch's pair, by file and offset where the data know them."""
        names = getattr(self.pairs[split], "clip_names", lambda i: (f"pair {i}",) * 2)
        input, target = (names(int(self.chosen[split][i])) for i in (first, second))
        return f"{input[0]} with {target[1]}"

    def end_non_finite(self, split: str, step: int, found: Finding, pairs: Sequence[str] = ()) -> None:
        error = NonFiniteError(step, found, pairs, self.run.path / "last" if self.run.has_checkpoint() else None)
        self.log({"split": split, "step": step, "event": "non_finite"} | error.facts)
        raise error


def join_processes() -> PartialState:
    """This process among the launcher's. Without a GPU they talk through gloo, whichever launcher it is."""
    on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    # long enough for one to encode much music; a launcher ends those that wait for one that has failed
    return PartialState(cpu=on_cpu, timeout=timedelta(days=1))


def open_accelerator() -> Accelerator:
    """The process's device and its link to the others; `UserError` unless the launcher asks for data parallelism."""
    join_processes()
    accelerator = Accelerator(mixed_precision="no")  # the config sets the precision, not the launcher
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(f"launcher: {kind.value} is not supported; use plain data parallelism")
    return accelerator


def rng_state() -> dict[str, Any]:
    return {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"])


def seed_process(seed: int, step: int, rank: int) -> None:
    """Seed each process differently: dropout and noise must not be the same in all of them."""
    torch.manual_seed(seed + 7919 * rank + 104_729 * step)
