"""What training a preset takes, before a GPU is paid for; with `--check`, whether this machine does it. A plan's step
runs in torch's `FakeTensorMode`, on tensors without values, counted by its `FlopCounterMode`. More: `--help`."""

from lib.commands import parser_of

if __name__ == "__main__":  # at once: what is imported below takes seconds
    parser_of("plan").parse_args()

import copy
import dataclasses
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import encodec.model
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lib.codec.codec import Codec, load_codec, placed
from lib.codec.encodec import EncodecCodec
from lib.model.fusion import FusionModel
from lib.model.masks import Masks
from lib.pipeline import parse_overrides
from lib.presets import Preset, load_preset
from lib.superres.mel import HOP, MELS
from lib.superres.training import PARTS
from lib.training.batches import Batch, TrainingOrder
from lib.training.config import resolved_precision
from lib.training.fusion_learner import FusionLearner
from lib.training.learner import Losses, StepInfo
from lib.training.losses import total_loss
from lib.training.run import Run
from lib.training.trainer import open_accelerator
from lib.util.configs import check
from lib.util.errors import UserError, exit_on_user_error

GIB = 2**30
USABLE = 0.92  # of a card's memory: the rest is the driver's, CUDA's own, or lost between blocks
WORKSPACES = GIB // 2  # of cuBLAS and cuDNN, which no tensor holds
SIZES = (24, 40, 80)  # GiB, of which the largest batch is said
SAME = 1e-3  # relative difference of losses: 1e-6 between equal trainings, 1e-2 where gradients or a state are lost
UNKNOWN = {  # to the counter: attention on a CPU, and EnCodec's LSTM
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
    torch.ops.aten.mkldnn_rnn_layer: lambda x, of_input, of_state, *_, **__: lstm_flops(x, of_input, of_state),
    torch.ops.aten.mkldnn_rnn_layer_backward: lambda x, of_input, of_state, *_, **__: (
        2 * lstm_flops(x, of_input, of_state)
    ),
}


def lstm_flops(x: Sequence[int], *weights: Sequence[int]) -> int:
    """Of the shapes of an input `[T, B, channels]` and of the weights of a layer, `[4 H, channels]` and `[4 H, H]`."""
    return 2 * x[0] * x[1] * sum(math.prod(shape) for shape in weights)


class Gpu(NamedTuple):
    memory: int  # GiB
    bf16: int  # TFLOP/s of dense matrix products, by NVIDIA's data sheets
    tf32: int  # of those of convolutions in float32, which torch rounds, as a codec's are
    fp32: int  # and of those of others in float32

    def seconds(self, cost: "Cost", half: bool) -> float:
        """Of a step at the peak rates; `half`: the model in bf16."""
        return (cost.model_flops / (self.bf16 if half else self.fp32) + cost.sound_flops / self.tf32) / 1e12


GPUS = {"h200": Gpu(141, 989, 495, 67), "h100": Gpu(80, 989, 495, 67), "a100": Gpu(80, 312, 156, 20)}
GPUS |= {"a100-40": Gpu(40, 312, 156, 20), "l40s": Gpu(48, 362, 183, 92), "l4": Gpu(24, 121, 60, 30)}
GPUS |= {"rtx4090": Gpu(24, 165, 83, 83)}


class Cost(NamedTuple):
    """Of a step on one batch: bytes by part, and floating-point operations, a multiply and an add being two."""

    weights: int  # of the model, its EMA, the discriminator and the codec
    gradients: int  # of model and discriminator
    optimizer: int  # of both
    model: int  # activations that its forward pass keeps for the gradient
    sound: int  # and those of decoding, with the terms on sound
    peak: int  # the most at once
    model_flops: int
    sound_flops: int


