"""What ends a training in a NaN, and what does not: the three causes that the source documents name, with the terms as
they had them, without epsilons, on short clips of electronic music and of generated songs; the death that is found,
taken away and put in; ways to keep a weak last residual. Runs are kept and resumed by `lib.lab.ablation`."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from settings import ExplosionSettings
from torch import Tensor, nn
from verdicts import CREATIVE, audit_gradients
from writing import write_record

from lib.audio.files import SAMPLE_RATE, load_audio, save_audio
from lib.codec.codec import load_codec
from lib.data.latents import LatentPairs, encode_manifest, encoding_check
from lib.data.pairs import Clip, Manifest, build_manifest
from lib.lab.ablation import Plan, run_plan
from lib.lab.findings import effects
from lib.lab.results import Result, by_variant, peak, training_steps
from lib.lab.variants import (
    CAUSE_NAMES,
    CAUSES,
    EXPLODING,
    LEARNABLE,
    PROTECTIONS,
    REFERENCE,
    REPAIR,
    SCHEDULED,
    VARIANTS,
    WEAK_RESIDUALS,
    Variant,
)
from lib.model.cascade import StageConfig
from lib.model.projection import applied_weight
from lib.model.rms_law import rms_before_scaling
from lib.training.batches import evenly_spread
from lib.training.config import TrainConfig
from lib.training.losses import LossConfig
from lib.training.run import Run
from lib.training.trainer import Callback, Trainer
from lib.util.files import file_sha256
from lib.util.stats import describe

ELECTRONIC = "nexuiz-music"  # the folder of the loops
PAIRS = {"train": 410, "val": 8}  # 205 batches of 2: an epoch of source document 001
RATES, CLIPS = (1e-4, 3e-4), (10.0, None)
WINDOW = 0.5  # seconds
FRAME_RATE = 75  # latents a second
DIGITS = 4  # of a number in the record
SMALL = {"ffn_mult": 1, "num_heads": 4}  # of every stage
NARROW = 128  # a stage's width where only what ends a training is asked: half the time of a step
BY_NAME = {variant.name: variant for variant in VARIANTS + SCHEDULED}
ON_SOUND = [*(v.name for v in CAUSES.values() if v.loss), CREATIVE]  # those that correlate envelopes
KEPT = [REFERENCE, "3 stages", EXPLODING, REPAIR, *(variant.name for variant in WEAK_RESIDUALS)]
LAW = (
    *(Variant(f"last residual {weight:g}", "law", 3, last={"residual_weight": weight}) for weight in (0.05, 0.3)),
    *(Variant(f"last stage {width} wide", "law", last={"width": width}) for width in (192, 768)),
)


NAMES = ("projection_rms", "residual_rms", "alignment", "rms_before_scaling")  # of a stage
LOG_PENALTY = BY_NAME["causes: log penalty"].loss
PROTECTED = tuple(dataclasses.replace(variant, loss=LOG_PENALTY) for variant in PROTECTIONS.values())
# the model of source document 003, with its objective; its NaNs came in epochs 5, 14 and 24
CREATIVE_LOG = dict(BY_NAME[CREATIVE].loss) | {"anti_modulation": "log"}
SEED_003 = dataclasses.replace(BY_NAME[LEARNABLE], name=f"{LEARNABLE}, creative terms", loss=CREATIVE_LOG)
LAW_ROWS = "law"  # split of the rows that `Law` logs
JUDGED = ("weak residual", "protections", "longer")


@torch.no_grad()
def expected_rms(norm: nn.LayerNorm, projection: nn.Linear) -> float:
    """RMS that `projection` gives to the output γ ⊙ n + β of `norm` with their present weights, if the directions of n
    are spread evenly over all channels: √((‖W·diag(γ)‖² + ‖W·β + b‖²)/D), Frobenius norm and length."""
    weight = applied_weight(projection)
    spread, constant = (weight * norm.weight).square().sum(), (weight @ norm.bias + projection.bias).square().sum()
    return ((spread + constant) / len(weight)).sqrt().item()


class Law(Callback):
    """Logs, beside every validation, the RMS that each stage's projection would have by its weights alone."""

    def on_validation(self, trainer: Trainer, row: dict[str, Any]) -> None:
        law = {"split": LAW_ROWS, "step": trainer.step}
        for i, s in enumerate(trainer.learner.eval_model.cascade.stages):
            law[f"stage{i}/projection_rms"] = s.config.projection_gain * expected_rms(s.post_norm, s.output_projection)
        trainer.run.log(law)


