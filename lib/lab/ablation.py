"""Run the variants of the ablation over seeds: in parallel, resumable, each result cached under a hash of its causes.

    <folder>/<key>/config.json, metrics.jsonl    a run directory as every other (lib.training.run)
    <folder>/<key>/result.json                   the end of the run; a run without one is resumed

A run that meets a non-finite value ends there: the step and the tensor are its result. Runs are float32 and
deterministic, each on one core or one GPU, so that a result does not depend on how many run at once.
"""

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Subset
from tqdm import tqdm

from lib.codec.codec import load_codec
from lib.data.latents import LatentPairs
from lib.evaluation.baselines import mean_metrics, measure_fusions
from lib.evaluation.metrics import evaluate_fusion
from lib.lab.results import Result, summarize
from lib.lab.variants import Variant
from lib.model.cascade import CascadeConfig
from lib.model.fusion import load_model
from lib.model.masks import MaskingConfig
from lib.training.batches import evenly_spread
from lib.training.config import TrainConfig
from lib.training.fusion_learner import train
from lib.training.nonfinite import NonFiniteError
from lib.training.trainer import Callback
from lib.util.files import make_folder, write_atomic
from lib.util.provenance import code_fingerprint


@dataclass(frozen=True)
class Plan:
    """What to run: every variant with every seed, 0 to `seeds` − 1."""

    variants: tuple[Variant, ...]
    num_layers: int
    seeds: int
    train: TrainConfig  # of the reference; variants change it
    masking: MaskingConfig = field(default_factory=MaskingConfig)  # with masks, objective metrics are measured too
    callbacks: tuple[Callback, ...] = ()  # that watch every run; they are sent to the workers


class Job(NamedTuple):
    """One run, as it is sent to a worker."""

    folder: Path  # named by the job's key
    index: Path
    codec: str
    cascade: CascadeConfig
    train: TrainConfig
    masking: MaskingConfig
    callbacks: tuple[Callback, ...] = ()


def run_plan(plan: Plan, index: Path, codec: str, folder: str | Path, workers: int | None = None) -> tuple[Result, ...]:
    """All results of a plan, variant by variant, seed by seed; finished runs are not repeated. `index`: latents by
    `encode_manifest`; `codec`: its name or folder. `workers`: how many at once, by default one per GPU or core; they
    end at the first error, on Ctrl-C, and when this process is killed. `UserError` for bad settings."""
    folder = Path(folder).resolve()
    make_folder(folder)
    fingerprint = load_codec(codec).fingerprint
    jobs, order = {}, []
    for variant in plan.variants:
        for seed in range(plan.seeds):
            training = dataclasses.replace(variant.training(plan.train), seed=seed)
            configs = (variant.cascade(plan.num_layers), training, plan.masking)
            key = job_key(*configs, fingerprint, index.stem)
            jobs[key] = Job(folder / key, index, codec, *configs, plan.callbacks)
            order.append((variant.name, seed, key))
    missing = [job for job in jobs.values() if not (job.folder / "result.json").exists()]
    if missing:
        run_jobs(missing, workers or torch.cuda.device_count() or len(os.sched_getaffinity(0)))
    return tuple(summarize(folder / key, name, seed, plan.num_layers) for name, seed, key in order)


def job_key(cascade: CascadeConfig, training: TrainConfig, masking: MaskingConfig, fingerprint: str, data: str) -> str:
    """A hash of everything that a result depends on: configs, codec, data, torch, and the code that computes it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    configs = [dataclasses.asdict(config) for config in (cascade, training, masking)]
    parts = [*configs, fingerprint, data, device, torch.__version__, code_fingerprint("lib.lab.ablation")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def run_jobs(jobs: Sequence[Job], workers: int) -> None:
    """In worker processes. The first error ends all of them; the runs that they were at are resumed the next time."""
    context = multiprocessing.get_context("spawn")  # a forked CUDA or OpenMP does not work
    workers = min(workers, len(jobs))
    devices, found, others = context.SimpleQueue(), visible_gpus(), multiprocessing.active_children()
    for i in range(workers):
        devices.put(found[i % len(found)])
    with ProcessPoolExecutor(workers, context, start_worker, (devices,)) as pool:
        started = {pool.submit(run_job, job): job for job in jobs}
        try:
            for future in tqdm(as_completed(started), "ablation", len(jobs), unit="run", mininterval=1.0):
                if error := future.exception():
                    error.add_note(f"in {started[future].folder}")
                    raise error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - set(others):
                worker.kill()  # a checkpoint is written as a whole or not at all
            raise


def visible_gpus() -> list[str]:
    """The GPUs of this process, each as it is named in CUDA_VISIBLE_DEVICES; one empty name if there is none."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else list(map(str, range(count))))[:count] or [""]


def start_worker(devices: Any) -> None:
    """Before a process takes its first job. In a group of its own, a terminal's Ctrl-C does not reach it: its parent
    ends it."""
    os.setpgrp()
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu = devices.get()  # before anything asks CUDA what there is
    logging.getLogger("lib.training").setLevel(logging.ERROR)  # variants collapse on purpose
    torch.set_num_threads(1)
    # on a GPU, only algorithms whose sums do not depend on the order of threads; a CPU has no others
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(bool(gpu))
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Where the parent was killed, nobody else ends this process."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run_job(job: Job) -> None:
    """Train, evaluate on the validation pairs, write result.json, and delete the checkpoints."""
    final = bad = None
    try:
        with sdpa_kernel(SDPBackend.MATH) if torch.cuda.is_available() else nullcontext():  # see `start_worker`
            codec = load_codec(job.codec)
            settings = (job.cascade, job.train, job.masking)
            run = train(job.folder, job.index, codec, *settings, resume=True, progress=False, callbacks=job.callbacks)
            model = load_model(run, "last").to("cuda" if torch.cuda.is_available() else "cpu")
            validation = LatentPairs(job.index, "val", codec_fingerprint=codec.fingerprint)
            pairs = Subset(validation, evenly_spread(len(validation), job.train.max_val_pairs).tolist())
            final = evaluate_fusion(model, pairs)
            if job.masking.masking != "none":
                measured = measure_fusions((pairs[i] for i in range(len(pairs))), codec, {"model": model})
                for name in ("model", "average of latents"):
                    final |= {f"{name}/{key}": value for key, value in mean_metrics(measured[name]).items()}
    except NonFiniteError as error:
        bad = {"step": error.step} | error.facts
    write_atomic(job.folder / "result.json", json.dumps({"non_finite": bad, "final": final}, indent=1))
    for name in ("best", "last"):
        (job.folder / name).unlink(missing_ok=True)
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
