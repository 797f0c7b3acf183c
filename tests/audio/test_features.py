"""Features of sound against librosa's, against signals whose onsets and pitches are known, and their gradients."""

import math

import librosa
import numpy as np
import pytest
import torch
from torch import Tensor

import lib.audio.features
from lib.audio.features import CHROMA_FFT, HIGHEST_NOTE, HIT_BANDS, HOP, LOWEST_NOTE, Sound, correlation
from lib.audio.files import SAMPLE_RATE
from lib.audio.synth import render_song

SECONDS = 4


def envelope(wav: Tensor) -> Tensor:
    return Sound(wav).envelope


def log_mel(wav: Tensor) -> Tensor:
    return Sound(wav).log_mel


def chroma(wav: Tensor) -> Tensor:
    return Sound(wav).chroma


def hits(wav: Tensor) -> Tensor:
    return Sound(wav).hits


def tones(wav: Tensor) -> Tensor:
    return Sound(wav).tones


def notes(wav: Tensor) -> Tensor:
    return Sound(wav).notes


def onset_envelope(wav: Tensor) -> Tensor:
    return Sound(wav).onsets


def rhythm_similarity(x: Tensor, y: Tensor) -> Tensor:
    return correlation(onset_envelope(x), onset_envelope(y))


def harmony_similarity(x: Tensor, y: Tensor) -> Tensor:
    return lib.audio.features.harmony_similarity(Sound(x), Sound(y))


FEATURES = (envelope, log_mel, onset_envelope, hits, tones, chroma, notes)
SIMILARITIES = (harmony_similarity, rhythm_similarity)


@pytest.fixture(scope="module")
def songs() -> np.ndarray:
    """`[4, N]`, float32."""
    return np.stack([render_song(0, i, SECONDS * SAMPLE_RATE) for i in range(4)]).astype(np.float32)


@pytest.fixture(scope="module")
def wavs(songs) -> Tensor:
    """`[4, 1, N]`"""
    return torch.from_numpy(songs)[:, None]


def tone(frequency: float, seconds: float = 2.0, amplitude: float = 0.3) -> Tensor:
    """`[1, 1, N]`"""
    time = torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return amplitude * torch.sin(2 * math.pi * frequency * time)[None, None]


# --- envelopes and their correlation ----------------------------------------------------------------------------------


def test_envelope_is_the_rms_of_250_equal_segments():
    wav = torch.zeros(2, 1, 501)  # segments of two samples; the last sample is left over
    wav[0, 0, :2] = torch.tensor([3.0, -4.0])
    wav[1, 0, 498:500] = 2.0
    wav[:, 0, 500] = 100.0
    wanted = torch.zeros(2, 250)
    wanted[0, 0], wanted[1, 249] = math.sqrt(12.5), 2.0
    assert envelope(wav).shape == (2, 250)
    torch.testing.assert_close(envelope(wav), wanted, rtol=1e-6, atol=2e-5)


def test_an_envelope_needs_a_sample_per_segment():
    assert torch.equal(envelope(torch.full((1, 1, 250), 2.0)), torch.full((1, 250), 2.0))
    with pytest.raises(ValueError, match="at least 250 samples, got 249"):
        envelope(torch.ones(1, 1, 249))


def test_correlation_is_pearsons():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 50)) + 7
    y = np.array([1.0, -1.0, 0.0])[:, None] * x + rng.standard_normal((3, 50))
    wanted = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)]
    assert correlation(torch.tensor(x), torch.tensor(y)).tolist() == pytest.approx(wanted, rel=1e-9)
    assert min(wanted) < -0.3
    assert max(wanted) > 0.3


def test_correlation_with_a_constant_is_0():
    assert correlation(torch.full((1, 50), 3.0), torch.randn(1, 50)).item() == 0


# --- rhythm -----------------------------------------------------------------------------------------------------------


def librosa_mel(wav: np.ndarray, n_fft: int = 1024) -> np.ndarray:
    return librosa.feature.melspectrogram(
        y=wav, sr=SAMPLE_RATE, n_fft=n_fft, hop_length=HOP, n_mels=64, pad_mode="constant"
    )


