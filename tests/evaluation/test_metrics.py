"""Metrics: ratios and moments of signals whose values are known, baselines and judgements against the formulas by
hand."""

import dataclasses
import math

import librosa
import numpy as np
import pytest
import torch
from torch import nn

from lib.audio.synth import render_song
from lib.codec.mdct import MdctCodec
from lib.data.latents import LatentPairs
from lib.evaluation.metrics import (
    advantage,
    band_rows,
    band_snr,
    baseline_losses,
    evaluate_fusion,
    fusions,
    hear,
    judge_fusion,
    judge_outputs,
    kurtosis,
    mean_judgement,
    merit,
    movement,
    survival,
)
from lib.model.cascade import Cascade, StageTrace
from lib.model.fusion import Fusion, FusionModel
from lib.model.masks import FIXED_MASKINGS, MaskingConfig
from lib.training.losses import LossConfig
from lib.util.stats import paired_comparison

RATE, N = 24_000, 24_000  # a whole second: every whole frequency falls on one bin


def sine(frequency: float, amplitude: float) -> torch.Tensor:
    return amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(N) / RATE)[None]


def test_band_snr_finds_the_ratio_of_each_band():
    reference = sine(500, 0.5) + sine(3000, 0.2)
    estimate = reference + sine(700, 0.05) + sine(3500, 0.002)  # 20 dB and 40 dB below
    assert band_snr(reference, estimate, (0, 1000, 5000)) == pytest.approx([20, 40], abs=0.01)


def test_band_snr_keeps_a_tone_on_an_edge_in_the_upper_band():
    reference, estimate = sine(500, 0.1) + sine(1000, 0.1), sine(500, 0.1)  # the tone at 1000 Hz is lost
    low, high = band_snr(reference, estimate, (100, 1000, 2000))
    assert low > 80
    assert high == pytest.approx(0, abs=0.01)


