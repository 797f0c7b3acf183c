"""Baselines against the formulas by hand, and what a model is compared with on the same pairs."""

from types import SimpleNamespace

import pytest
import torch

from lib.codec.mdct import MdctCodec
from lib.data.latents import LatentPairs
from lib.evaluation.baselines import (
    CROSSOVERS,
    ORACLE,
    advantage,
    best_crossovers,
    crossover,
    encoded,
    fusions,
    low_and_high,
    mean_metrics,
    measure_fusions,
    pairs_to_measure,
    recipes,
)
from lib.evaluation.fusion_metrics import sound_features, sound_metrics
from lib.model.fusion import Fusion
from lib.util.errors import UserError
from lib.util.stats import paired_comparison

CHOSEN = {"crossover": 900.0, "crossover, input below": 500.0, "HPSS with crossover": 900.0}
RECIPES = (*CHOSEN, "HPSS")
BASELINES = ("input", "target", "average of waveforms", *RECIPES, "average of latents")


def test_fusions_are_the_baselines_and_then_the_models(clips, known_model):
    input, target = clips[:2]
    decode = MdctCodec().decode
    models = {"louder target": known_model(lambda i, t: 0.2 * i + 0.8 * t), "swapped": known_model(lambda i, t: t)}
    found = fusions(input, target, MdctCodec(), models, CHOSEN)
    assert tuple(found) == (*BASELINES, *models)
    first, second = decode(input[None])[0], decode(target[None])[0]
    wanted = {
        "input": first,
        "target": second,
        "average of waveforms": (first + second) / 2,
        "average of latents": decode((input + target)[None] / 2)[0],
        "louder target": decode((0.2 * input + 0.8 * target)[None])[0],
        "swapped": second,
    }
    for name, wav in wanted.items():
        torch.testing.assert_close(found[name], wav, rtol=1e-4, atol=1e-5, msg=name)
    sounds = [found[name] for name in found if name != "swapped"]
    closest = min((x - y).square().mean().sqrt().item() for i, x in enumerate(sounds) for y in sounds[:i])
    assert closest > 1e-3  # no two of them are the same


def sounds_at(*frequencies: float) -> torch.Tensor:
    seconds = torch.arange(24_000) / 24_000
    return sum(0.1 * (2 * torch.pi * f * seconds).sin() for f in frequencies)[None]


def level_at(wav: torch.Tensor, frequency: int) -> float:
    return 2 * torch.fft.rfft(wav[0])[frequency].abs().item() / wav.shape[-1]


def test_crossovers_have_the_lows_of_one_clip_and_the_highs_of_the_other():
    found = recipes(sounds_at(200, 700, 3000), sounds_at(440, 600, 2000), CHOSEN)
    frequencies = (200, 440, 600, 700, 2000, 3000)
    levels = {name: [round(level_at(found[name], f), 3) for f in frequencies] for name in CHOSEN}
    assert levels["crossover"] == [0, 0.1, 0.1, 0, 0, 0.1]  # at 900 Hz
    assert levels["crossover, input below"] == [0.1, 0, 0.1, 0, 0.1, 0]  # at 500 Hz
    whole = crossover(sounds_at(200, 3000), sounds_at(200, 3000), 1000)
    torch.testing.assert_close(whole, sounds_at(200, 3000), rtol=0, atol=1e-6)


def test_hpss_has_the_inputs_clicks_and_the_targets_tones():
    clicks = torch.zeros(1, 24_000)
    clicks[:, 6_000::6_000] = 1.0
    found = recipes(clicks + sounds_at(300, 2500), clicks.roll(2_000) + sounds_at(440, 2000), CHOSEN)
    for name in ("HPSS", "HPSS with crossover"):
        peaks = found[name][0].abs()
        assert peaks[6_000] > 0.5
        assert peaks[8_000] < 0.4, name  # where the target clicks
        assert level_at(found[name], 440) == pytest.approx(0.1, abs=0.02)
        assert level_at(found[name], 300) < 0.02
    assert level_at(found["HPSS"], 2000) == pytest.approx(0.1, abs=0.02)
    assert level_at(found["HPSS"], 2500) < 0.02
    assert level_at(found["HPSS with crossover"], 2500) == pytest.approx(0.1, abs=0.02)
    assert level_at(found["HPSS with crossover"], 2000) < 0.02