def test_log_mel_is_librosas(songs, wavs):
    assert SAMPLE_RATE / HOP == 75
    for song, mine in zip(songs, log_mel(wavs), strict=True):
        theirs = np.log(librosa_mel(song) + 1e-8)
        assert mine.shape == theirs.shape == (64, SECONDS * 75 + 1)
        np.testing.assert_allclose(mine, theirs, atol=3e-3)
        assert np.abs(np.log(librosa_mel(song, 1000) + 1e-8) - theirs).max() > 1  # far from any other transform


def test_log_mel_is_in_nepers_of_power(wavs):
    louder = log_mel(10 * wavs) - log_mel(wavs)
    loud = log_mel(wavs) > -5  # well above the floor
    assert loud.float().mean() > 0.2
    torch.testing.assert_close(louder[loud], torch.full_like(louder[loud], math.log(100)), rtol=1e-3, atol=0)
    assert log_mel(torch.zeros(1, 1, 3200)).eq(torch.tensor(1e-8).log()).all()


def test_onsets_of_a_click_train_are_at_the_clicks():
    clicks = np.array([20, 61, 90, 140, 222])  # frames
    wav = torch.zeros(1, 1, 300 * HOP)
    wav[..., clicks * HOP] = 0.5
    onsets = onset_envelope(wav)[0]
    assert onsets.shape == (300,)
    # frame t is centred on sample t · HOP, and its window of 1024 samples sees a click up to 1.6 frames away
    near = np.abs(np.arange(1, 301)[:, None] - clicks).min(axis=1) <= 1
    assert onsets[~near].abs().max() < 1e-6
    for click in clicks:
        assert onsets[click - 3 : click + 2].max() > 5
    assert onsets[near].sum() == pytest.approx(onsets.sum().item())


def test_onsets_are_rises_averaged_over_the_bands(wavs):
    mel = log_mel(wavs).double().numpy()
    rises = np.maximum(mel[:, :, 1:] - mel[:, :, :-1], 0).mean(axis=1)
    np.testing.assert_allclose(onset_envelope(wavs), rises, rtol=1e-4, atol=1e-6)
    assert (onset_envelope(wavs) >= 0).all()


def test_onsets_of_music_are_librosas(songs, wavs):
    """Of the same mel spectrum. A frame's delay, or falls counted for rises, would show."""
    for song, mine in zip(songs, onset_envelope(wavs).numpy(), strict=True):
        decibels = librosa.power_to_db(librosa_mel(song), top_db=None)
        theirs = librosa.onset.onset_strength(S=decibels, sr=SAMPLE_RATE, hop_length=HOP, center=False)[1:]
        assert np.corrcoef(mine, theirs)[0, 1] > 0.96
        assert np.corrcoef(mine[1:], theirs[:-1])[0, 1] < 0.8
        assert np.corrcoef(mine, np.diff(decibels).clip(max=0).mean(axis=0))[0, 1] < 0.5


def test_rhythm_similarity_is_the_correlation_of_onsets(wavs):
    onsets = onset_envelope(wavs).numpy()
    wanted = [np.corrcoef(onsets[i], onsets[i - 1])[0, 1] for i in range(4)]
    assert rhythm_similarity(wavs, wavs.roll(1, 0)).tolist() == pytest.approx(wanted, abs=1e-5)


def test_rhythm_similarity_follows_the_onsets_and_not_the_pitch():
    """Notes of two pitches at the same times, against the same notes at other times."""

    def notes(frequency: float, starts: tuple[float, ...]) -> Tensor:
        time = torch.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
        sounds = [
            (time >= s) * torch.exp(-8 * (time - s).clamp_min(0)) * torch.sin(2 * math.pi * frequency * time)
            for s in starts
        ]
        return 0.3 * sum(sounds)[None, None]

    early, late = (0.2, 0.5, 1.0, 1.6), (0.35, 0.7, 1.25, 1.8)
    assert rhythm_similarity(notes(440, early), notes(440, early)).item() == pytest.approx(1, abs=1e-5)
    assert rhythm_similarity(notes(440, early), notes(587, early)).item() > 0.8
    assert rhythm_similarity(notes(440, early), notes(440, late)).item() < 0.1


# --- harmony ----------------------------------------------------------------------------------------------------------


def test_chroma_is_librosas(songs, wavs):
    for song, mine in zip(songs, chroma(wavs), strict=True):
        theirs = librosa.feature.chroma_stft(
            y=song, sr=SAMPLE_RATE, n_fft=CHROMA_FFT, hop_length=4 * HOP, tuning=0.0, norm=1
        )
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
        assert np.abs(np.roll(theirs, 1, axis=0) - theirs).max() > 0.1