class Alive(TorchDispatchMode):
    """The bytes of memory that tensors hold which were made, or given to `add`, since the beginning."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **kwargs or {})
        self.add(x for x in tree_leaves(result) if isinstance(x, Tensor))
        return result

    def add(self, tensors: Iterable[Tensor]) -> None:
        for storage in (x.untyped_storage() for x in tensors):
            if storage not in self.known:
                self.known.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())

    def _count(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


class FollowedLearner(FusionLearner):
    """Notes what is alive, and what was computed, before the loss, after the model's forward pass, and at the end."""

    def __init__(self, alive: Alive, flops: FlopCounterMode, *args: Any):
        self.alive, self.flops, self.notes = alive, flops, []
        super().__init__(*args)

    def loss(self, model: nn.Module, batch: Batch, info: StepInfo | None = None) -> Losses:
        self.note()
        hook = model.register_forward_hook(lambda *_: self.note())
        try:  # without `info`: the window in the middle, as tensors without values cannot decide a random one
            return super().loss(model, batch)
        finally:
            hook.remove()
            self.note()

    def note(self) -> None:
        self.notes.append((self.alive.now, self.flops.get_total_flops()))


def frames_of(preset: Preset, codec: Codec) -> int:
    return -(-round(preset.data.clip_seconds * codec.sample_rate) // codec.hop)


def model_of(preset: Preset, codec: Codec) -> FusionModel:
    return FusionModel(dataclasses.replace(preset.model.cascade, latent_dim=codec.dim), preset.model.masking)


def cost_of(preset: Preset, codec: Codec, batch_size: int) -> Cost:
    """Of a step of the preset's training. Constant tables that it makes have no values either, and stay: `costs_of`
    calls it in a process that computes nothing else."""
    torch.set_num_threads(1)  # EnCodec decodes in threads, which have no part in the mode
    config, ema = dataclasses.replace(preset.train, compile=False, ema=0.0), preset.train.ema > 0
    output, *clips = torch.randn(3, 1, codec.dim, 40)
    total_loss(output, *clips, config.loss, codec, masks=Masks(*clips))  # makes tables that depend on values
    model, frames = model_of(preset, codec), frames_of(preset, codec)
    alive, mode = Alive(), FakeTensorMode(allow_non_fake_inputs=True)
    flops = FlopCounterMode(display=False, custom_mapping=UNKNOWN)
    with FakeCopyMode(mode):
        model, codec = copy.deepcopy((model, codec))
    accelerator = Accelerator(cpu=True, device_placement=False, mixed_precision="no")
    with mode, alive:
        alive.add(x for part in (model, codec) for x in tensors_of(part))
        learner = FollowedLearner(alive, flops, config, model, accelerator, codec)
        clips = tuple(torch.randn(2, batch_size, codec.dim, frames))
        learner.train_step([clips], StepInfo(0))  # makes the optimizer's state
        learner.notes.clear()
        alive.most = alive.now
        with flops:
            learner.train_step([clips], StepInfo(1))
    (start, _), (after_model, of_model), (after_loss, _) = learner.notes
    trained = [learner] if learner.adversary is None else [learner, learner.adversary]
    gradients = size_of(p for part in trained for p in part.model.parameters())
    # torch cannot move what has no values, as the EMA is moved to its device
    averages = ema * size_of(model.parameters())
    held = size_of(x for part in (*(part.model for part in trained), codec) for x in tensors_of(part))
    states = size_of(x for part in trained for state in part.optimizer.state.values() for x in state.values())
    model_flops = 3 * of_model  # a gradient costs as much as the pass forward for the weights, and again for the inputs
    sizes = averages + held, gradients, states, after_model - start, after_loss - after_model
    return Cost(*sizes, averages + alive.most, model_flops, flops.get_total_flops() - model_flops)


def tensors_of(part: Any) -> Iterable[Tensor]:
    return part.state_dict().values() if isinstance(part, nn.Module) else ()


def size_of(values: Iterable[Any]) -> int:
    """Bytes of the tensors among them."""
    return sum(x.nbytes for x in values if isinstance(x, Tensor))


def random_encodec() -> Codec:
    """EnCodec's network with random weights, which take what the trained ones do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its weight norm
        return EncodecCodec(encodec.model.EncodecModel.encodec_model_24khz(pretrained=False), "")


def costs_of(steps: Sequence[tuple[Preset, Codec, int]]) -> list[Cost]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(cost_of, *zip(*steps, strict=True)))


def in_bf16(preset: Preset) -> bool:
    """'auto': all of these GPUs have it."""
    return preset.train.precision != "fp32"


def in_words(preset: Preset, codec: Codec, gpu: str, pairs: int, share: float) -> list[str]:
    """The plan of a training on `pairs` pairs, on one GPU and on eight, which reach a share of their peak rates."""
    half = in_bf16(preset)
    preset = dataclasses.replace(preset, train=dataclasses.replace(preset.train, precision="bf16" if half else "fp32"))
    config, memory = preset.train, GPUS[gpu].memory
    size = config.batch_size
    cost, twice = costs_of([(preset, codec, size), (preset, codec, 2 * size)])
    a_clip = (twice.peak - cost.peak) / size
    fixed = cost.peak - size * a_clip
    fits = {room: max(0, int((room * GIB * USABLE - fixed) // a_clip)) for room in sorted({*SIZES, memory})}
    batches = ", ".join(f"{room} GiB: batch size {count}" for room, count in fits.items())
    seconds = config.accumulate * GPUS[gpu].seconds(cost, half) / share
    taken = min(pairs, config.max_train_pairs or pairs)
    steps = {count: TrainingOrder(taken, config, 0, count).total_steps(0) for count in (1, 8)}
    hours = {count: found * seconds / 3600 for count, found in steps.items()}
    data = 2 * pairs * codec.dim * frames_of(preset, codec) * 4
    parts = {"weights": cost.weights, "gradients": cost.gradients, "optimizer": cost.optimizer}
    parts |= {"activations of the model": cost.model, "of decoded sound": cost.sound}
    return [
        f"{preset.name}, codec {codec.name}, clips of {preset.data.clip_seconds:g} s, batch size {size}, {gpu}",
        f"memory    {', '.join(f'{name} {value / GIB:.2f}' for name, value in parts.items())} GiB",
        f"          at most {cost.peak / GIB:.2f} GiB at once",
        f"fits      {batches}, in {USABLE:.0%} of each",
        f"a step    {config.accumulate * cost.model_flops / 1e12:.2f} TFLOP of the model in "
        f"{'bf16' if half else 'float32'}, {config.accumulate * cost.sound_flops / 1e12:.2f} of sound in float32: "
        f"{seconds:.3f} s at {share:.2%} of the peak",
        f"training  {taken:,} pairs, {steps[1]:,} steps: {hours[1]:.1f} h on one GPU, {hours[8]:.1f} h on eight, "
        f"without their messages; latents of at most {data / 1e9:.1f} GB",
        "          of the fusion model alone: ablation and super-resolution come on top",
    ]


# --- on the server ----------------------------------------------------------------------------------------------------


class Checks:
    """What a server must do, each a method that says what it found, or raises; beside the plan for such a GPU."""

    def __init__(self, preset: Preset, codec: Codec, gpu: str, share: float):
        self.planned_for, self.share = gpu, share
        precision = resolved_precision(preset.train.precision)
        self.preset = preset = dataclasses.replace(preset, train=dataclasses.replace(preset.train, precision=precision))
        self.codec = codec
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cost, self.seconds = costs_of([(preset, codec, preset.train.batch_size)])[0], math.nan

    def gpu(self) -> str:
        if self.device.type == "cpu":
            raise UserError(f"torch sees no GPU; install a driver for CUDA {torch.version.cuda}")
        found = torch.cuda.get_device_properties(0)
        known = planned_names(found.name)
        if known and self.planned_for not in known:
            raise UserError(f"{found.name}: is not what is planned for; name it by --gpu {known[0]}")
        return f"{torch.cuda.device_count()} of {found.name}, {found.total_memory / GIB:.0f} GiB"

    def precision(self) -> str:
        a, b = torch.randn(2, 1024, 1024, device=self.device)
        wanted, off = a.double() @ b.double(), {}
        for kind, most in ((torch.float32, 1e-3), (torch.bfloat16, 1e-2)):
            off[kind] = float(((a.to(kind) @ b.to(kind)).double() - wanted).norm() / wanted.norm())
            check(off[kind] < most, f"error of a product in {kind}", off[kind], f"below {most}")
        said = ", ".join(f"{str(kind).removeprefix('torch.')} is off by {error:.0e}" for kind, error in off.items())
        return f"{said}; the preset trains in {self.preset.train.precision}"

    def fusion_step(self) -> str:
        config = self.preset.train
        model, frames = model_of(self.preset, self.codec), frames_of(self.preset, self.codec)
        clips = tuple(5 * torch.randn(2, config.batch_size, self.codec.dim, frames, device=self.device))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with placed(self.codec, self.device):
            learner = FusionLearner(config, model, open_accelerator(), self.codec)
            seconds = []
            for step in range(4):
                started = time.perf_counter()
                metrics = learner.train_step([clips], StepInfo(step))
                float(metrics["loss"])  # waits for the step
                seconds.append(time.perf_counter() - started)
        self.seconds = min(seconds[1:])
        check_finite({name: metrics[name] for name in ("loss", "grad_norm")})
        if self.device.type == "cpu":
            return f"loss {float(metrics['loss']):.3f}; memory unknown, {self.cost.peak / GIB:.2f} GiB planned"
        taken = torch.cuda.max_memory_allocated()
        most = 1.3 * self.cost.peak + WORKSPACES
        check(taken < most, "bytes a step", taken, f"below {most:.0f}, 1.3 times the plan and {WORKSPACES} more")
        return f"loss {float(metrics['loss']):.3f}; {taken / GIB:.2f} GiB, {self.cost.peak / GIB:.2f} GiB planned"

    def throughput(self) -> str:
        check(math.isfinite(self.seconds), "seconds a step", self.seconds, "known: the fusion step must succeed")
        share = GPUS[self.planned_for].seconds(self.cost, in_bf16(self.preset)) / self.seconds
        if self.device.type == "cuda" and planned_names(torch.cuda.get_device_name()):
            rule = f"at least half of {self.share:.2%}; plan with it by --share, or look what keeps the GPU waiting"
            check(share > self.share / 2, f"share of the peak of {self.planned_for}", f"{share:.2%}", rule)
        return f"{self.seconds:.3f} s a step: {share:.2%} of the peak of {self.planned_for}, {self.share:.2%} planned"

    def super_resolution_steps(self) -> str:
        plan, losses = self.preset.superres.training_plan(seed=0), []
        for part, sizes, config in plan.parts():
            learner, model, _ = PARTS[part]
            config = dataclasses.replace(config, precision=resolved_precision(config.precision))
            clips, frames = config.batch_size, config.clip_length // HOP
            mel, wav = (torch.rand(clips, 1, *of, device=self.device) for of in ((MELS, frames), (frames * HOP,)))
            latents = torch.randn(clips, 2 * plan.denoiser.latent_channels, MELS // 8, frames // 8, device=self.device)
            batch = {"completion": mel.chunk(2, dim=-1), "diffusion": (latents, mel)}.get(part, (wav, wav))
            metrics = learner(config, model(sizes), open_accelerator()).train_step([batch], StepInfo(0))
            check_finite({f"{part} {name}": metrics[name] for name in ("loss", "grad_norm")})
            losses.append(f"{part} {float(metrics['loss']):.3f}")
        return f"losses {', '.join(losses)}"

    def resume(self) -> str:
        """Where noise is drawn, and Adam's averages decide the steps."""
        noise = ("--set=train.curriculum.noise_rate=0.3", "--set=train.max_train_pairs=4")  # from the second epoch on
        with tempfile.TemporaryDirectory() as folder:
            whole = trained(f"{folder}/whole", 4, *noise)
            trained(f"{folder}/part", 2, *noise)
            again = trained(f"{folder}/part", 4, *noise, "--resume")
        return f"losses differ by {largest_difference(whole, again):.0e} at most"

    def processes(self) -> str:
        """As many as there are GPUs, by powers of two to eight; with one GPU two on the CPU."""
        gpus = torch.cuda.device_count()
        on = {} if gpus > 1 else {"CUDA_VISIBLE_DEVICES": ""}  # each needs a GPU of its own
        count = max(found for found in (2, 4, 8) if found <= max(2, gpus))
        torchrun = ["torch.distributed.run", f"--nproc_per_node={count}", f"--master_port={get_free_port()}"]
        with tempfile.TemporaryDirectory() as folder:
            one = trained(f"{folder}/one", 4, "--set=train.batch_size=8", **on)
            together = trained(f"{folder}/together", 4, f"--set=train.batch_size={8 // count}", by=torchrun, **on)
        where = f"on the {'CPU' if on else 'GPUs'}"
        return f"losses of {count} {where} differ from one's by {largest_difference(one, together):.0e} at most"


def planned_names(card: str) -> list[str]:
    """The names in `GPUS` of a card with this name, 'NVIDIA A100-SXM4-40GB' for example."""
    words = card.lower().replace("-", " ").split()
    return [name for name in GPUS if name.split("-")[0].removeprefix("rtx") in words]


def check_finite(metrics: dict[str, Tensor]) -> None:
    for name, value in metrics.items():
        check(bool(value.isfinite()), name, float(value), "finite")


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Relative; `UserError` if there is a real one."""
    found = [abs(a - b) / abs(a) for a, b in zip(losses, others, strict=True)]
    check(all(one < SAME for one in found), "relative differences of losses", found, f"below {SAME:g}")
    return max(found)


def trained(out: str, steps: int, *options: str, by: Sequence[str] = (), **environment: str) -> list[float]:
    """The losses of so many steps of preset smoke: `lib.train` in one process, or in as many as `by` starts."""
    command = [sys.executable, "-m", *by, *(("-m",) if by else ()), "lib.train", "--preset=smoke", f"--out={out}"]
    settings = {"max_steps": steps, "checkpoint_every": 2, "schedule": "constant", "warmup_steps": 0}
    settings |= {
        "precision": "fp32",
        "agent_learning_rate": 0.01,
    }  # so that what is wrong with a step shows in the next
    command += [*(f"--set=train.{name}={value}" for name, value in settings.items()), *options]
    environment = os.environ | {"NVIDIA_TF32_OVERRIDE": "0"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError("; ".join(done.stderr.strip().splitlines()[-3:]))
    return [row["loss"] for row in Run.open(out).metrics("train")]


def main() -> None:
    options = parser_of("plan").parse_args()
    with exit_on_user_error():
        preset = load_preset(options.preset, parse_overrides(options.set, options.codec))
        codec = random_encodec() if preset.codec == "encodec" else load_codec(preset.codec)
        check(options.training_pairs > 0, "--training-pairs", options.training_pairs, "1 or more")
        check(0 < options.share <= 1, "--share", options.share, "above 0, at most 1")
        if not options.check:
            print(*in_words(preset, codec, options.gpu, options.training_pairs, options.share), sep="\n")
            return
        checks, failed = Checks(preset, codec, options.gpu, options.share), 0
        ok, bad = ("\033[32mok\033[0m", "\033[31mFAILED\033[0m") if sys.stdout.isatty() else ("ok", "FAILED")
        names = ("gpu", "precision", "fusion_step", "throughput", "super_resolution_steps", "resume", "processes")
        for name in names:
            try:
                mark, said = ok, getattr(checks, name)()
            except Exception as error:  # the others are checked all the same
                mark, said, failed = bad, f"{type(error).__name__}: {error}", failed + 1
            print(f"{mark} {name.replace('_', ' ')}: {said}", flush=True)
        sys.exit(failed > 0)


if __name__ == "__main__":
    main()