def test_a_model_fuses_without_dropout(clips, known_model):
    class Loud(known_model):
        def forward(self, input, target):
            return Fusion(input if not self.training else 0 * input, (), None)

    model = Loud(None).train()
    found = fusions(clips[0], clips[1], MdctCodec(), {"model": model})
    assert torch.equal(found["model"], found["input"])


def test_every_pair_is_measured_against_its_own_clips(clips, known_model):
    pairs = [(clips[0], clips[1]), (clips[2], clips[3])]
    rows = measure_fusions(pairs, MdctCodec(), {"model": known_model(lambda i, t: (2 * i + t) / 3)}, CHOSEN)
    assert set(rows) == {*BASELINES, "model", ORACLE}
    assert all(len(of_output) == 2 for of_output in rows.values())
    for number, (input, target) in enumerate(pairs):
        features = {name: sound_features(wav) for name, wav in fusions(input, target, MdctCodec(), {}, CHOSEN).items()}
        for name in BASELINES:
            assert rows[name][number] == sound_metrics(features[name], features["input"], features["target"])
        model = sound_features(MdctCodec().decode((2 * input + target)[None] / 3)[0])
        by_hand = sound_metrics(model, features["input"], features["target"])
        assert rows["model"][number] == pytest.approx(by_hand, rel=1e-4, abs=1e-6)
        assert rows["input"][number]["rhythm"] == pytest.approx(1, abs=1e-6)
        assert rows["target"][number]["harmony"] == pytest.approx(1, abs=1e-6)
    assert rows["model"][0] != rows["model"][1]
    means = mean_metrics(rows["model"])
    first, second = rows["model"]
    assert means == pytest.approx({name: (first[name] + second[name]) / 2 for name in first})


def test_pairs_of_waveforms_are_measured_as_their_latents(clips, wavs, known_model):
    codec, models = MdctCodec(), {"model": known_model(lambda i, t: (2 * i + t) / 3)}
    latents = [tuple(codec.encode(wav[None])[0] for wav in wavs[:2]), (clips[2], clips[3])]
    mixed = [(wavs[0], wavs[1]), (clips[2], clips[3])]
    for found, wanted in zip(encoded(mixed, codec), latents, strict=True):
        assert all(map(torch.equal, found, wanted))
    assert measure_fusions(mixed, codec, models) == measure_fusions(latents, codec, models)


@pytest.mark.parametrize("shapes", [((1, 640), (1, 641)), ((3, 640), (3, 640)), ((640,), (640,)), ((1, 640), (128, 2))])
def test_a_pair_that_is_neither_is_refused_by_its_place(clips, shapes):
    pairs = [(clips[0], clips[1]), tuple(map(torch.zeros, shapes))]
    with pytest.raises(
        UserError, match=r"^pair 1: is \[.*640.*\] and .*; give two waveforms \[1 or 2, N\] or two latents \[128, T\]"
    ):
        list(encoded(pairs, MdctCodec()))


