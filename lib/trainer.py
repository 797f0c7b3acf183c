"""One training loop: latents in, a run directory out.

Legend: B batch, D latent channels, T frames.
"""

import dataclasses
import logging
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lib.cascade import Cascade, CascadeConfig, StageTrace
from lib.codec import Codec
from lib.errors import UserError
from lib.latents import LatentPairs
from lib.losses import Decode, LossConfig, total_loss
from lib.nonfinite import NonFiniteError, find_non_finite
from lib.runs import Run, config_differences

logger = logging.getLogger(__name__)

FACTOR_WARNING = 1.3  # seed 001 calls a scale factor above it a warning sign
PRECISIONS = ("fp32", "bf16")
LENGTH = ("epochs", "max_steps")  # a resumed run may be made longer or shorter


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Training ends after `epochs` or `max_steps`, whichever comes first."""

    epochs: int = 200
    max_steps: int | None = None
    batch_size: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    clip: float | None = 10.0  # gradient norm above which gradients are scaled down; None: never
    precision: str = "fp32"  # 'bf16': autocast, for GPUs and for CPUs with AMX; elsewhere it is slower, not faster
    checkpoint_every: int = 100  # steps between validations, each of which writes a checkpoint
    max_val_pairs: int | None = None  # validate on so many pairs at most, spread evenly over all; None: on all
    num_workers: int = 0  # reader processes; latents are memory-mapped, so a CPU run needs none
    seed: int = 0
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self):
        if isinstance(self.loss, dict):
            object.__setattr__(self, "loss", LossConfig(**self.loss))
        for name in ("epochs", "batch_size", "checkpoint_every", "max_steps", "max_val_pairs"):
            value = getattr(self, name)
            if not (value is None and name.startswith("max_")) and not (isinstance(value, int) and value >= 1):
                raise UserError(f"{name}={value!r} is not allowed; use a whole number, 1 or more")
        for name, least in (("learning_rate", "above 0"), ("clip", "above 0"), ("weight_decay", "0 or more")):
            value = getattr(self, name)
            low_enough = value is None if name == "clip" else False
            if not low_enough and not (math.isfinite(value) and (value > 0 or (value == 0 and least == "0 or more"))):
                raise UserError(f"{name}={value!r} is not allowed; use a finite number, {least}")
        if self.num_workers < 0:
            raise UserError(f"num_workers={self.num_workers!r} is not allowed; use 0 or more")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision={self.precision!r} is not allowed; use one of {', '.join(PRECISIONS)}")


def train(
    out_dir: str | Path,
    index: str | Path,
    codec: Codec,
    cascade: CascadeConfig,
    config: TrainConfig,
    *,
    resume: bool = False,
    progress: bool = True,
) -> Run:
    """Train a cascade on the latents of `index` and return its run directory.

    With `resume`, a run in `out_dir` goes on from its last checkpoint, bit for bit on a CPU; only its length may differ
    now, and another config or other data is refused. Without it a new run starts. Ctrl-C and SIGTERM save a checkpoint
    and raise `KeyboardInterrupt`.
    """
    wanted = {
        "cascade": cascade.to_dict(),
        "train": dataclasses.asdict(config),
        "codec": {"name": codec.name, "fingerprint": codec.fingerprint},
        "data": Path(index).stem,  # names the pairs by their content
    }
    pairs = {split: LatentPairs(index, split, codec_fingerprint=codec.fingerprint) for split in ("train", "val")}
    check_sizes(pairs, config)
    if cascade.latent_dim != codec.dim:
        raise UserError(f"latent_dim={cascade.latent_dim} does not fit codec {codec.name}; use {codec.dim}")
    if resume and (Path(out_dir) / "config.json").exists():
        run = Run.open(out_dir)
        had = {key: run.config.get(key) for key in wanted}
        length = {name: wanted["train"][name] for name in LENGTH}
        if differences := config_differences(had | {"train": (had["train"] or {}) | length}, wanted):
            raise UserError(
                f"{out_dir}: holds a run with another config ({'; '.join(differences[:4])}); "
                "resume with its own config, start again without resume, or choose another output folder"
            )
        run.config["train"] |= length
    else:
        run = Run.create(out_dir, wanted)
    Trainer(run, pairs["train"], pairs["val"], codec.decode).run_to_end(progress=progress)
    return run


def check_sizes(pairs: dict[str, LatentPairs], config: TrainConfig) -> None:
    for split, dataset in pairs.items():
        if len(dataset) == 0:
            raise UserError(f"the {split} split has no pairs; add music, or lower the clip length")
    if config.batch_size > len(pairs["train"]):
        available = len(pairs["train"])
        raise UserError(f"batch_size={config.batch_size} is more than the {available} training pairs; lower it")


class Trainer:
    """The loop over a run's steps. Everything it needs to go on after a kill is in the run's checkpoints."""

    def __init__(self, run: Run, train_pairs: LatentPairs, val_pairs: LatentPairs, decode: Decode | None = None):
        self.run = run
        self.decode = decode  # for the terms of the loss that are heard
        self.config = TrainConfig(**run.config["train"])
        self.train_pairs, self.val_pairs = train_pairs, val_pairs
        self.accelerator = Accelerator()
        torch.manual_seed(self.config.seed)
        model = Cascade(CascadeConfig.from_dict(run.config["cascade"]))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay, fused=True
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.step = 0
        self.best_loss = math.inf
        self.warned: set[int] = set()  # stages whose factor has passed FACTOR_WARNING
        self.stop_signal: int | None = None
        if run.has_checkpoint():
            self.load()

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_pairs) / self.config.batch_size)

    @property
    def total_steps(self) -> int:
        steps = self.config.epochs * self.steps_per_epoch
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    def run_to_end(self, *, progress: bool = True) -> None:
        """Train the steps that are left, with a progress bar on stderr or without one.

        After a stop signal: save, and raise `KeyboardInterrupt`.
        """
        if self.step >= self.total_steps:
            return
        self.run.forget_metrics_after(self.step)
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="training",
            unit="step",
            mininterval=1.0,
            **({} if progress else {"disable": True}),  # unnamed, tqdm's own environment variables decide
        )
        with catch_stop_signals(self), bar:
            for input, target in self.batches():
                row = self.train_step(input, target)
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                bar.update()
                done = self.step == self.total_steps
                if done or self.step % self.config.checkpoint_every == 0:
                    self.validate_and_save()
                elif self.stop_signal:
                    self.save(is_best=False)
                if self.stop_signal and not done:
                    name = signal.Signals(self.stop_signal).name
                    raise KeyboardInterrupt(f"stopped by {name}; step {self.step} is saved in {self.run.path}")

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the steps that are left, `[B, D, T]` twice. Their order depends on seed and epoch alone."""
        for epoch in range(self.step // self.steps_per_epoch, math.ceil(self.total_steps / self.steps_per_epoch)):
            generator = torch.Generator().manual_seed(self.config.seed + epoch * 1_000_003)
            order = torch.randperm(len(self.train_pairs), generator=generator).split(self.config.batch_size)
            first = epoch * self.steps_per_epoch
            yield from self.loader(self.train_pairs, order[self.step - first : self.total_steps - first])

    def loader(self, pairs: LatentPairs, batches: Sequence[Tensor]) -> DataLoader:
        return DataLoader(
            pairs,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self.config.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # a loader draws a seed when it starts; the model's RNG must not notice
        )

    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor], tuple[StageTrace, ...]]:
        device = self.accelerator.device
        input, target = input.to(device, non_blocking=True), target.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            output, traces = self.model(input, target)
        loss, terms = total_loss(output.float(), input, target, self.config.loss, self.decode)
        return loss, terms, traces

    def train_step(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """One optimizer step. Logs and returns its metrics; raises `NonFiniteError` before a bad step is taken."""
        self.model.train()
        rng = rng_state()
        loss, terms, traces = self.forward(input, target)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        shares = gradient_norms(self.accelerator.unwrap_model(self.model))
        largest = self.config.clip if self.config.clip is not None else math.inf
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), largest)
        metrics = to_floats({"loss": loss, "grad_norm": grad_norm} | shares | step_metrics(terms, traces))
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            self.stop_non_finite("train", self.step + 1, input, target, rng)
        self.optimizer.step()
        self.step += 1
        epoch = (self.step - 1) // self.steps_per_epoch
        row = {"split": "train", "step": self.step, "epoch": epoch} | metrics
        self.run.log(row)
        self.warn_of_factors(metrics)
        return row

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss, terms and traces over the validation pairs, in eval mode. Raises `NonFiniteError`."""
        self.model.eval()
        sums: dict[str, float] = {}
        chosen = evenly_spread(len(self.val_pairs), self.config.max_val_pairs)
        for input, target in self.loader(self.val_pairs, chosen.split(8)):
            loss, terms, traces = self.forward(input, target)
            metrics = to_floats({"loss": loss} | step_metrics(terms, traces))
            if not math.isfinite(metrics["loss"]):  # finite gradients can still take weights to infinity
                self.stop_non_finite("val", self.step, input, target, rng_state())
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value * len(input)
        return {name: value / len(chosen) for name, value in sums.items()}

    def validate_and_save(self) -> None:
        metrics = self.validate()
        self.run.log({"split": "val", "step": self.step} | metrics)
        is_best = metrics["loss"] < self.best_loss
        self.best_loss = min(self.best_loss, metrics["loss"])
        self.save(is_best=is_best)

    # --- saving and going on -------------------------------------------------------------------------------------

    def save(self, *, is_best: bool) -> None:
        training = {
            "optimizer": self.optimizer.state_dict(),
            "best_loss": self.best_loss,
            "warned": sorted(self.warned),
        } | rng_state()
        model = self.accelerator.unwrap_model(self.model)
        model.eval()  # aligns the projections' σ with the weights of this step
        self.run.save(self.step, model, training, is_best=is_best)

    def load(self) -> None:
        self.step, training = self.run.load_training(self.accelerator.unwrap_model(self.model))
        self.optimizer.load_state_dict(training["optimizer"])
        set_rng_state(training)
        self.best_loss = training["best_loss"]
        self.warned = set(training["warned"])

    # --- signs of trouble ----------------------------------------------------------------------------------------

    def warn_of_factors(self, metrics: dict[str, float]) -> None:
        for stage in range(len(self.run.config["cascade"]["stages"])):
            wanted = metrics[f"stage{stage}/wanted_factor"]
            if wanted > FACTOR_WARNING and stage not in self.warned:
                self.warned.add(stage)
                logger.warning("step %d: stage %d wants the factor %.2f, above 1.3", self.step, stage, wanted)

    def stop_non_finite(self, split: str, step: int, input: Tensor, target: Tensor, rng: dict[str, Any]) -> None:
        """Find where the non-finite value appeared first, record it and raise."""

        def forward() -> Tensor:
            set_rng_state(rng)
            return self.forward(input, target)[0]

        latents = {"input latents": input, "target latents": target}
        stage, tensor = find_non_finite(self.accelerator.unwrap_model(self.model), latents, forward)
        self.run.log({"split": split, "step": step, "event": "non_finite", "stage": stage, "tensor": tensor})
        raise NonFiniteError(step, stage, tensor, self.run.path / "last" if self.run.has_checkpoint() else None)


def evenly_spread(count: int, most: int | None) -> Tensor:
    """At most `most` (None: all) of the numbers 0 to count − 1, spread evenly."""
    most = min(count, most or count)
    return torch.arange(most) * count // most


def rng_state() -> dict[str, Any]:
    return {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["rng"])
    if len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])


def step_metrics(terms: dict[str, Tensor], traces: tuple[StageTrace, ...]) -> dict[str, Tensor]:
    """The loss terms and the batch means of every stage's trace, by the names that metrics.jsonl uses."""
    metrics = {f"loss/{name}": value for name, value in terms.items()}
    for stage, trace in enumerate(traces):
        for trace_field in dataclasses.fields(trace):
            metrics[f"stage{stage}/{trace_field.name}"] = getattr(trace, trace_field.name).mean()
    return metrics


@torch.no_grad()
def gradient_norms(model: Cascade) -> dict[str, Tensor]:
    """Gradient norm of every part of every stage before clipping, as 'grad_norm/stage1/output_projection'."""
    norms = {}
    for i, stage in enumerate(model.stages):
        for name, part in stage.named_children():
            if grads := [p.grad for p in part.parameters() if p.grad is not None]:
                norms[f"grad_norm/stage{i}/{name}"] = torch.nn.utils.get_total_norm(grads)
    return norms


def to_floats(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars to the host in one transfer."""
    return dict(zip(values, torch.stack([v.detach().float() for v in values.values()]).tolist(), strict=True))


class catch_stop_signals:
    """While training: the first Ctrl-C or SIGTERM asks the trainer to stop after its step, a second acts at once."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def __enter__(self) -> None:
        self.earlier = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.earlier[number] = signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        self.trainer.stop_signal = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: Any) -> None:
        self.restore()