@pytest.mark.parametrize(("frequency", "pitch_class"), [(440.0, 9), (880.0, 9), (261.63, 0), (311.13, 3), (493.88, 11)])
def test_a_tone_lies_in_its_pitch_class(frequency, pitch_class):
    classes = chroma(tone(frequency))[0]  # [12, F]
    inside = classes[:, 2:-2]  # frames that see no edge
    assert (inside.argmax(dim=0) == pitch_class).all()
    assert inside[pitch_class].min() > 0.6


def test_chroma_is_a_share_at_every_loudness_and_even_in_silence(wavs):
    for wav in (wavs, 0.01 * wavs, torch.zeros(1, 1, 9600)):
        torch.testing.assert_close(chroma(wav).sum(dim=1), torch.ones(len(wav), chroma(wav).shape[2]))
    torch.testing.assert_close(chroma(torch.zeros(1, 1, 9600)), torch.full((1, 12, 8), 1 / 12))
    torch.testing.assert_close(chroma(0.1 * wavs), chroma(wavs), rtol=0, atol=1e-3)


def test_harmony_similarity_is_the_cosine_around_a_twelfth(wavs):
    x, y = (chroma(w).double().flatten(1).numpy() - 1 / 12 for w in (wavs, wavs.roll(1, 0)))
    cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(harmony_similarity(wavs, wavs.roll(1, 0)), cosines, atol=1e-5)
    plain = ((x + 1 / 12) * (y + 1 / 12)).sum(1)
    plain /= np.linalg.norm(x + 1 / 12, axis=1) * np.linalg.norm(y + 1 / 12, axis=1)
    assert np.abs(plain - cosines).min() > 0.1  # without the mean taken off, any two clips are alike


CHORDS = ((60, 64, 67), (65, 69, 72), (67, 71, 74))  # MIDI notes


def chords(semitones: float) -> Tensor:
    """C, F and G major, moved up."""
    triads = [[440 * 2 ** ((note + semitones - 69) / 12) for note in notes] for notes in CHORDS]
    return torch.cat([sum(tone(frequency, 1.0, 0.1) for frequency in triad) for triad in triads], dim=2)


def test_a_transposed_clip_is_less_similar():
    """An octave up the pitch classes are the same; a fifth shares some of them, a tritone none."""
    found = {n: harmony_similarity(chords(0), chords(n)).item() for n in (0, 12, 7, 6)}
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert found[12] > 0.9
    assert 0 < found[7] < 0.3
    assert found[6] < -0.2


def test_chords_in_another_order_are_less_similar():
    """The similarity compares frame by frame, not what a clip has on the whole."""
    backwards = torch.cat(chords(0).chunk(3, dim=2)[::-1], dim=2)
    assert harmony_similarity(chords(0), backwards).item() < 0.7


# --- bands and semitones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high", "band"), [(30, 150, 0), (200, 1500, 1), (1700, 4700, 2)])
def test_a_burst_of_noise_is_a_hit_in_its_band(low, high, band):
    noise = torch.fft.rfft(torch.randn(2 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0)))
    frequencies = torch.fft.rfftfreq(2 * SAMPLE_RATE, 1 / SAMPLE_RATE)
    burst = torch.fft.irfft(noise * ((frequencies >= low) & (frequencies < high)), 2 * SAMPLE_RATE)
    burst[:SAMPLE_RATE] = 0
    burst[SAMPLE_RATE + 2400 :] = 0
    found = hits(0.3 * burst[None, None])[0]
    assert found.shape == (len(HIT_BANDS) - 1, 146)
    around = found[:, 69:78].amax(dim=1)
    assert around.argmax() == band
    assert around[band] > 10 * found[band, 5:65].max()


def test_the_onset_of_a_note_is_hardly_a_hit():
    """A note with ten partials sets in within 10 ms, and later there is a click of noise."""
    time = torch.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    attack = 1 - torch.exp(-(time - 0.5).clamp_min(0) / 0.01)
    note = sum(torch.sin(2 * math.pi * 220 * k * time) / k for k in range(1, 11)) * attack
    click = torch.zeros(2 * SAMPLE_RATE)
    click[SAMPLE_RATE + 7000 :][:200] = 3 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    found = hits(0.2 * (note + click)[None, None])[0].mean(dim=0)
    assert found[92:100].max() > 10 * found[32:40].max()