def test_a_mono_codec_gets_the_mean_of_stereo_clips():
    wavs = tuple(0.1 * torch.randn(2, 6400, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    (found,) = encoded([wavs], MdctCodec())
    for latents, wav in zip(found, wavs, strict=True):
        assert torch.equal(latents, MdctCodec().encode(wav.mean(0)[None, None])[0])


def test_means_of_no_pairs_are_refused():
    with pytest.raises(UserError, match="no pairs were measured; give at least one"):
        mean_metrics([])


def test_without_crossovers_there_are_no_recipes(clips):
    rows = measure_fusions([(clips[0], clips[1])], MdctCodec(), {})
    assert not {*RECIPES, ORACLE} & set(rows)
    assert {"input", "target", "average of waveforms", "average of latents"} <= set(rows)


def test_the_best_crossovers_are_found_on_the_pairs_and_the_oracle_on_each(clips):
    pairs, codec = [(clips[0], clips[1]), (clips[2], clips[3])], MdctCodec()
    chosen = best_crossovers(iter(pairs), codec)
    assert list(chosen) == list(CHOSEN)
    merits = {}
    for input, target in pairs:
        first, second = codec.decode(input[None])[0], codec.decode(target[None])[0]
        own, other = sound_features(first), sound_features(second)
        for name, parts in low_and_high(first, second).items():
            for hz in CROSSOVERS:
                merit = sound_metrics(sound_features(crossover(*parts, hz)), own, other)["merit"]
                merits.setdefault(name, {}).setdefault(hz, []).append(merit)
    for name, by_frequency in merits.items():
        assert sum(by_frequency[chosen[name]]) == max(map(sum, by_frequency.values()))
        assert len({round(sum(values), 6) for values in by_frequency.values()}) > 4
    rows = measure_fusions(pairs, codec, {}, chosen)
    for pair in range(2):
        assert rows[ORACLE][pair]["merit"] == max(values[pair] for values in merits["crossover"].values())
        assert rows[ORACLE][pair]["merit"] >= rows["crossover"][pair]["merit"]


def test_an_advantage_is_of_the_merit_and_clustered_by_song():
    merits = {"model": (0.9, 0.8, 0.7, 0.4), "average": (0.5, 0.6, 0.1, 0.1)}
    rows = {name: [{"merit": merit, "rhythm": 2 * merit} for merit in values] for name, values in merits.items()}
    songs = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "z")]
    found = advantage(rows, "model", "average", songs)
    differences = [a - b for a, b in zip(*merits.values(), strict=True)]
    assert found == paired_comparison(differences, "aabb", "xyxz")
    assert found.mean == pytest.approx(0.375)
    assert advantage(rows, "average", "model", songs).mean == pytest.approx(-0.375)
    assert advantage(rows, "model", "average", songs, by="rhythm").mean == pytest.approx(0.75)
    with pytest.raises(ValueError, match="zip"):
        advantage(rows, "model", "average", songs[:-1])


def test_pairs_of_two_songs_and_of_one_are_told_from_their_files(tiny_index, monkeypatch):
    """Of nine validation pairs every third is of two songs."""
    pairs = LatentPairs(tiny_index, "val")
    hashes = {i: ("a" * 64, ("b" if i % 3 == 0 else "a") * 64) for i in range(9)}
    manifest = SimpleNamespace(
        pairs=[
            SimpleNamespace(id=pairs.pair_id(i), input=SimpleNamespace(sha256=x), target=SimpleNamespace(sha256=y))
            for i, (x, y) in hashes.items()
        ]
    )
    assert pairs_to_measure(manifest, pairs, 24) == {i: hashes[i] for i in (0, 3, 6)}
    assert list(pairs_to_measure(manifest, pairs, 2)) == [0, 3]
    assert list(pairs_to_measure(manifest, pairs, 24, of_two_songs=False)) == [1, 2, 4, 5, 7, 8]
    of_one = SimpleNamespace(pairs=[SimpleNamespace(id=p.id, input=p.input, target=p.input) for p in manifest.pairs])
    assert list(pairs_to_measure(of_one, pairs, 24)) == list(range(9))  # or such music could not be measured
    assert len(pairs_to_measure(of_one, pairs, 0)) == 1
    of_two = SimpleNamespace(
        pairs=[SimpleNamespace(id=p.id, input=p.input, target=SimpleNamespace(sha256="c" * 64)) for p in manifest.pairs]
    )
    assert pairs_to_measure(of_two, pairs, 24, of_two_songs=False) == {}