class Experiment(NamedTuple):
    """Trainings that differ in variant and seed only."""

    name: str
    data: str
    variants: tuple[Variant, ...]
    seeds: int = 1
    rate: float = 1e-4
    clip: float | None = 10.0
    window: float | None = None  # seconds of a clip that are decoded, at random; None: all
    guarded: bool = False
    steps: int = 1
    layers: int = 1
    width: int | None = NARROW  # of all stages; None: the reference's

    @property
    def correlating(self) -> set[str]:
        """The variants that correlate envelopes."""
        return {variant.name for variant in self.variants if variant.loss.get("anti_modulation_weight")}

    def plan(self) -> Plan:
        loss = LossConfig(guarded=self.guarded, window_seconds=self.window)
        base = TrainConfig(
            max_steps=self.steps,
            batch_size=2,
            learning_rate=self.rate,
            clip=self.clip,
            checkpoint_every=250,
            cpu_threads=1,
            gather_every=20,
        )
        base = dataclasses.replace(base, loss=loss, max_val_pairs=PAIRS["val"])
        sizes = SMALL | {"width": self.width}
        small = tuple(dataclasses.replace(v, every=sizes | dict(v.every)) for v in self.variants)
        return Plan(small, self.layers, self.seeds, base, callbacks=(Law(),))


Ran = tuple[Experiment, tuple[Result, ...]]
Done = Sequence[Ran]


def variants(names: Sequence[str]) -> tuple[Variant, ...]:
    return tuple(BY_NAME[name] for name in names)


def experiments(size: ExplosionSettings) -> Iterator[Experiment]:
    """What is found, its causes, the weak residual and the law first; the grid takes the longest."""
    sound = variants(ON_SOUND)
    sized = partial(Experiment, steps=size.steps, seeds=size.seeds)
    law = partial(sized, "law", "loops", seeds=min(3, size.seeds), guarded=True, width=None)
    for rate in RATES:
        for clip in CLIPS:
            yield sized("windows", "loops", sound, rate=rate, clip=clip, window=WINDOW)
    some = variants([ON_SOUND[0], *ON_SOUND[-2:]])
    yield sized("operation taken away", "loops", some, window=WINDOW, guarded=True)
    yield sized("pairs taken away", "loops without silence", some, window=WINDOW)
    yield sized("windows", "songs", some, window=WINDOW)
    yield sized("pair put in", "songs and silence", some, window=WINDOW)
    yield sized("pair put in, operation taken away", "songs and silence", some, window=WINDOW, guarded=True)
    yield sized("weak residual", "loops", variants(KEPT), guarded=True, width=None)
    yield law(LAW)
    for layers in (2, 4):
        yield law(variants(["3 stages"]), layers=layers)
    yield sized("protections", "loops", PROTECTED)
    yield sized("longer", "loops", (BY_NAME[LEARNABLE], SEED_003), steps=size.longer)
    for rate in RATES[::-1]:
        for data in ("loops", "songs"):
            for clip in CLIPS[::-1]:
                yield sized("grid", data, tuple(CAUSES.values()), rate=rate, clip=clip)


def prepare(music: Path, songs: Path, folder: Path) -> dict[str, Path]:
    """The latents of all data: name → index."""
    codec, found = load_codec("mdct"), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, root in (("loops", music / ELECTRONIC), ("songs", songs)):
        check = encoding_check(codec, folder, SAMPLE_RATE)
        manifest = build_manifest(root, folder / f"{name}.jsonl", 1.0, check_file=check)
        found[name] = few = of_size(manifest)
        if name == "loops":
            silences = silences_of(encode_manifest(few, codec, folder))
            found["loops without silence"] = without_silence(few, silences)
        else:
            found["songs and silence"] = with_silence(few, folder / "silence.wav")
    return {name: encode_manifest(manifest, codec, folder) for name, manifest in found.items()}


def of_size(manifest: Manifest) -> Manifest:
    """As many pairs as `PAIRS`, spread evenly over all."""
    chosen = []
    for split, count in PAIRS.items():
        pairs = manifest.split(split)
        chosen += [pairs[i] for i in evenly_spread(len(pairs), count).tolist()]
    return dataclasses.replace(manifest, pairs=tuple(chosen))


def silence(latents: Tensor) -> int:
    """The longest run of frames of latents `[D, T]` that are exactly 0."""
    longest = run = 0
    for silent in (latents == 0).all(dim=0).tolist():
        run = run + 1 if silent else 0
        longest = max(longest, run)
    return longest


