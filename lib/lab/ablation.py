"""Run the variants of the ablation over seeds: in parallel, resumable, every result cached by what made it.

    <folder>/<key>/config.json, metrics.jsonl    the run, as every run (lib.training.run)
    <folder>/<key>/result.json                   its end; a run without one is gone on with

A run that meets a non-finite value ends there: that is its result, with the step and the tensor. Runs are float32 and
deterministic, each on one core or one GPU, so that a result does not depend on how many run at once.
"""

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Subset
from tqdm import tqdm

from lib.codec.codec import load_codec
from lib.data.latents import LatentPairs
from lib.evaluation.metrics import evaluate_fusion, judge_outputs, mean_judgement
from lib.lab.results import Result, summarize
from lib.lab.variants import Variant
from lib.model.cascade import CascadeConfig, CollapseWarning
from lib.model.masks import MaskingConfig
from lib.model.projection import projection_ceiling
from lib.training.batches import evenly_spread
from lib.training.config import TrainConfig
from lib.training.nonfinite import NonFiniteError
from lib.training.trainer import train
from lib.util.configs import from_fields
from lib.util.errors import UserError
from lib.util.files import make_folder, write_atomic
from lib.util.provenance import code_fingerprint


@dataclass(frozen=True)
class Plan:
    """What to run: every variant with every seed, 0 to `seeds` − 1."""

    variants: tuple[Variant, ...]
    num_layers: int
    seeds: int
    train: TrainConfig  # of the reference; variants change it
    masking: MaskingConfig = field(default_factory=MaskingConfig)  # with any, results are also judged by ear


@dataclass(frozen=True)
class Job:
    """One run, in values that another process can be given."""

    key: str
    folder: str
    index: str
    codec: str
    cascade: dict[str, Any]
    train: dict[str, Any]
    masking: dict[str, Any]


def run_plan(
    plan: Plan, index: Path, codec: str, folder: str | Path, *, workers: int | None = None
) -> tuple[Result, ...]:
    """All results of a plan, variant by variant, seed by seed; what is there already is not run again.

    `index`: latents by `encode_manifest`; `codec`: the name or folder that made them. `workers`: how many at once
    (default: one a GPU, without any one a core). Ctrl-C stops after the runs have saved; they also save, and end, when
    this process is killed. `UserError` for bad settings;
    `RuntimeError` names runs that failed for another reason, after all the others have ended.
    """
    folder = Path(folder).resolve()
    make_folder(folder)
    fingerprint = load_codec(codec).fingerprint
    jobs, order = {}, []
    for variant in plan.variants:
        for seed in range(plan.seeds):
            config = dataclasses.replace(variant.training(plan.train), seed=seed)
            cascade = variant.cascade(plan.num_layers).to_dict()
            masking = dataclasses.asdict(plan.masking)
            key = job_key(cascade, dataclasses.asdict(config), masking, fingerprint, index.stem)
            jobs[key] = Job(key, str(folder / key), str(index), codec, cascade, dataclasses.asdict(config), masking)
            order.append((variant.name, seed, key))
    missing = [job for key, job in jobs.items() if not (folder / key / "result.json").exists()]
    if missing:
        run_jobs(missing, workers or default_workers())
    for key in jobs:
        drop_checkpoints(folder / key)  # a kill may have left them
    return tuple(summarize(folder / key, name, seed, plan.num_layers) for name, seed, key in order)


def job_key(
    cascade: dict[str, Any], train_config: dict[str, Any], masking: dict[str, Any], fingerprint: str, data: str
) -> str:
    """A hash of everything that a result depends on: configs, codec, data, torch, and the code that computes it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    configs = [json.loads(json.dumps(cascade)), train_config, masking]
    what = [*configs, fingerprint, data, device, torch.__version__, code_fingerprint("lib.lab.ablation")]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def default_workers() -> int:
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


# --- processes -------------------------------------------------------------------------------------------------------


def run_jobs(jobs: Sequence[Job], workers: int) -> None:
    """Run jobs in processes of their own. The first error that is the user's ends all; others are collected."""
    context = multiprocessing.get_context("spawn")  # a forked CUDA or OpenMP does not work
    workers = min(workers, len(jobs))
    devices, pids = context.SimpleQueue(), context.SimpleQueue()
    for i in range(workers):
        devices.put(i % max(1, torch.cuda.device_count()))
    failed = []
    with (
        ProcessPoolExecutor(workers, context, start_worker, (devices, pids)) as pool,
        tqdm(total=len(jobs), desc="ablation", unit="run", mininterval=1.0) as progress,
    ):
        started = {pool.submit(work, job): job for job in jobs}
        try:
            waiting = set(started)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    progress.update()
                    error = future.exception()
                    if isinstance(error, UserError | KeyboardInterrupt):
                        raise error
                    if error is not None:
                        failed.append(f"{started[future].folder}: {type(error).__name__}: {error}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not pids.empty():
                terminate(pids.get())  # its trainer saves a checkpoint; leaving `with` waits for that
            raise
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} runs failed, the others are kept: {'; '.join(failed[:4])}")


