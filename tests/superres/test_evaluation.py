"""Log-spectral distance against hand-made spectra, and what each method of the comparison is given."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.lab.claims import REFUTED, REPRODUCED
from lib.superres import evaluation
from lib.superres.degradation import Degradation, Examples
from lib.superres.evaluation import (
    BASELINES,
    CUTOFFS,
    DRAWS,
    FLOOR,
    LOWEST_TENTH,
    METHODS,
    SEED,
    Evaluation,
    Score,
    audit_attention,
    evaluate,
    gains_in_words,
    lsd,
    nearer_than_all,
    score,
    spread_over_places,
)
from lib.superres.mel import SILENCE, bin_of, log_mel
from lib.superres.resolver import Restoration, SuperResolver, file_band, join_bands
from lib.util.stats import Comparison
from superres.conftest import CLIP, band, white

BINS = 1_025
QUICK = Restoration(steps=1)


# --- the distance -----------------------------------------------------------------------------------------------------


def test_a_clip_is_at_no_distance_from_itself():
    wav = white(20_000, channels=3)[:, None]
    for options in ({}, {"above": 4_000}, {"matched": True}, {"above": 12_000, "matched": True}):
        assert lsd(wav, wav, **options).tolist() == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("gain", [-20, 10, 20])
def test_a_gain_is_its_decades_and_nothing_once_levels_are_matched(gain):
    wav = white(20_000)[None]
    louder = 10 ** (gain / 20) * wav
    assert lsd(louder, wav).item() == pytest.approx(abs(gain) / 10, rel=1e-3)
    assert lsd(louder, wav, above=8_000).item() == pytest.approx(abs(gain) / 10, rel=1e-3)
    assert lsd(louder, wav, matched=True).item() == pytest.approx(0, abs=1e-3)
    assert lsd(louder, wav, above=8_000, matched=True).item() == pytest.approx(0, abs=1e-3)


@pytest.fixture
def spectra(monkeypatch) -> None:
    """`lsd` takes magnitudes `[B, 1025, T]` in place of waveforms."""
    monkeypatch.setattr(evaluation, "_magnitudes", lambda magnitudes: magnitudes)


def test_the_distance_by_hand(spectra):
    """A root over the bins of each frame, then a mean over frames."""
    reference = torch.full((2, BINS, 2), 10.0)
    estimate = reference.clone()
    estimate[0, 100:300, 0] *= 10  # 2 decades of power in 200 bins of the first frame
    estimate[0, 500:900, 1] *= 10**-0.5  # 1 decade in 400 bins of the second
    estimate[1, 7] *= 100  # 4 decades in one bin of both
    expected = [(math.sqrt(200 * 4 / BINS) + math.sqrt(400 / BINS)) / 2, math.sqrt(16 / BINS)]
    assert lsd(estimate, reference).tolist() == pytest.approx(expected, rel=1e-4)
    assert lsd(reference, estimate).tolist() == pytest.approx(expected, rel=1e-4)


def test_only_the_bins_from_a_frequency_up_are_compared(spectra):
    reference = torch.full((1, BINS, 3), 10.0)
    first = bin_of(12_000)
    assert first == 512
    below, above = reference.clone(), reference.clone()
    below[:, :first] *= 10
    above[:, first:] *= 10
    assert lsd(below, reference, above=12_000).item() == 0
    assert lsd(above, reference, above=12_000).item() == pytest.approx(2, rel=1e-4)
    assert lsd(above, reference, above=6_000).item() == pytest.approx(2 * math.sqrt(513 / (BINS - 256)), rel=1e-4)
    assert lsd(above, reference).item() == pytest.approx(2 * math.sqrt(513 / BINS), rel=1e-4)


def test_a_clip_is_compared_up_to_its_own_band(spectra):
    reference = torch.full((2, BINS, 3), 10.0)
    estimate = reference.clone()
    estimate[:, bin_of(12_000) + 1 :] *= 10
    tops = torch.tensor([12_000.0, 18_000.0])
    first, second = lsd(estimate, reference, above=6_000, below=tops).tolist()
    assert first == 0
    assert second == pytest.approx(2 * math.sqrt(256 / 513), rel=1e-4)  # of the bins 256 to 768


def test_levels_are_matched_by_the_lowest_tenth(spectra):
    assert LOWEST_TENTH == 102
    reference = torch.full((1, BINS, 2), 10.0)
    estimate = reference.clone()
    estimate[:, :LOWEST_TENTH] *= 10
    expected = 2 * math.sqrt((BINS - LOWEST_TENTH) / BINS)  # the others are too soft then
    assert lsd(estimate, reference, matched=True).item() == pytest.approx(expected, rel=1e-4)
    estimate = reference.clone()
    estimate[:, LOWEST_TENTH] *= 10
    assert lsd(estimate, reference, matched=True).item() == pytest.approx(2 * math.sqrt(1 / BINS), rel=1e-4)
    assert lsd(torch.zeros_like(reference), reference, matched=True).isfinite().all()


def test_what_16_bits_cannot_hold_does_not_count():
    silence = torch.zeros(1, 1, 40_000)
    rounding = (white(40_000)[None] * 2**15).round() / 2**15 - white(40_000)[None]
    power = evaluation._magnitudes(rounding).square().mean()
    assert power.item() == pytest.approx(FLOOR, rel=0.05)
    assert lsd(silence, silence).item() == 0
    assert lsd(silence, silence, matched=True).item() == 0
    assert lsd(1e-3 * rounding, silence).item() == 0
    assert 0 < lsd(rounding, silence).item() < 0.4
    music = white(40_000)[None]
    level = evaluation._magnitudes(music).square().mean().item()
    assert lsd(silence, music).item() == pytest.approx(math.log10(level / FLOOR), abs=0.5)
    assert lsd(music, silence).item() == lsd(silence, music).item()


# --- the comparison ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(resolver, library):
    return evaluate(resolver, library, QUICK, clips=3, cutoffs=(4_000, 8_000))


def score_of(compared: Evaluation, method: str, cutoff: int) -> Score:
    (found,) = (s for s in compared.scores if (s.method, s.cutoff) == (method, cutoff))
    return found


def test_every_method_is_scored_at_every_cutoff(compared, library):
    methods = ["sinc", "envelope", "replication", "ridge", "model", "draw", "mean of draws"]
    methods += ["autoencoder", "vocoder"]
    assert [*methods, "griffin-lim"] == list(METHODS)  # the last one beside a trained vocoder
    assert [(s.cutoff, s.method) for s in compared.scores] == [(c, m) for c in (4_000, 8_000) for m in methods]
    assert set(compared.sounds) == {4_000, 8_000}
    for cutoff, sounds in compared.sounds.items():
        assert set(sounds) == {*methods, "original"}
        for wav in sounds.values():
            assert wav.shape == (3, 1, CLIP)
            assert wav.isfinite().all()
        songs = [Examples(library, "val", 3, CLIP, SEED).song(i) for i in range(3)]
        tops = torch.tensor([file_band(song) for song in songs])
        expected = score(cutoff, sounds, tops, [song.sha256 for song in songs])
        assert [s for s in compared.scores if s.cutoff == cutoff] == expected
    assert CUTOFFS == (2_000, 4_000, 8_000, 12_000, 16_000)


def test_a_clip_is_judged_where_its_file_has_a_band(resolver, library, monkeypatch):
    """Of a clip without a band of 1 kHz above the cutoff, and of a cutoff without a clip, nothing is said."""
    monkeypatch.setattr(evaluation, "file_band", lambda song: 4_900.0)
    assert evaluate(resolver, library, QUICK, clips=2, cutoffs=(4_000,)).scores == ()
    monkeypatch.setattr(evaluation, "file_band", lambda song: 5_000.0)
    found = evaluate(resolver, library, QUICK, clips=2, cutoffs=(4_000, 8_000))
    assert {s.cutoff for s in found.scores} == set(found.sounds) == {4_000}
    sounds = found.sounds[4_000]
    own = lsd(sounds["sinc"], sounds["original"], above=4_000, below=torch.full((2,), 5_000.0))
    assert score_of(found, "sinc", 4_000).upper[0] == pytest.approx(own.mean().item())
    whole = lsd(sounds["sinc"], sounds["original"], above=4_000)
    assert score_of(found, "sinc", 4_000).upper[0] != pytest.approx(whole.mean().item(), rel=1e-2)


def test_all_methods_have_the_same_clips_degraded_alike(compared, library):
    for cutoff, sounds in compared.sounds.items():
        examples = Examples(library, "val", 3, CLIP, SEED, Degradation(cutoff))
        assert torch.equal(sounds["original"], torch.stack([examples[i][0] for i in range(3)]))
        assert torch.equal(sounds["sinc"], torch.stack([examples[i][1] for i in range(3)]))
    assert torch.equal(*(compared.sounds[cutoff]["original"] for cutoff in (4_000, 8_000)))
    sinc, bound = (score_of(compared, method, 4_000).upper[0] for method in ("sinc", "vocoder"))
    assert bound < 0.5 * sinc  # an upper band is nearer than none


def test_a_score_is_mean_and_error_of_distances_and_of_gains():
    reference = white(20_000, channels=4)[:, None]
    estimate = reference * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None] + 0.3 * white(20_000, seed=9)
    made = {name: reference / (i + 2) + 0.1 * white(20_000, seed=i) for i, name in enumerate(BASELINES)}
    made |= {"model": estimate, "original": reference}
    tops = torch.tensor([24_000.0, 20_000.0, 18_000.0, 9_000.0])

    def scored(method: str, songs: str) -> Score:
        (found,) = (s for s in score(6_000, made, tops, songs) if s.method == method)
        return found

    found = scored("model", "abcd")
    assert (found.method, found.cutoff, found.clips, found.songs) == ("model", 6_000, 4, 4)
    options = {"above": 6_000, "below": tops}
    own, matched = (lsd(estimate, reference, **options, matched=matched) for matched in (False, True))
    for pair, distances in ((found.upper, own), (found.upper_matched, matched)):
        assert pair == pytest.approx((distances.mean().item(), distances.std().item() / 2), rel=1e-4)
    assert list(found.gains) == list(BASELINES)
    for name, pair in found.gains.items():
        gains = lsd(made[name], reference, **options) - own
        assert pair == pytest.approx((gains.mean().item(), gains.std().item() / 2), rel=1e-4)
    assert scored("ridge", "abcd").gains["ridge"] == (0, 0)
    songs = scored("model", "aabb")
    assert songs.upper[0] == found.upper[0]
    of_songs = own.view(2, 2).mean(dim=1)  # two draws, not four
    assert songs.upper[1] == pytest.approx(of_songs.std().item() / math.sqrt(2), rel=1e-4)
    assert scored("model", "aaaa").upper[1] == math.inf


def gained(cutoff: int, gain: float, method: str = "model", songs: int = 6, other: float = 0.0) -> Score:
    pair = (0.0, 0.0)
    return Score(method, cutoff, 16, songs, pair, pair, {"ridge": (gain, 1.0), "sinc": (other, 1.0)})


def test_a_gain_is_compared_over_songs():
    assert gained(4_000, 3.0).against("ridge") == Comparison(3.0, 1.0, 6)
    assert [gained(4_000, 3.0, songs=songs).against("ridge").verdict for songs in (6, 2)] == [1, 0]


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ((3, 3), "beats ridge at 2, 12 kHz"),
        ((-3, -3), "loses to ridge at 2, 12 kHz"),
        ((1, -1), "no statistically significant difference from ridge at 2, 12 kHz"),
        ((-3, 3), "beats ridge at 12 kHz; loses to ridge at 2 kHz"),
        ((3, 0), "beats ridge at 2 kHz; no statistically significant difference from ridge at 12 kHz"),
    ],
)
def test_every_cutoff_and_every_baseline_is_in_the_summary(gains, said):
    scores = [gained(cutoff, gain, other=9) for cutoff, gain in zip((2_000, 12_000), gains, strict=True)]
    others = [gained(2_000, 9, "vocoder"), gained(12_000, -9, "sinc")]
    assert gains_in_words([others[0], *scores, others[1]]) == f"{said}; beats sinc at 2, 12 kHz"
    assert gains_in_words(others, "vocoder").startswith("beats ridge at 2 kHz;")


def test_without_steps_nothing_is_drawn(resolver, library):
    found = evaluate(resolver, library, Restoration(), clips=2, cutoffs=(4_000,))
    assert {"draw", "mean of draws"}.isdisjoint(found.sounds[4_000])
    assert score_of(found, "model", 4_000).upper[0] > 0


def test_nearer_than_all_is_significantly_nearer_than_every_one():
    scores = [gained(2_000, 3, other=9), gained(4_000, -3, other=9), gained(8_000, 0.1, other=9), gained(9_000, 3)]
    scores.append(gained(12_000, 3, "vocoder", other=9))
    assert nearer_than_all(scores) == scores[:1]
    assert nearer_than_all(scores, "vocoder") == scores[4:]


class Recording(SuperResolver):
    """Predicts one mel for each set of conditions, and gives the mels it is to make sound of."""

    device = torch.device("cpu")

    def __init__(self, resolver: SuperResolver, vocoder: str | None):
        self.vocoder, self.completion = vocoder, resolver.completion
        self.vae, self.clip_length, self.mels, self.asked = resolver.vae, resolver.clip_length, [], []

    def predict_mel(self, low: Tensor, cutoff: float, settings=None, numbers=None) -> Tensor:
        self.asked.append((cutoff, settings))
        return torch.full((len(low), 1, 256, CLIP // 480), float(len(self.asked)))

    def vocode(self, mel: Tensor, low: Tensor, cutoff: float, settings=None, numbers=None, neural=True) -> Tensor:
        self.mels.append((mel, cutoff, settings, neural))
        return torch.zeros_like(low)


@pytest.mark.parametrize("vocoder", [None, "trained"])
def test_each_method_is_given_its_mel(resolver, library, vocoder):
    fake, settings = Recording(resolver, vocoder), Restoration(seed=5, steps=3)
    sounds = evaluate(fake, library, settings, clips=2, cutoffs=(4_000,)).sounds[4_000]
    draws = [(4_000, dataclasses.replace(settings, seed=5 + i)) for i in range(DRAWS)]
    assert fake.asked == [(4_000, dataclasses.replace(settings, steps=0)), *draws]
    assert all((cutoff, given) == (4_000, settings) for _, cutoff, given, _ in fake.mels)
    order = ["envelope", "ridge", "model", "autoencoder", "vocoder", "draw", "mean of draws"]
    order += ["griffin-lim"] * (vocoder is not None)
    assert [trained for *_, trained in fake.mels] == [name != "griffin-lim" for name in order]
    mels = dict(zip(order, [mel for mel, *_ in fake.mels], strict=True))
    assert set(sounds) == {"original", "sinc", "replication", *order}
    original, statistics = log_mel(sounds["original"]), resolver.completion.statistics
    assert torch.equal(mels["vocoder"], original)
    assert vocoder is None or torch.equal(mels["griffin-lim"], original)
    with torch.no_grad():
        assert torch.equal(mels["autoencoder"], resolver.vae.decode(resolver.vae.encode(original)))
    assert mels["model"].unique().tolist() == [1]
    assert mels["draw"].unique().tolist() == [2]
    assert mels["mean of draws"].unique().tolist() == [(DRAWS + 3) / 2]
    assert torch.equal(mels["envelope"], statistics.mean[:, None].expand_as(original))
    assert torch.equal(mels["ridge"], statistics.predicted(log_mel(sounds["sinc"]), 4_000))
    low = torch.stack([Examples(library, "val", 2, CLIP, SEED, Degradation(4_000))[i][1] for i in range(2)])
    assert torch.equal(sounds["sinc"], low)
    replicated = join_bands(low, statistics.replicated(low, 4_000), 4_000)
    assert torch.equal(sounds["replication"], replicated)
    for name in (*mels, "replication"):  # below the cutoff every one has the clip's own band
        difference = sounds[name] - sounds["sinc"]
        assert band(difference, 0, 3_000).square().mean() < 1e-4 * sounds["sinc"].square().mean()


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_mel_spectrograms_share_one_scale():
    mels = {f"clip {i}": torch.full((256, 50), -float(i)) for i in range(4)}
    figure = evaluation.mel_spectrograms(mels)
    axes = [axis for axis in figure.axes if axis.images and axis.get_visible() and axis.get_title()]
    assert [axis.get_title() for axis in axes] == list(mels)
    for axis, mel in zip(axes, mels.values(), strict=True):
        (image,) = axis.images
        assert np.array_equal(image.get_array(), mel.numpy())
        assert image.get_clim() == (SILENCE, evaluation.LOUDEST)
        assert image.get_extent()[1] == pytest.approx(0.5)  # seconds
    labels = [label.get_text() for label in axes[0].get_yticklabels()]  # at the left of a row
    assert labels == ["2,000", "4,000", "8,000", "12,000", "16,000"]
    sine = torch.sin(2 * torch.pi * 8_000 * torch.arange(48_000) / 48_000)[None, None]
    assert int(axes[0].get_yticks()[2]) == log_mel(sine)[0, 0, :, 50].argmax()


def test_tables_show_every_score():
    scores = [
        Score(method, c, 4, 6, (3.0 + c / 1e4, 0.125), (4.0, 0.1), {"sinc": (0.5, 0.1), "ridge": (-c / 1e4, 0.1)})
        for c in (2_000, 12_000)
        for method in ("sinc", "model")
    ]
    assert evaluation.upper_rows(scores) == [
        {"method": method, "2 kHz": "3.20 ± 0.12", "12 kHz": "4.20 ± 0.12"} for method in ("sinc", "model")
    ]
    matched = evaluation.upper_rows(scores, "upper_matched")
    assert matched[0] == {"method": "sinc", "2 kHz": "4.00 ± 0.10", "12 kHz": "4.00 ± 0.10"}


# --- what source document 004 claims of attention ---------------------------------------------------------------------


def test_attention_is_judged_by_what_places_receive():
    same, other = torch.randn(8, 1, 1).expand(8, 4, 6), torch.randn(8, 4, 6)
    pooled, sequence = (verdict.verdict for verdict in audit_attention(same, other))
    assert (pooled, sequence) == (REFUTED, REPRODUCED)
    said = [verdict.measured for verdict in audit_attention(same, other)]
    assert said[0] == "every place receives the same"
    assert said[1].startswith("places differ by 9")  # per cent: almost all of it
    pooled, sequence = (verdict.verdict for verdict in audit_attention(other, same))
    assert (pooled, sequence) == (REPRODUCED, REFUTED)


def test_the_spread_is_relative_to_what_is_received():
    """Values m ± d everywhere: d over √(m² + d²), whatever their size."""
    values = torch.tensor([3.0 + 1.0, 3.0 - 1.0]).view(1, 1, 2)
    assert spread_over_places(values) == pytest.approx(1 / 10**0.5)
    assert spread_over_places(1000 * values) == pytest.approx(1 / 10**0.5)
    assert spread_over_places(torch.full((2, 3, 3), 5.0)) == 0