def test_the_ends_of_a_clip_are_no_hits():
    """It is cut out of a held note, with a click in the middle; a clip of a few frames keeps all of them."""
    wav = tone(440)
    wav[..., wav.shape[-1] // 2 :][..., :200] += 0.3 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    found = hits(wav)[0]
    inner = found[..., found.shape[-1] // 2 - 5 :][..., :10]
    assert found[..., :20].max() < 0.02 * inner.max()
    assert found[..., -20:].max() < 0.02 * inner.max()
    assert hits(wav[..., : 7 * HOP]).shape[-1] == 7


@pytest.mark.parametrize("note", [28, 45, 60, 72, 99])
def test_a_tone_stands_out_in_its_semitone_at_any_level(note):
    found = [notes(tone(librosa.midi_to_hz(note), amplitude=level))[0, :, 20] for level in (0.3, 0.003)]
    assert found[0].argmax() == note - LOWEST_NOTE
    assert found[0].shape == (HIGHEST_NOTE - LOWEST_NOTE + 1,)
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.05)


def test_noise_has_no_notes():
    noise = 0.1 * torch.randn(1, 1, 2 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    assert notes(noise).amax(dim=1).mean() < 0.4 * notes(tone(440)).amax(dim=1).mean()


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.__name__)
def test_clips_of_a_batch_are_independent(wavs, feature):
    whole = feature(wavs)
    for i in range(len(wavs)):
        torch.testing.assert_close(feature(wavs[i : i + 1])[0], whole[i], rtol=1e-4, atol=1e-5)
    moved = feature(torch.cat([wavs[:1], 100 * wavs[2:3], wavs[2:] * 0]))
    torch.testing.assert_close(moved[0], whole[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("similarity", SIMILARITIES, ids=lambda f: f.__name__)
def test_similarities_are_of_each_clip(wavs, similarity):
    others = wavs.roll(1, 0)
    whole = similarity(wavs, others)
    assert whole.shape == (4,)
    alone = torch.cat([similarity(wavs[i : i + 1], others[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
    assert whole.std() > 0.02


@pytest.mark.parametrize("kind", ["silence", "half silence", "music"])
@pytest.mark.parametrize("feature", [*FEATURES, *SIMILARITIES], ids=lambda f: f.__name__)
def test_gradients_are_finite(wavs, feature, kind):
    wav = wavs[:2].clone()
    if kind != "music":
        wav[..., :: 1 if kind == "silence" else 2] = 0.0
    if kind == "half silence":
        wav[..., : wav.shape[-1] // 2] = 0.0
    wav.requires_grad_()
    made = feature(wav, wavs[2:]) if feature in SIMILARITIES else feature(wav)
    (made * torch.linspace(-1, 1, made.numel()).view_as(made)).sum().backward()
    assert made.isfinite().all()
    assert wav.grad.isfinite().all()
    assert kind != "music" or (wav.grad.abs().flatten(1).amax(dim=1) > 0).all()


@pytest.mark.parametrize("similarity", SIMILARITIES, ids=lambda f: f.__name__)
def test_silence_is_similar_to_nothing(wavs, similarity):
    silence = torch.zeros_like(wavs)
    assert similarity(silence, wavs).abs().max() < 1e-4
    assert similarity(silence, silence).abs().max() < 1e-4


@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.__name__)
def test_first_used_in_inference_mode_they_still_train_later(feature):
    lib.audio.features._mel.cache_clear()
    lib.audio.features._chroma_bank.cache_clear()
    with torch.inference_mode():
        feature(tone(440))
    wav = tone(440).requires_grad_()
    feature(wav).square().sum().backward()
    assert wav.grad.abs().max() > 0


def test_a_sound_computes_each_feature_once_on_first_use(wavs):
    sound, names = Sound(wavs), ["envelope", "log_mel", "onsets", "hits", "chroma", "notes"]
    assert not vars(sound).keys() & set(names)
    for name in names:
        assert getattr(sound, name) is getattr(sound, name)
    assert [sound.magnitudes(size).shape[1] for size in (512, 1024)] == [257, 513]
    assert sound.magnitudes(512) is sound.magnitudes(512)
    assert sound.onsets.shape[1] == sound.log_mel.shape[2] - 1