def terminate(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


worker = SimpleNamespace(busy=False, stopped=False)  # of this process, where it is a worker


def start_worker(devices: Any, pids: Any) -> None:
    """Before a process takes its first job: its device, one thread, and how it stops.

    A group of its own keeps a terminal's Ctrl-C away: the parent's SIGTERM is the one signal to stop. It must not end
    the process: the pool would then kill the other workers while they save.
    """
    os.setpgrp()
    signal.signal(signal.SIGTERM, stop_worker)
    os.environ["CUDA_VISIBLE_DEVICES"] = str(devices.get()) if torch.cuda.device_count() else ""
    warnings.simplefilter("ignore", CollapseWarning)  # the variants break the design rule on purpose ...
    logging.getLogger("lib.training.trainer").setLevel(logging.ERROR)  # ... and want large factors
    torch.set_num_threads(1)
    pids.put(os.getpid())
    threading.Thread(target=follow_parent, daemon=True).start()


def stop_worker(number: int, frame: Any) -> None:
    worker.stopped = True
    if worker.busy:
        raise KeyboardInterrupt


def follow_parent() -> None:
    """End this process when its parent has ended; a run in training saves first."""
    multiprocessing.parent_process().join()
    if worker.busy:
        terminate(os.getpid())
    else:
        os._exit(1)


def work(job: Job) -> None:
    """A job in a worker. After a stop signal the pool still hands out jobs; none is begun."""
    if worker.stopped:
        raise KeyboardInterrupt
    worker.busy = True
    try:
        run_job(job)
    except KeyboardInterrupt:
        worker.stopped = True
        raise
    finally:
        worker.busy = False
        if worker.stopped and not multiprocessing.parent_process().is_alive():
            os._exit(1)


@contextmanager
def deterministic() -> Iterator[None]:
    """On a GPU only algorithms that give the same sums each time, which the fast ones do not; a CPU's all do."""
    if not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def run_job(job: Job) -> None:
    """Train, evaluate, write result.json, and drop the checkpoints, which nobody will need."""
    folder = Path(job.folder)
    codec, config = load_codec(job.codec), from_fields(TrainConfig, job.train)
    result: dict[str, Any] = {"non_finite": None, "final": None}
    with deterministic():
        try:
            cascade, masking = CascadeConfig.from_dict(job.cascade), from_fields(MaskingConfig, job.masking)
            run = train(folder, job.index, codec, cascade, config, masking, resume=True, progress=False)
            model = run.load_model("last").to("cuda" if torch.cuda.is_available() else "cpu")
            pairs = LatentPairs(job.index, "val", codec_fingerprint=codec.fingerprint)
            pairs = Subset(pairs, evenly_spread(len(pairs), config.max_val_pairs).tolist())
            ceilings = {
                f"stage{i}/ceiling": stage.config.projection_gain
                * projection_ceiling(stage.post_norm, stage.output_projection)
                for i, stage in enumerate(model.cascade.stages)
            }
            result["final"] = evaluate_fusion(model, pairs) | ceilings
            if masking.masking != "none":
                judged = judge_outputs((pairs[i] for i in range(len(pairs))), codec, {"heard": model})
                for name in ("heard", "average of latents"):
                    means = mean_judgement(judged[name])
                    result["final"] |= {f"{name}/{key}": value for key, value in means.items()}
        except NonFiniteError as error:
            result["non_finite"] = {"step": error.step, "stage": error.stage, "tensor": error.tensor}
    write_atomic(folder / "result.json", json.dumps(result, indent=1))
    drop_checkpoints(folder)


def drop_checkpoints(folder: Path) -> None:
    for name in ("best", "last"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
