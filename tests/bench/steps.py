"""Whole training steps: what the objective's terms, the discriminator and kinds of kernels take of one, what more
processes make of it, and how long a whole training lasts."""

import contextlib
import dataclasses
import functools
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import encodec.model
import torch
import torch.multiprocessing
from accelerate import Accelerator
from measure import ROUNDS, alternate, device, precision, timed
from scaling import scaling_efficiency
from simulated import simulated_index
from torch.nn.parallel import DistributedDataParallel

from lib.codec.encodec import EncodecCodec
from lib.codec.mdct import MdctCodec
from lib.data.latents import LatentPairs
from lib.model.cascade import Cascade, CascadeConfig
from lib.model.fusion import FusionModel
from lib.model.masks import MaskingConfig, Masks
from lib.presets import PRESETS, load_preset
from lib.training.config import AdversaryConfig, CurriculumConfig, TrainConfig
from lib.training.fusion_learner import FusionLearner, fusion_trainer
from lib.training.learner import StepInfo
from lib.training.losses import MASK_TERMS, SOUND_TERMS, total_loss
from lib.training.run import Run

CASCADE = CascadeConfig.reference(anti_cheating=0.1)
OBJECTIVE = PRESETS["demo"].train.loss


def training_config() -> TrainConfig:
    """Everything on."""
    return TrainConfig(
        adversary=AdversaryConfig(discriminator_learning_rate=1e-4),
        loss=OBJECTIVE,
        curriculum=CurriculumConfig(noise_rate=0.1),
        precision=precision(),
    )


def learner() -> FusionLearner:
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="no")
    return FusionLearner(training_config(), FusionModel(CASCADE, MaskingConfig("learned")), accelerator, MdctCodec())


def clips(B: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, B, 128, T, device=device()) * 5.7)


def objective(B: int = 4, T: int = 1200) -> dict[str, Any]:
    """Seconds of every part of a step with everything on, forward and backward. A term on sound is what a step without
    it saves, since terms share the decoding and features; every other part is measured by itself."""
    whole, batch, codec = learner(), clips(B, T), MdctCodec()
    model = whole.unwrapped_model.train()
    output = torch.randn(B, 128, T, device=device(), requires_grad=True)
    masks = [torch.rand_like(output, requires_grad=True) for _ in range(2)]

    def cascade() -> None:
        model.zero_grad()
        model.cascade(*batch)[0].square().mean().backward()

    def with_masks() -> None:
        model.zero_grad()
        model(*batch).latents.square().mean().backward()

    def terms(*names: str) -> None:
        weights = {field: 0.0 for field in OBJECTIVE.weights if field not in ("input_weight", "target_weight")}
        loss = dataclasses.replace(OBJECTIVE, **weights | {f"{n}_weight": 1.0 for n in names})
        critic = whole.adversary.critic(0) if "adversarial" in names else None
        of_masks = Masks(*masks) if set(names) & set(MASK_TERMS) else None
        total_loss(output, *batch, loss, codec, masks=of_masks, critic=critic, training=True)[0].backward()

    def window() -> None:
        frames = round(OBJECTIVE.window_seconds * 75)
        codec.decode(output[..., :frames]).square().mean().backward()
        with torch.no_grad():
            codec.decode(batch[0][..., :frames]), codec.decode(batch[1][..., :frames])

    of_latents = ("novelty", "adversarial", *MASK_TERMS)
    learn = functools.partial(whole.train_step, [batch], StepInfo(0, epoch=1))
    discriminate = functools.partial(whole.adversary.train_step, [(output.detach(), torch.cat(batch))])
    total, alone, masked, discriminator, optimizer = alternate(
        learn, cascade, with_masks, discriminate, whole.optimizer.step
    )
    quick = [functools.partial(terms, *SOUND_TERMS), terms, window]
    quick += [functools.partial(terms, name) for name in of_latents]
    quick += [functools.partial(terms, *(other for other in SOUND_TERMS if other != name)) for name in SOUND_TERMS]
    sound, squares, decoding, *each = alternate(*quick)
    shares = {"cascade": alone, "mask generator": max(0.0, masked - alone), "squared errors": squares}
    shares["decoding a window"] = decoding
    for name, seconds in zip(of_latents, each, strict=False):
        shares[name] = max(0.0, seconds - squares)
    for name, without in zip(SOUND_TERMS, each[len(of_latents) :], strict=True):
        shares[name] = max(0.0, sound - without)
    shares |= {"discriminator": discriminator, "optimizer": optimizer}
    return {
        "batch": B,
        "frames": T,
        "step_s": total,
        "sum_of_parts_s": sum(shares.values()),
        "all_sound_terms_s": sound,
        "sound_over_cascade": sound / alone,
        "shares": {name: seconds / sum(shares.values()) for name, seconds in shares.items()},
    }


# --- kernels ----------------------------------------------------------------------------------------------------------

KINDS = {
    "optimizer": ("adam", "lerp", "foreach"),
    "random numbers": ("rand", "bernoulli", "dropout", "distribution", "normal_"),
    "norms": ("norm", "softmax", "gammabeta"),
    "attention": ("attention", "flash", "fmha"),
    "convolutions": ("conv", "cudnn", "implicit_gemm", "xmma_fprop", "xmma_dgrad", "xmma_wgrad"),
    "matrix products": ("::mm", "addmm", "bmm", "gemm", "cutlass", "cublas", "nvjet", "::linear"),
    "Fourier transforms": ("fft",),
    "copies": ("copy", "memcpy", "memset", "cat", "clone", "fill", "zero"),
}


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "elementwise")