def test_band_snr_reads_edges_in_hz_of_the_given_rate():
    reference = sine(500, 0.5)  # at half the rate the same samples are 250 Hz
    ratios = band_snr(reference, 0.9 * reference, (0, 300, 1000), sample_rate=RATE // 2)
    assert ratios[0] == pytest.approx(20, abs=0.01)


def test_band_snr_of_an_empty_band_is_nan():
    reference = torch.zeros(1, N)
    assert math.isnan(band_snr(reference, sine(500, 0.1), (0, 1000))[0])


def test_band_snr_of_a_perfect_copy_is_huge_but_finite():
    ratio = band_snr(sine(500, 0.5), sine(500, 0.5), (0, 1000))[0]
    assert 200 < ratio < math.inf


def test_bands_are_rows_of_a_table():
    rows = [{"band (Hz)": "0 to 500", "SNR (dB)": "71"}, {"band (Hz)": "500 to 1000", "SNR (dB)": "no signal"}]
    assert band_rows([70.6, math.nan], (0, 500, 1000)) == rows


def test_what_survives_is_said_in_every_wording():
    assert survival([70.4, math.nan, 90.0]) == "signal to noise at least 70 dB"
    assert survival([70.4, 90.0], 60) == "signal to noise at least 70 dB; over 60 dB, its design: yes"
    assert survival([59.9, 90.0], 60) == "signal to noise at least 60 dB; over 60 dB, its design: no"
    assert survival([math.nan], 60) == "no signal"


def test_kurtosis_of_known_distributions():
    torch.manual_seed(0)
    normal = torch.randn(1_000_000)
    laplace = torch.distributions.Laplace(5.0, 2.0).sample((1_000_000,))  # neither shift nor scale matters
    assert kurtosis(normal) == pytest.approx(3, abs=0.05)
    assert kurtosis(laplace) == pytest.approx(6, abs=0.2)


def test_kurtosis_of_constructed_values():
    assert kurtosis(torch.tensor([1.0, -1.0]).repeat(8)) == pytest.approx(1)  # two points: the smallest there is
    one_in_ten = torch.zeros(10)
    one_in_ten[0] = 1  # a Bernoulli variable: (1 - 3p(1 - p)) / (p(1 - p)), p = 0.1
    assert kurtosis(one_in_ten) == pytest.approx((1 - 0.27) / 0.09, rel=1e-6)
    assert kurtosis(1000 + one_in_ten) == pytest.approx((1 - 0.27) / 0.09, rel=1e-3)


@pytest.fixture
def pairs():
    """Nine pairs `[8, 5]`, one more than a batch of the loader: a mean of batch means would be wrong."""
    generator = torch.Generator().manual_seed(3)
    return [tuple((i + 1) * torch.randn(8, 5, generator=generator) for _ in range(2)) for i in range(9)]


@pytest.fixture
def untrained(tiny_cascade):
    torch.manual_seed(1)
    return Cascade(tiny_cascade())


def mean_loss(pairs, output, loss: LossConfig) -> float:
    """The objective by hand, pair by pair; `output` maps input and target `[D, T]` to the output."""
    total = 0.0
    for input, target in pairs:
        fused = output(input, target)
        total += loss.input_weight * (fused - input).square().mean().item()
        total += loss.target_weight * (fused - target).square().mean().item()
    return total / len(pairs)


def test_baselines_are_what_the_formula_gives(pairs, untrained):
    loss = LossConfig(0.3, 0.5)
    losses = baseline_losses(pairs, loss, untrained)

    def rms(x):
        return x.square().mean().sqrt()

    def full_level(input, target):
        mean = (input + target) / 2
        return mean * ((rms(input) ** 2 + rms(target) ** 2) / 2).sqrt() / rms(mean)

    assert losses["input alone"] == pytest.approx(mean_loss(pairs, lambda i, t: i, loss), rel=1e-5)
    assert losses["target alone"] == pytest.approx(mean_loss(pairs, lambda i, t: t, loss), rel=1e-5)
    assert losses["plain average"] == pytest.approx(mean_loss(pairs, lambda i, t: (i + t) / 2, loss), rel=1e-5)
    assert losses["plain average at full level"] == pytest.approx(mean_loss(pairs, full_level, loss), rel=1e-5)
    cascade = untrained.eval()
    with torch.no_grad():
        own = mean_loss(pairs, lambda i, t: cascade(i[None], t[None])[0][0], loss)
    assert losses["untrained cascade"] == pytest.approx(own, rel=1e-4)


def test_the_plain_average_is_the_minimum_for_equal_weights_only(pairs, untrained):
    equal = baseline_losses(pairs, LossConfig(0.3, 0.3), untrained)
    assert min(equal, key=equal.get) == "plain average"
    leaning = baseline_losses(pairs, LossConfig(1.0, 0.0), untrained)
    assert min(leaning, key=leaning.get) == "input alone"
    assert leaning["input alone"] == 0


def test_baselines_are_measured_without_dropout(pairs, untrained):
    first, second = (baseline_losses(pairs, LossConfig(), untrained.train()) for _ in range(2))
    assert first == second


# --- how a model fuses ------------------------------------------------------------------------------------------------


class Answer(nn.Module):
    """A model without stages, whose output is a function of its latents."""

    def __init__(self, output):
        super().__init__()
        self.output = output
        self.weight = nn.Parameter(torch.zeros(()))  # says which device it is on

    def forward(self, input, target):
        return Fusion(self.output(input, target), (), None)


def by_hand(output: np.ndarray, input: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The metrics of one pair `[D, T]`."""

    def rms(x):
        return np.sqrt((x**2).mean())

    def moves(x):
        return np.sqrt((x**2).mean(axis=0)).std()

    errors = {"input_mse": ((output - input) ** 2).mean(), "target_mse": ((output - target) ** 2).mean()}
    return errors | {
        "mse": sum(errors.values()) / 2,
        "input_correlation": np.corrcoef(output.ravel(), input.ravel())[0, 1],
        "target_correlation": np.corrcoef(output.ravel(), target.ravel())[0, 1],
        "rms_ratio": rms(output) / np.sqrt((rms(input) ** 2 + rms(target) ** 2) / 2),
        "movement_ratio": moves(output) / ((moves(input) + moves(target)) / 2),
    }


def test_evaluate_fusion_is_what_the_formulas_give(tiny_index, tiny_cascade):
    """Nine pairs, one more than a batch takes; dropout is off although the model comes in training mode."""
    torch.manual_seed(1)
    model = FusionModel(tiny_cascade(residual_weight=0.3), MaskingConfig("learned")).train()
    pairs = LatentPairs(tiny_index, "val")
    found = evaluate_fusion(model, pairs)
    model.eval()
    rows = []
    for input, target in (pairs[i] for i in range(9)):
        with torch.no_grad():
            output, traces, masks = model(input[None], target[None])
        row = by_hand(*(x.double().numpy() for x in (output[0], input, target)))
        row["complementarity"] = 1 - (masks.input * masks.target).mean().item()
        for i, trace in enumerate(traces):
            row |= {f"stage{i}/{name}": value.item() for name, value in vars(trace).items()}
        rows.append(row)
    wanted = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
    assert set(found) == set(wanted)
    assert {f.name for f in dataclasses.fields(StageTrace)} == {n[7:] for n in found if n.startswith("stage1/")}
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    for name in ("input_correlation", "target_mse", "movement_ratio", "stage1/target_scale"):
        values = [row[name] for row in rows]
        mean_of_batch_means = (np.mean(values[:8]) + values[8]) / 2
        assert abs(mean_of_batch_means / found[name] - 1) > 1e-3, name  # the tolerance tells them apart


def test_a_model_that_gives_its_input_back(tiny_index):
    pairs = LatentPairs(tiny_index, "val")
    found = evaluate_fusion(Answer(lambda input, target: input), pairs)
    assert found["input_correlation"] == pytest.approx(1, abs=1e-6)
    assert found["input_mse"] == 0
    assert abs(found["target_correlation"]) < 0.2
    assert found["mse"] == pytest.approx(found["target_mse"] / 2)
    assert found["rms_ratio"] == pytest.approx(1, abs=0.05)
    assert found["movement_ratio"] == pytest.approx(1, abs=0.1)


def test_an_output_that_stands_still_does_not_move(tiny_index):
    pairs = LatentPairs(tiny_index, "val")
    found = evaluate_fusion(Answer(lambda input, target: torch.full_like(input, 3.0)), pairs)
    assert found["movement_ratio"] == pytest.approx(0, abs=1e-6)
    assert found["input_correlation"] == found["target_correlation"] == 0
    doubled = evaluate_fusion(Answer(lambda input, target: 2 * input), pairs)
    assert doubled["movement_ratio"] == pytest.approx(2, abs=0.2)


def test_movement_is_the_standard_deviation_of_the_frames_rms():
    latents = torch.ones(2, 4, 6)
    latents[1, :, ::2] = 3.0  # frames of RMS 3 and 1 in turn
    assert movement(latents).tolist() == pytest.approx([0, 1])


def test_without_masks_there_is_no_complementarity(tiny_index, tiny_cascade):
    pairs = LatentPairs(tiny_index, "val")
    assert "complementarity" not in evaluate_fusion(FusionModel(tiny_cascade()), pairs)
    apart = evaluate_fusion(FusionModel(tiny_cascade(), MaskingConfig("channel")), pairs)
    assert apart["complementarity"] == pytest.approx(1.0)


def test_evaluation_leaves_weights_and_gradients_alone(tiny_index, tiny_cascade):
    model = FusionModel(tiny_cascade())
    before = {name: value.clone() for name, value in model.eval().state_dict().items()}
    first, second = (evaluate_fusion(model.train(), LatentPairs(tiny_index, "val")) for _ in range(2))
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# --- by ear -----------------------------------------------------------------------------------------------------------

SECONDS = 4
FIELDS = ("rhythm", "harmony", "merit", "input_envelope", "target_envelope", "input_mel", "target_mel", "rms_ratio")
BASELINES = ("input", "target", "average of waveforms", "average of latents")


@pytest.fixture(scope="module")
def clips() -> list[torch.Tensor]:
    """Four songs through the codec, as latents `[128, 300]`."""
    songs = np.stack([render_song(0, i, SECONDS * RATE) for i in range(4)])
    return list(MdctCodec().encode(torch.from_numpy(songs).float()[:, None]))


@pytest.fixture(scope="module")
def wavs(clips) -> list[torch.Tensor]:
    """The same as sound `[1, N]`."""
    return [MdctCodec().decode(clip[None])[0] for clip in clips]


def harmony_by_hand(x: torch.Tensor, y: torch.Tensor) -> float:
    shares = []
    for wav in (x, y):
        power = np.abs(librosa.stft(wav[0].numpy(), n_fft=4096, hop_length=1280)) ** 2
        classes = librosa.filters.chroma(sr=RATE, n_fft=4096) @ power
        shares.append((classes / classes.sum(axis=0) - 1 / 12).ravel())
    return shares[0] @ shares[1] / np.linalg.norm(shares[0]) / np.linalg.norm(shares[1])


def rhythm_by_hand(x: torch.Tensor, y: torch.Tensor) -> float:
    strengths = []
    for wav in (x, y):
        decibels = librosa.power_to_db(librosa.feature.melspectrogram(y=wav[0].numpy(), sr=RATE, hop_length=320))
        strengths.append(np.maximum(np.diff(decibels), 0).mean(axis=0)[:-3])  # librosa delays by three frames
    return np.corrcoef(*strengths)[0, 1]


def test_a_judgement_is_what_the_formulas_give(wavs):
    input, target, output = wavs[0], wavs[1], 0.5 * wavs[0] + 0.3 * wavs[1] + 0.4 * wavs[2]
    found = judge_fusion(*(hear(wav) for wav in (output, input, target)))

    def curve(wav):
        return np.sqrt((wav[0].double().numpy().reshape(250, -1) ** 2).mean(axis=1))

    def mel_db(wav):
        power = librosa.feature.melspectrogram(
            y=wav[0].numpy(), sr=RATE, n_fft=1024, hop_length=320, n_mels=64, pad_mode="constant"
        )
        return 10 * np.log10(power + 1e-8)

    def level(wav):
        return np.sqrt((wav.double().numpy() ** 2).mean())

    moves = [np.std(curve(wav), ddof=1) / curve(wav).mean() for wav in (output, input, target)]
    wanted = {
        "harmony": harmony_by_hand(output, target),
        "input_envelope": np.corrcoef(curve(output), curve(input))[0, 1],
        "target_envelope": np.corrcoef(curve(output), curve(target))[0, 1],
        "input_mel": np.abs(mel_db(output) - mel_db(input)).mean(),
        "target_mel": np.abs(mel_db(output) - mel_db(target)).mean(),
        "rms_ratio": level(output) / np.sqrt((level(input) ** 2 + level(target) ** 2) / 2),
        "movement_ratio": moves[0] / ((moves[1] + moves[2]) / 2),
    }
    wanted["merit"] = 2 * found["rhythm"] * wanted["harmony"] / (found["rhythm"] + wanted["harmony"])
    assert set(found) == {*wanted, "rhythm"} == {*FIELDS, "movement_ratio"}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=2e-3)
    # librosa cuts quiet bands 80 dB below the loudest one and pads the start, hence no closer
    assert found["rhythm"] == pytest.approx(rhythm_by_hand(output, input), abs=0.02)
    assert abs(rhythm_by_hand(output, target) - found["rhythm"]) > 0.1
    assert abs(harmony_by_hand(output, input) - found["harmony"]) > 0.05


def test_a_copy_of_the_input_has_its_rhythm_and_the_harmony_of_an_unrelated_song(wavs):
    """So its merit is near 0, and that of a copy of the target likewise."""
    heard = [hear(wav) for wav in wavs]
    for input in range(4):
        target = (input + 1) % 4
        copy = judge_fusion(heard[input], heard[input], heard[target])
        assert copy["rhythm"] == pytest.approx(1, abs=1e-6)
        assert copy["input_envelope"] == pytest.approx(1, abs=1e-6)
        assert copy["input_mel"] == 0
        assert copy["harmony"] == pytest.approx(harmony_by_hand(wavs[input], wavs[target]), abs=1e-3)
        assert copy["harmony"] < 0.35
        other = judge_fusion(heard[target], heard[input], heard[target])
        assert other["harmony"] == pytest.approx(1, abs=1e-6)
        assert other["rhythm"] < 0.5
        assert max(copy["merit"], other["merit"]) < 0.6


@pytest.mark.parametrize(
    ("rhythm", "harmony", "wanted"),
    [
        (1.0, 1.0, 1.0),
        (0.5, 0.5, 0.5),
        (1.0, 0.5, 2 / 3),
        (0.9, 0.1, 0.18),
        (1.0, 0.0, 0.0),
        (-0.5, 0.9, 0.0),
        (0.9, -0.5, 0.0),
        (-0.9, -0.8, 0.0),
        (0.0, 0.0, 0.0),
    ],
)
def test_merit_is_the_harmonic_mean(rhythm, harmony, wanted):
    assert merit(rhythm, harmony) == pytest.approx(wanted)


def test_a_constant_tone_does_not_move(wavs):
    steady = sine(1000, 0.3)
    swelling = sine(1000, 0.3) * torch.linspace(0, 2, N)  # deviates from its mean by 1/√3 of it
    assert hear(steady).movement < 1e-4
    assert hear(swelling).movement == pytest.approx(1 / math.sqrt(3), rel=0.01)
    still = judge_fusion(hear(steady), hear(swelling), hear(swelling))
    assert still["movement_ratio"] < 1e-3


def test_twice_the_sound_has_twice_the_rms_and_the_same_shape(wavs):
    input = hear(wavs[0])
    found = judge_fusion(hear(2 * wavs[0]), input, input)
    assert found["rms_ratio"] == pytest.approx(2, rel=1e-5)
    assert found["movement_ratio"] == pytest.approx(1, rel=1e-4)
    assert found["rhythm"] == pytest.approx(1, abs=1e-3)
    assert found["harmony"] == pytest.approx(1, abs=1e-3)
    assert 3 < found["input_mel"] < 20 * math.log10(2)  # 6 dB, and less where the floor lies
    tones = sine(500, 0.3) + 0.01 * torch.randn(1, N, generator=torch.Generator().manual_seed(0))
    found = judge_fusion(hear(2 * tones), hear(tones), hear(4 * tones))
    assert (found["input_mel"], found["target_mel"]) == pytest.approx((20 * math.log10(2),) * 2, rel=1e-2)


@pytest.mark.parametrize("silent", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_silence_is_judged_with_finite_numbers_and_is_like_nothing(wavs, silent):
    heard = [hear(torch.zeros_like(wav) if i in silent else wav) for i, wav in enumerate(wavs[:3])]
    found = judge_fusion(*heard)
    assert all(math.isfinite(value) for value in found.values())
    if 0 in silent:
        assert found["rhythm"] == found["harmony"] == found["merit"] == 0
        assert found["rms_ratio"] == 0


def test_silence_at_the_same_time_is_no_common_harmony(wavs):
    """Two songs that pause together are as alike as before."""
    pause = torch.cat([torch.ones(N), torch.zeros(3 * N)])
    whole, paused = (judge_fusion(*(hear(gate * wav) for wav in wavs[:3])) for gate in (1, pause))
    first = judge_fusion(*(hear(wav[:, :N]) for wav in wavs[:3]))
    assert paused["harmony"] == pytest.approx(first["harmony"], abs=0.1)
    assert whole["harmony"] < 0.5


def test_fusions_are_the_baselines_and_then_the_models(clips):
    input, target = clips[:2]
    decode = MdctCodec().decode
    models = {"louder target": Answer(lambda i, t: 0.2 * i + 0.8 * t), "swapped": Answer(lambda i, t: t)}
    found = dict(fusions(input, target, MdctCodec(), models))
    assert tuple(found) == (*BASELINES, *(f"{kind} masks" for kind in FIXED_MASKINGS), *models)
    assert FIXED_MASKINGS == ("temporal", "frequency", "channel", "energy", "hybrid")
    first, second = decode(input[None])[0], decode(target[None])[0]
    wanted = {
        "input": first,
        "target": second,
        "average of waveforms": (first + second) / 2,
        "average of latents": decode((input + target)[None] / 2)[0],
        "louder target": decode((0.2 * input + 0.8 * target)[None])[0],
        "swapped": second,
    }
    upper = torch.arange(128)[:, None] >= 64
    late = torch.arange(300) // 25 % 2 == 1
    of_target = {
        "temporal": late.expand(128, 300),
        "frequency": upper.expand(128, 300),
        "channel": (torch.arange(128)[:, None] % 2 == 1).expand(128, 300),
        "hybrid": late != upper,
    }
    wanted |= {f"{kind} masks": decode(torch.where(m, target, input)[None])[0] for kind, m in of_target.items()}
    for name, wav in wanted.items():
        torch.testing.assert_close(found[name], wav, rtol=1e-4, atol=1e-5, msg=name)
    assert found["energy masks"].isfinite().all()
    sounds = [found[name] for name in found if name != "swapped"]
    closest = min((x - y).square().mean().sqrt().item() for i, x in enumerate(sounds) for y in sounds[:i])
    assert closest > 1e-3  # no two of them are the same


def test_the_energy_masking_takes_the_louder_clip(clips):
    quiet = dict(fusions(clips[0], 0.01 * clips[1], MdctCodec(), {}))
    torch.testing.assert_close(quiet["energy masks"], quiet["input"], rtol=0, atol=0.02)


def test_a_model_fuses_without_dropout(clips):
    class Loud(Answer):
        def forward(self, input, target):
            return Fusion(input if not self.training else 0 * input, (), None)

    model = Loud(None).train()
    found = dict(fusions(clips[0], clips[1], MdctCodec(), {"model": model}))
    assert torch.equal(found["model"], found["input"])


def test_every_pair_is_judged_against_its_own_clips(clips):
    pairs = [(clips[0], clips[1]), (clips[2], clips[3])]
    judged = judge_outputs(pairs, MdctCodec(), {"model": Answer(lambda i, t: (2 * i + t) / 3)})
    assert tuple(judged) == (*BASELINES, *(f"{kind} masks" for kind in FIXED_MASKINGS), "model")
    assert all(len(rows) == 2 for rows in judged.values())
    for number, (input, target) in enumerate(pairs):
        heard = {name: hear(wav) for name, wav in fusions(input, target, MdctCodec(), {})}
        for name in BASELINES:
            assert judged[name][number] == judge_fusion(heard[name], heard["input"], heard["target"])
        model = hear(MdctCodec().decode((2 * input + target)[None] / 3)[0])
        by_hand = judge_fusion(model, heard["input"], heard["target"])
        assert judged["model"][number] == pytest.approx(by_hand, rel=1e-4, abs=1e-6)
        assert judged["input"][number]["rhythm"] == pytest.approx(1, abs=1e-6)
        assert judged["target"][number]["harmony"] == pytest.approx(1, abs=1e-6)
    assert judged["model"][0] != judged["model"][1]
    means = mean_judgement(judged["model"])
    first, second = judged["model"]
    assert means == pytest.approx({name: (first[name] + second[name]) / 2 for name in first})


def test_an_advantage_is_of_the_merit_and_clustered_by_song():
    merits = {"model": (0.9, 0.8, 0.7, 0.4), "average": (0.5, 0.6, 0.1, 0.1)}
    judged = {name: [{"merit": merit, "rhythm": 0.0} for merit in values] for name, values in merits.items()}
    songs = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "z")]
    found = advantage(judged, "model", "average", songs)
    differences = [a - b for a, b in zip(*merits.values(), strict=True)]
    assert found == paired_comparison(differences, "aabb", "xyxz")
    assert found.mean == pytest.approx(0.375)
    assert advantage(judged, "average", "model", songs).mean == pytest.approx(-0.375)
    with pytest.raises(ValueError, match="zip"):
        advantage(judged, "model", "average", songs[:-1])