def silences_of(index: Path) -> list[int]:
    """Of each training pair, the longest silence in either clip, in frames."""
    pairs = LatentPairs(index, "train")
    return [max(map(silence, pairs[i])) for i in range(len(pairs))]


def without_silence(manifest: Manifest, silences: Sequence[int]) -> Manifest:
    """Without the training pairs in which a clip is silent for as long as a window."""
    pairs, window = manifest.split("train"), round(WINDOW * FRAME_RATE)
    silent = {pair.id for pair, frames in zip(pairs, silences, strict=True) if frames >= window}
    return dataclasses.replace(manifest, pairs=tuple(pair for pair in manifest.pairs if pair.id not in silent))


def with_silence(manifest: Manifest, path: Path) -> Manifest:
    """With one training pair whose input is silent, but for its last tenth of a second."""
    first = next(i for i, pair in enumerate(manifest.pairs) if pair.split == "train")
    pair = manifest.pairs[first]
    wav = load_audio(manifest.path(pair.input), pair.input.offset, pair.input.length)
    wav[..., : -SAMPLE_RATE // 10] = 0
    save_audio(path, wav)
    clip = Clip(path=str(path.resolve()), offset=0, length=wav.shape[-1], sha256=file_sha256(path))
    pairs = list(manifest.pairs)
    pairs[first] = dataclasses.replace(pair, input=clip)
    return dataclasses.replace(manifest, pairs=tuple(pairs))


def run_all(size: ExplosionSettings, music: Path, songs: Path, folder: Path) -> tuple[list[Ran], dict[str, Path]]:
    """Every experiment with its results, and the latents."""
    indices = prepare(music, songs, folder / "latents")
    done: list[Ran] = []
    for e in experiments(size):
        alike = [r for other, results in done if other == e._replace(clip=None) for r in results if e.clip]
        done.append((e, run(e, indices[e.data], folder / "runs", alike)))
    return done, indices


def run(e: Experiment, index: Path, folder: Path, unclipped: Sequence[Result]) -> tuple[Result, ...]:
    """The results of an experiment. Where no gradient of the `unclipped` runs is longer than the clip, they are also
    those with it, bit for bit."""
    longest = {name: max(peak(r) for r in runs) for name, runs in by_variant(unclipped).items()}
    same = tuple(r for r in unclipped if longest[r.variant] <= e.clip)
    left = tuple(v for v in e.variants if longest.get(v.name, inf) > (e.clip or 0))
    return same + run_plan(e._replace(variants=left).plan(), index, "mdct", folder)


KEPT_METRICS = ("grad_norm", "rms_ratio", "mse", "input_correlation", "target_correlation")


def slim(result: Result) -> dict[str, Any]:
    """A result with what the tables and verdicts need of it; of its gradient norms the largest."""
    kept = {"grad_norm": (peak(result),), "quarter": {}}
    for name in ("start", "end", "final"):
        found = getattr(result, name) or {}
        parts = name == "end" and result.variant == EXPLODING  # whose shares are judged
        kept[name] = {k: v for k, v in found.items() if k in KEPT_METRICS or (parts and k.startswith("grad_norm/"))}
    bad = result.non_finite and {"step": result.non_finite["step"]}
    return rounded(dataclasses.replace(result, non_finite=bad, **kept | {"final": kept["final"] or None}))


def rounded(result: Result) -> dict[str, Any]:
    """With `DIGITS` digits a number, and no path."""
    content = dataclasses.asdict(result) | {"run": Path(result.run).name}
    return json.loads(json.dumps(content), parse_float=lambda number: float(f"{float(number):.{DIGITS}g}"))


# --- tables -----------------------------------------------------------------------------------------------------------


def conditions(e: Experiment) -> dict[str, Any]:
    """What an experiment's runs have in common, as columns."""
    base = e.plan().train
    clips = {variant.training(base).clip for variant in e.variants}
    clip = " or ".join("none" if clip is None else f"{clip:g}" for clip in sorted(clips, key=lambda c: c or inf))
    row = {"experiment": e.name, "data": e.data, "epsilons": "ours" if e.guarded else "none", "steps": e.steps}
    return row | {"learning rate": f"{e.rate:.0e}", "clip": clip}


def ended(runs: Sequence[Result]) -> str:
    return f"{sum(run.non_finite is not None for run in runs)} of {len(runs)}"


def death_rows(done: Done) -> list[dict[str, Any]]:
    """A row for each experiment: how many of its runs met a non-finite value, when, in which operation and clips."""
    rows = []
    for e, runs in done:
        dead = [run for run in runs if run.non_finite]
        row = conditions(e) | {"non-finite": ended(runs)}
        steps = sorted({run.non_finite["step"] for run in dead})
        row["step"] = " to ".join(str(step) for step in dict.fromkeys((steps[0], steps[-1]))) if dead else "–"
        row["gradient norm before"] = describe([run.end["grad_norm"] for run in dead if run.end]) if dead else "–"
        for name in ("tensor", "operation", "spread"):
            found = (re.sub(r"(\S+) of \1 gradients", "all gradients", run.non_finite[name]) for run in dead)
            row[name] = "; ".join(dict.fromkeys(found)) or "–"
        row["clips"] = "; ".join(dict.fromkeys(pair for run in dead for pair in clips_of(run))) or "–"
        rows.append(row)
    return rows


def clips_of(run: Result) -> list[str]:
    """The clips that made a run end, by file without its folder, and offset."""
    return [
        " with ".join(clip.rpartition("/")[-1] for clip in pair.split(" with ")) for pair in run.non_finite["pairs"]
    ]


def cause_rows(done: Done) -> list[dict[str, Any]]:
    """A row for each experiment: non-finite values, the largest gradient norm and its variant, and what each cause does
    to the largest norm, in decades, where all combinations were run."""
    rows = []
    for e, runs in done:
        largest = max(runs, key=peak)
        row = conditions(e) | {"non-finite": ended(runs)}
        row["largest norm"] = f"{peak(largest):.3g} ({largest.variant})"
        found = effects(CAUSES, CAUSE_NAMES, by_variant(runs)).get("largest gradient norm (decades)", {})
        rows.append(row | {name: describe(found[name], 2) for name in CAUSE_NAMES if name in found})
    return rows


# --- early warning ----------------------------------------------------------------------------------------------------

SIGNS: dict[str, Callable[[Mapping[str, float]], float]] = {
    "1 / (1 − |corr|)": lambda row: row["sign/copying"],
    "mean of an envelope over its deviation": lambda row: row["sign/flatness"],
    "share of one element in the gradient": lambda row: row["sign/gradient_share"],
    "target scale": lambda row: max(v for k, v in row.items() if k.endswith("/target_scale")),
    "gradient norm": lambda row: row["grad_norm"],
}
OF_C15 = {"target scale": 1.3, "gradient norm": 100.0}  # the source documents' own limits
CALIBRATING = (0, 1)  # seeds whose healthy runs set the limits; the others are judged


def signs(done: Done) -> list[dict[str, Any]]:
    """For each measurement: a limit that no step of the calibrating seeds' healthy runs passes, how many of the other
    seeds' healthy runs pass it, how many deaths it announces, and how many steps before. Only runs that correlate
    envelopes without epsilons."""
    runs = [r for e, results in done if not e.guarded for r in results if r.variant in e.correlating]
    series = [(r, training_steps(r.run)) for r in {r.run: r for r in runs}.values()]
    rows = []
    for name, of in SIGNS.items():
        measured = [(r, [of(step) for step in steps]) for r, steps in series if steps]
        healthy = [(r, values) for r, values in measured if r.non_finite is None]
        own = max((max(values) for r, values in healthy if r.seed in CALIBRATING), default=inf)
        for limit in {own, OF_C15.get(name, own)}:
            judged = [(r, [i for i, v in enumerate(values) if v > limit]) for r, values in measured]
            judged = [(r, steps) for r, steps in judged if r.seed not in CALIBRATING]
            alarms = [bool(steps) for r, steps in judged if r.non_finite is None]
            leads = [r.non_finite["step"] - 1 - steps[0] for r, steps in judged if r.non_finite and steps]
            deaths = sum(r.non_finite is not None for r, _ in judged)
            rows.append(
                {
                    "measurement": name,
                    "limit": f"{limit:.3g}" + " (C15)" * (limit == OF_C15.get(name)),
                    "false alarms": f"{sum(alarms)} of {len(alarms)} healthy runs",
                    "announced": f"{len(leads)} of {deaths} deaths",
                    "steps before": describe(leads) if leads else "–",
                }
            )
    return rows


def silence_rows(silences: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """How many training pairs of all data have a clip that is silent for as long as a window."""
    rows = []
    for name, found in silences.items():
        silent = [frames >= round(WINDOW * FRAME_RATE) for frames in found]
        rows.append({"data": name, "training pairs": len(silent), f"silent for {WINDOW:g} s": sum(silent)})
    return rows


def by_the_data(done: Done, silences: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A row of `signs` for what is known before the first step: whether a clip is silent for as long as a window."""
    found = {False: [], True: []}
    runs = {r.run: (e, r) for e, results in done if not e.guarded for r in results if r.variant in e.correlating}
    for e, r in (pair for pair in runs.values() if pair[1].seed not in CALIBRATING):
        found[max(silences[e.data]) >= round((e.window or 1.0) * FRAME_RATE)].append(r.non_finite)
    deaths = [bad["step"] for runs in found.values() for bad in runs if bad]
    leads = [bad["step"] for bad in found[True] if bad]
    return {
        "measurement": "silence in a clip, before training",
        "limit": "a window",
        "false alarms": f"{found[True].count(None)} of {sum(runs.count(None) for runs in found.values())} healthy runs",
        "announced": f"{len(leads)} of {len(deaths)} deaths",
        "steps before": describe(leads) if leads else "–",
    }


# --- the law in training ----------------------------------------------------------------------------------------------


def law_rows(done: Done) -> list[dict[str, Any]]:
    """RMS before scaling at every validation, predicted by mixing (7) from what the stage's parts have, and from the
    weights after LayerNorm and the alignment alone: a row for each variant, the largest errors over stages and over
    training, as ranges over seeds."""
    rows, judged = [], [ran for ran in done if ran[0].name in ("weak residual", "law")]
    for e, results, variant in ((*ran, variant) for ran in judged for variant in ran[0].variants):
        runs = [r.run for r in results if r.variant == variant.name]
        stages = list(enumerate(variant.cascade(e.layers).stages))
        row = {"data": e.data, "variant": variant.name, "layers": e.layers}
        row["mixing (7)"] = percent(
            [max(largest_error(run, s, i, by_weights=False) for i, s in stages) for run in runs]
        )
        worst = {i: [largest_error(run, s, i) for run in runs] for i, s in stages if s.projection_level is None}
        row |= {f"stage {i}": percent(errors) for i, errors in worst.items()}
        kept = [f"stage {i}" for i, errors in worst.items() if max(errors) <= 0.05]
        rows.append(row | {"within 5 %": ", ".join(kept) or "none"})
    return rows


def percent(shares: Sequence[float]) -> str:
    return f"{describe([100 * share for share in shares], 2)} %"


def largest_error(run: str, stage: StageConfig, i: int, *, by_weights: bool = True) -> float:
    """Of stage i, over the validations of a run, as a share of what is measured."""
    law, measured = (Run.open(run).metrics(split) for split in (LAW_ROWS, "val"))
    measured, errors = [row for row in measured if "event" not in row], []
    for predicted, row in zip(law, measured, strict=True):
        p, r, rho, m = (row[f"stage{i}/{name}"] for name in NAMES)
        p = stage.projection_weight * (predicted[f"stage{i}/projection_rms"] if by_weights else p)
        errors.append(abs(rms_before_scaling(p, r, stage.residual_weight, rho) / m - 1))
    return max(errors, default=nan)


def record(size: ExplosionSettings, music: Path, songs: Path, folder: Path, path: Path) -> None:
    """Run all experiments and write what they found: tables, and the results of those that verdicts are made from."""
    done, indices = run_all(size, music, songs, folder)
    silences = {name: silences_of(index) for name, index in indices.items()}
    deaths = [(e, runs) for e, runs in done if e.window or any(run.non_finite for run in runs)]
    tables = {
        "causes": cause_rows([ran for ran in done if ran[0].name in ("grid", "longer")]),
        "deaths": death_rows(deaths),
        "signs": [*signs(done), by_the_data(done, silences)],
        "law": law_rows(done),
        "silence": silence_rows(silences),
    }
    judged = [ran for ran in done if ran[0].name in JUDGED]
    rows = [{"data": e.data, "results": [slim(r) for r in results]} for e, results in judged]
    loops = [Result(**run) for row in rows if row["data"] == "loops" for run in row["results"]]
    claims = [dataclasses.asdict(verdict) for verdict in audit_gradients(loops)]
    write_record(path, rows, {"steps": size.steps, "window": WINDOW, "tables": tables, "claims": claims})