def kernels(B: int = 2, T: int = 1200) -> dict[str, float]:
    """Share of a whole step's time on the device, by kind of kernel."""
    whole, batch = learner(), [clips(B, T)]
    for _ in range(2):
        whole.train_step(batch, StepInfo(1, epoch=1))
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = device().type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        whole.train_step(batch, StepInfo(2, epoch=1))
        if on_gpu:
            torch.cuda.synchronize()
    spent: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        if on_gpu and (event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation):
            continue
        spent[kind_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(spent.values())
    return dict(sorted(((kind, seconds / total) for kind, seconds in spent.items()), key=lambda item: -item[1]))


# --- scaling ----------------------------------------------------------------------------------------------------------


def scaling(T: int = 300) -> dict[str, Any]:
    """Two processes of one thread against one of two threads, and what the paper says of more devices."""
    cascade = Cascade()
    gradient_bytes = 4 * sum(p.numel() for p in cascade.parameters())
    found: dict[str, Any] = {"gradient_mib": gradient_bytes / 2**20}
    if device().type == "cpu":
        context = torch.multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(ROUNDS):
            for processes in rates:  # in turn
                with tempfile.TemporaryDirectory() as name:
                    torch.multiprocessing.spawn(_train, (processes, T, queue, f"{name}/meeting"), nprocs=processes)
                rates[processes].append(queue.get())
        one, two = (statistics.median(values) for values in rates.values())
        found |= {"processes_1_clips_per_s": one, "processes_2_clips_per_s": two, "ratio": two / one}
    return found


# name, bytes a second in one direction, seconds of a turn
LINKS = {
    "cuda": (("NVLink 4, 450 GB/s", 450e9, 5e-6), ("InfiniBand NDR, 50 GB/s", 50e9, 10e-6)),
    "cpu": (("Ethernet, 10 Gbit/s", 1.25e9, 50e-6),),
}


def paper(step_s: float, gradient_bytes: float) -> list[dict[str, Any]]:
    """Efficiency on 8 and 64 devices like this one from the time of its step, for links that are stated."""
    rows = []
    for link, bandwidth, latency in LINKS[device().type]:
        for devices in (8, 64):
            args = (step_s, gradient_bytes, bandwidth, devices)
            rows.append({"link": link, "devices": devices, "step_s": step_s})
            rows[-1]["efficiency"] = scaling_efficiency(*args, latency=latency)
            rows[-1]["efficiency_overlapped"] = scaling_efficiency(*args, latency=latency, overlap=2 / 3)
    return rows


def _train(rank: int, processes: int, T: int, queue: Any, meeting: str) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=processes)
    try:
        torch.manual_seed(0)
        model = DistributedDataParallel(Cascade().train())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        B = 8 // processes
        input, target = clips(B, T)

        def step() -> None:
            optimizer.zero_grad()
            (model(input, target)[0] - input).square().mean().backward()
            optimizer.step()

        step()
        seconds = statistics.median(timed(step, 2) for _ in range(3))  # in step with each other
        if rank == 0:
            queue.put(8 / seconds)
    finally:
        torch.distributed.destroy_process_group()


def full_training(pairs: int = 1000) -> dict[str, float]:
    """Hours that preset full trains on so many pairs: its own step, with EnCodec (of random weights) to decode by;
    without its validations and checkpoints."""
    config = load_preset("full").train
    codec = EncodecCodec(encodec.model.EncodecModel.encodec_model_24khz(pretrained=False), "random").to(device())
    accelerator = Accelerator(mixed_precision="no")
    config = dataclasses.replace(config, precision=precision())
    whole = FusionLearner(config, FusionModel(masking=MaskingConfig("learned")), accelerator, codec)
    batch = clips(config.batch_size, 1200)
    (seconds,) = alternate(lambda: whole.train_step([batch], StepInfo(5000, 1, 0.5)))
    steps = config.epochs * -(-pairs // config.batch_size)
    return {"full_step_s": seconds, "full_batch": config.batch_size, "full_training_hours": steps * seconds / 3600}


def no_wait() -> None:
    """Raises where a whole step of a training with everything on makes the host wait for the GPU."""
    adversary = AdversaryConfig(1e-4)
    config = dataclasses.replace(training_config(), ema=0.99, adversary=adversary, batch_size=8, num_workers=4)
    with tempfile.TemporaryDirectory() as name:
        codec, index = MdctCodec(), simulated_index(Path(name, "latents"), 64)
        values = {"cascade": dataclasses.asdict(CASCADE), "masking": dataclasses.asdict(MaskingConfig("learned"))}
        values |= {"train": dataclasses.asdict(config)}
        values |= {"codec": {"name": codec.name, "fingerprint": codec.fingerprint}}
        pairs = LatentPairs(index, "train")
        trainer = fusion_trainer(Run.create(Path(name, "run"), values), {"train": pairs, "val": pairs}, codec)
        with contextlib.closing(trainer.steps()) as steps:
            trainer.train_step(next(steps), [])
            torch.cuda.set_sync_debug_mode("error")
            try:
                trainer.train_step(next(steps), [])
            finally:
                torch.cuda.set_sync_debug_mode("default")
