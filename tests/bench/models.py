"""The cascade against the straightforward build: a training step, inference, and the course of the loss."""

import statistics
from typing import Any

import torch
from baseline import StockCascade
from flops import forward_flops, training_flops
from measure import Run, compete, copy_rate, device, matmul_rate, precision
from torch import nn

from lib.audio.synth import render_song
from lib.codec.mdct import MdctCodec
from lib.model.cascade import Cascade, CascadeConfig

STEP_B, STEP_T = 4, 1200  # of eight clips, the stock build's training step takes 18 GB
GPU_STEP_B = 64
LENGTHS = (75, 150, 300, 600, 1200)
BATCHES = (1, 2, 4, 8)
GPU_BATCHES = (1, 4, 8, 16, 32, 64, 128)
CURVE = {"steps": 200, "seeds": 3, "batch": 2, "frames": 75, "clips": 16, "last": 50}


# --- contenders -------------------------------------------------------------------------------------------------------


def build(name: str, precision: str = "fp32") -> nn.Module:
    torch.manual_seed(0)
    model = {"baseline": StockCascade, "here": Cascade, "compiled": Cascade}[name]().to(device())
    if name == "compiled":
        model.compile(fullgraph=True)
    autocast = torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16")
    forward = model.forward

    def latents(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with autocast:
            output = forward(input, target) if name != "compiled" else model(input, target)
        return (output[0] if isinstance(output, tuple) else output).float()

    model.latents = latents
    return model


def training_step(name: str, B: int, T: int, precision: str = "fp32") -> Run:
    model = build(name, precision).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    input, target = torch.randn(2, B, 128, T, device=device()) * 5.7

    def step() -> None:
        optimizer.zero_grad()
        output = model.latents(input, target)
        ((output - input).square().mean() + (output - target).square().mean()).backward()
        optimizer.step()

    return step


def inference(name: str, B: int, T: int, precision: str = "fp32") -> Run:
    model = build(name, precision).eval()
    input, target = torch.randn(2, B, 128, T, device=device()) * 5.7

    def run() -> None:
        with torch.inference_mode():
            model.latents(input, target)

    return run


def products(precision: str) -> Run:
    """Large matrix products for a second or so: what the machine can do, in the same minutes as the rest."""
    size, count = products_shape()
    a, b = torch.randn(2, size, size, device=device()).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    return run


def products_shape() -> tuple[int, int]:
    """Their size, and how many."""
    return (8192, 200) if device().type == "cuda" else (2048, 10)


def products_flops() -> int:
    size, count = products_shape()
    return 2 * size**3 * count


# --- tables -----------------------------------------------------------------------------------------------------------


def limits() -> dict[str, Any]:
    """What the machine can do at best."""
    found = {"copy_gb_per_s": copy_rate() / 1e9, "fp32_gflops": matmul_rate(torch.float32) / 1e9}
    if precision() == "bf16":
        found["bf16_gflops"] = matmul_rate(torch.bfloat16) / 1e9
    return found


def rows(limit: dict[str, float]) -> list[dict[str, Any]]:
    """Training step and inference at full size."""
    B = GPU_STEP_B if device().type == "cuda" else STEP_B
    shapes = [("training step", B, STEP_T), ("training step", 4, 300)]
    shapes += [("inference", 1, STEP_T), ("inference", B, STEP_T)]
    return [versus(*shape, limit) for shape in shapes]


def sweep(limit: dict[str, float]) -> dict[str, list[dict[str, Any]]]:
    """A training step against T, and against the batch."""
    if device().type == "cuda":
        shapes = {"length": [(8, T) for T in LENGTHS], "batch": [(B, STEP_T) for B in GPU_BATCHES]}
    else:
        shapes = {"length": [(1, T) for T in LENGTHS], "batch": [(B, 300) for B in BATCHES]}
    return {axis: [versus("training step", B, T, limit) for B, T in points] for axis, points in shapes.items()}


def versus(what: str, B: int, T: int, limit: dict[str, float]) -> dict[str, Any]:
    """Stock build, this one, and matrix products alone, in turn. On a GPU the stock build computes in bf16 as well; on
    a CPU it is fp32. The limit is the best rate that was ever seen, before or now, in the precision of this build."""
    make, flops = {"training step": (training_step, training_flops), "inference": (inference, forward_flops)}[what]
    mine = precision()
    stock = mine if device().type == "cuda" else "fp32"
    contenders = (make, "baseline", B, T, stock), (make, "here", B, T, mine), (products, mine)
    baseline, here, alone = compete(*contenders)
    rate = max(products_flops() / alone.shortest, limit[f"{mine}_gflops"] * 1e9)
    needed = B * flops(CascadeConfig.reference(), T)
    row = {"what": what, "batch": B, "frames": T, "precision": mine, "ratio": baseline.seconds / here.seconds}
    row |= {"limit_gflops": rate / 1e9, "limit_s": needed / rate, "gflop_per_clip": needed / B / 1e9}
    row["highest_ratio"] = baseline.seconds / row["limit_s"]
    for name, found in (("baseline", baseline), ("here", here)):
        row |= {f"{name}_s": found.seconds, f"{name}_share_of_limit": row["limit_s"] / found.seconds}
        row |= {f"{name}_clips_per_s": B / found.seconds, f"{name}_mib_per_clip": found.peak_mib / B}
    return row


# --- the course of the loss -------------------------------------------------------------------------------------------


def curves() -> dict[str, Any]:
    """Both builds from the same weights on the same clips in the same order: the losses of their last steps must differ
    by no more than those of one build do from one seed of dropout to the next."""
    latents = demo_latents(CURVE["clips"], CURVE["frames"])
    losses: dict[str, list[list[float]]] = {"baseline": [], "here": []}
    for seed in range(CURVE["seeds"]):
        for name in losses:
            losses[name].append(curve(name, seed, latents))
    last = {name: [statistics.mean(run[-CURVE["last"] :]) for run in runs] for name, runs in losses.items()}
    spread = max(max(values) - min(values) for values in last.values())
    difference = statistics.mean(last["here"]) - statistics.mean(last["baseline"])
    average = {name: [statistics.mean(step) for step in zip(*runs, strict=True)] for name, runs in losses.items()}
    return CURVE | {
        "precision": precision(),
        "first_loss": losses["here"][0][0],
        "last_losses": last,
        "difference": difference,
        "seed_spread": spread,
        "agree": abs(difference) <= spread,
        "mean_curves": {name: values[::5] for name, values in average.items()},
    }


def curve(name: str, seed: int, latents: torch.Tensor) -> list[float]:
    torch.manual_seed(0)
    start = Cascade()
    model = StockCascade().copy_from(start) if name == "baseline" else start
    model.to(device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    fast = name == "here" and precision() == "bf16"  # as it is raced
    order = torch.Generator().manual_seed(7)
    torch.manual_seed(seed)
    losses = []
    for _ in range(CURVE["steps"]):
        input, target = latents[torch.randperm(len(latents), generator=order)[: 2 * CURVE["batch"]]].chunk(2)
        optimizer.zero_grad()
        with torch.autocast(device().type, torch.bfloat16, enabled=fast):
            output = model(input, target)
        output = (output[0] if isinstance(output, tuple) else output).float()
        loss = 0.3 * (output - input).square().mean() + 0.3 * (output - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def demo_latents(clips: int, frames: int) -> torch.Tensor:
    wavs = [torch.from_numpy(render_song(0, i, 2 * frames * 320)).float()[-frames * 320 :] for i in range(clips)]
    return MdctCodec().encode(torch.stack(wavs)[:, None]).to(device())
