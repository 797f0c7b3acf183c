"""Codecs: exact frame counts, reconstruction in the band, the latents' statistics, every way weights can be wrong."""

import hashlib
import math
import pickle
import urllib.error
import warnings
from pathlib import Path

import encodec.model
import pytest
import torch

import lib.codec
from lib.audio import load_audio
from lib.codec import CODEC_NAMES, DIM, GAIN, HOP, SAMPLE_RATE, EncodecCodec, MdctCodec, load_codec
from lib.errors import UserError
from lib.synth import make_demo_dataset


def low_passed(wav, cutoff=4500.0):
    spectrum = torch.fft.rfft(wav.double())
    spectrum[..., torch.fft.rfftfreq(wav.shape[-1], 1 / SAMPLE_RATE) > cutoff] = 0
    return torch.fft.irfft(spectrum, n=wav.shape[-1])


def band_limited_noise(num_samples, seed=0, cutoff=4500.0):
    """`[1, 1, N]` float64 cut out of a longer noise, so that its edges are like those of a clip out of a song."""
    noise = torch.randn(1, 1, num_samples + 8000, generator=torch.Generator().manual_seed(seed))
    return 0.1 * low_passed(noise, cutoff)[..., 4000 : 4000 + num_samples]


def snr(wanted, got):
    return float(10 * torch.log10(wanted.double().square().sum() / (wanted - got).double().square().sum()))


def kurtosis(x):
    return float(((x - x.mean()) ** 4).mean() / x.var() ** 2)


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    songs = make_demo_dataset(tmp_path_factory.mktemp("songs"), num_songs=4, seconds=8.0, seed=0)
    return [load_audio(song)[None] for song in songs]  # [1, 1, N] each


# --- mdct -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 319, 320, 321, 640, 9_601, 384_000])
def test_mdct_takes_exactly_the_frames_of_any_length(num_samples):
    codec = MdctCodec()
    latents = codec.encode(torch.randn(2, 1, num_samples))
    frames = math.ceil(num_samples / HOP)
    assert latents.shape == (2, DIM, frames)
    assert codec.decode(latents).shape == (2, 1, frames * HOP)
    assert codec.decode(latents, num_samples).shape == (2, 1, num_samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_samples", [384_000, 48_001, 48_160, 48_300, 24_000, 3_200])
def test_mdct_reconstructs_cut_out_band_limited_noise(num_samples, dtype):
    codec, wav = MdctCodec(), band_limited_noise(num_samples).to(dtype)
    assert snr(wav, codec.decode(codec.encode(wav), num_samples)) > 65


@pytest.mark.parametrize("frequency", [0, 50, 440, 4000, 4400, 4500])
def test_mdct_reconstructs_tones(frequency):
    codec = MdctCodec()
    wav = 0.5 * torch.cos(2 * math.pi * frequency * torch.arange(48_123).double() / SAMPLE_RATE + 0.3)[None, None]
    assert snr(wav, codec.decode(codec.encode(wav.float()), 48_123)) > 65


def test_mdct_reconstructs_low_passed_music_and_loses_what_lies_above_the_band(music):
    codec = MdctCodec()
    for wav in music:
        low = low_passed(wav).float()
        assert snr(low, codec.decode(codec.encode(low))) > 85
    high = band_limited_noise(48_000, cutoff=12_000.0)
    high -= low_passed(high, 5_200.0)  # nothing left below 5.2 kHz
    assert snr(high, codec.decode(codec.encode(high))) < 0.1


def test_mdct_latents_of_music_have_the_level_and_tails_it_was_designed_for(music):
    latents = torch.cat([MdctCodec().encode(wav).flatten() for wav in music])
    assert latents.square().mean().sqrt() == pytest.approx(5.7, abs=1.0)
    assert kurtosis(latents) < 10
    assert kurtosis(latents**3) > 10  # without the compander


def test_mdct_padding_stays_small_after_full_band_noise():
    noise = torch.randn(8, 1, 48_010)
    assert MdctCodec().decode(MdctCodec().encode(noise)).abs().max() < 4 * noise.abs().max()


def test_mdct_functions_are_orthonormal():
    """Rows of the whole linear transform over 1, 2 and 5 frames: W·Wᵀ = I, so decoding projects and never amplifies."""
    for frames in (1, 2, 5):
        latents = GAIN * torch.eye(frames * DIM, dtype=torch.float64).unflatten(1, (DIM, frames))  # cube root of 1 is 1
        rows = MdctCodec().decode(latents)[:, 0]
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), atol=1e-12)


def test_the_butterfly_is_a_rotation_and_the_window_overlaps_the_whole_boundary():
    blocks = torch.randn(3, 4, HOP, dtype=torch.float64)
    folded = lib.codec._butterfly(blocks)
    assert torch.allclose(folded.square().sum(), blocks.square().sum())
    assert torch.allclose(lib.codec._butterfly(folded, inverse=True), blocks, atol=1e-14)
    half = HOP // 2
    assert torch.equal(folded[:, 0, :half], blocks[:, 0, :half])  # the outer edges have no partner
    assert torch.equal(folded[:, -1, half:], blocks[:, -1, half:])
    assert ((folded - blocks).abs()[:, 1:-1] > 1e-9).float().mean() > 0.8


def test_mdct_channels_are_frequencies_in_order_also_at_the_edges():
    for frames in (1, 8):
        for channel in (4, 40, 100, 120):
            frequency = (channel + 0.5) * SAMPLE_RATE / 2 / HOP
            wav = torch.sin(2 * math.pi * frequency * torch.arange(frames * HOP) / SAMPLE_RATE)[None, None]
            energy = MdctCodec().encode(wav)[0].abs() ** 6  # squared coefficients
            centre = (energy * torch.arange(DIM)[:, None]).sum(0) / energy.sum(0)
            assert (centre - channel).abs().max() < 3


def test_mdct_computes_in_its_inputs_precision_even_under_autocast():
    codec, wav = MdctCodec(), band_limited_noise(6_400)
    assert codec.decode(codec.encode(wav)).dtype == torch.float64
    plain = codec.decode(codec.encode(wav.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codec.decode(codec.encode(wav.float())), plain)
    assert codec.decode(codec.encode(wav.float()).bfloat16()).dtype == torch.float32


def test_mdct_decode_is_finite_for_any_finite_latents_and_shows_nan():
    codec = MdctCodec()
    for dtype in (torch.float32, torch.float64):
        huge = torch.finfo(dtype).max * torch.randn(1, DIM, 5, dtype=dtype).sign()
        assert torch.isfinite(codec.decode(huge)).all()
    loud = codec.encode(torch.ones(1, 1, 3200) * 100)  # 40 dB over full scale is still below the clamp
    assert codec.decode(loud).abs().max() > 90
    assert torch.isnan(codec.decode(torch.full((1, DIM, 1), float("nan")))).all()


def test_mdct_decode_is_differentiable_everywhere():
    noise = torch.randn(1, DIM, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 1e-3, 5.7):
        for frames in (1, 3):
            latents = (scale * noise[..., :frames]).requires_grad_()
            assert torch.autograd.gradcheck(MdctCodec().decode, latents, fast_mode=True)
    zero = torch.zeros(1, DIM, 2, dtype=torch.float64, requires_grad=True)
    MdctCodec().decode(zero).sum().backward()
    assert torch.equal(zero.grad, torch.zeros_like(zero))


def test_mdct_first_used_in_inference_mode_still_trains_later():
    lib.codec._tables.cache_clear()
    lib.codec._design.cache_clear()
    with torch.inference_mode():
        latents = MdctCodec().encode(torch.randn(1, 1, 3200)).clone()
    latents = latents.clone().requires_grad_()
    MdctCodec().decode(latents).square().sum().backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_mdct_refuses_audio_that_is_not_finite(bad):
    wav = torch.zeros(1, 1, 1000)
    wav[..., 500] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        MdctCodec().encode(wav)


def test_mdct_refuses_wrong_shapes_and_lengths():
    codec = MdctCodec()
    for wav in (torch.zeros(1, 320), torch.zeros(1, 2, 320), torch.zeros(1, 1, 0)):
        with pytest.raises(ValueError, match="expected"):
            codec.encode(wav)
    with pytest.raises(ValueError, match="expected"):
        codec.decode(torch.zeros(1, 127, 3))
    for length in (0, 961):
        with pytest.raises(ValueError, match="length"):
            codec.decode(torch.zeros(1, DIM, 3), length)


def test_mdct_latents_match_their_recorded_values():
    """Golden: if this fails the algorithm changed, so old caches and checkpoints are void: raise the version too."""
    wav = 0.25 * torch.sin(torch.arange(1_000, dtype=torch.float64) ** 1.5 / 40)[None, None]
    latents = MdctCodec().encode(wav)
    assert MdctCodec().fingerprint[:12] == "47d5003748f2"
    recorded = torch.tensor(
        [
            [8.19745, 0.33854, -2.07282, 4.54543],
            [-10.51984, -0.59218, -3.26686, 4.16085],
            [5.17229, -10.21593, -3.99391, 2.22499],
            [-0.95164, 12.39002, 7.12389, -6.11664],
        ],
        dtype=torch.float64,
    )  # channels 0, 32, 64, 96
    assert torch.allclose(latents[0, ::32], recorded, rtol=1e-3)


@pytest.mark.parametrize("constant", ["GAIN", "ROOT", "KAISER_ALPHA", "BAND", "ROLL_OFF", "PADDING_NOISE"])
def test_mdct_fingerprint_follows_every_constant(constant, monkeypatch):
    before = MdctCodec().fingerprint
    monkeypatch.setattr(lib.codec, constant, 2 * getattr(lib.codec, constant))
    assert MdctCodec().fingerprint != before


# --- encodec ----------------------------------------------------------------------------------------------------------


def write_weights(directory: Path, content: bytes) -> Path:
    """A weights file that is named with its true checksum."""
    directory.mkdir(exist_ok=True)
    path = directory / f"encodec_24khz-{hashlib.sha256(content).hexdigest()[:8]}.th"
    path.write_bytes(content)
    return path


def saved(thing, path: Path) -> bytes:
    torch.save(thing, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the package's weight norm
        torch.manual_seed(0)
        return encodec.model.EncodecModel.encodec_model_24khz(pretrained=False)


@pytest.fixture(scope="module")
def weights_dir(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights")
    write_weights(directory, saved(model.state_dict(), directory / "temp"))
    return directory


@pytest.fixture(scope="module")
def encodec_codec(weights_dir):
    return load_codec(weights_dir)


def test_encodec_16_seconds_are_1200_frames_and_come_back_whole(encodec_codec):
    latents = encodec_codec.encode(0.1 * torch.randn(1, 1, 384_000))
    assert latents.shape == (1, DIM, 1200)
    with torch.no_grad():
        assert encodec_codec.decode(latents).shape == (1, 1, 384_000)


@pytest.fixture
def two_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_encodec_takes_a_batch_on_all_cores_with_the_same_result(encodec_codec, two_cores, mode):
    wav = 0.1 * torch.randn(3, 1, 6_400)
    runs, network = [], encodec_codec.encoder
    watch = network.register_forward_pre_hook(lambda module, x: runs.append((len(x[0]), torch.get_num_threads())))
    with mode():
        latents = encodec_codec.encode(wav)
        sound = encodec_codec.decode(latents)
        watch.remove()
        assert runs == [(1, 1)] * 3
        for i in range(3):
            assert torch.allclose(encodec_codec.encode(wav[i : i + 1])[0], latents[i], atol=1e-5)
            assert torch.allclose(encodec_codec.decode(latents[i : i + 1])[0], sound[i], atol=1e-5)
    assert torch.get_num_threads() == 2
    assert not any("weight_g" in name for name in encodec_codec.state_dict())  # a forward that writes weights races
    assert latents.is_inference() == (mode is torch.inference_mode)


def test_encodec_decodes_a_batch_with_its_gradient_on_all_cores_too(encodec_codec, two_cores):
    latents = torch.randn(2, DIM, 5, requires_grad=True)
    encodec_codec.decode(latents).square().sum().backward()
    assert latents.grad.abs().amin(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("num_samples", [1, 320, 5_001])
def test_encodec_is_the_packages_encoder_and_decoder(encodec_codec, model, num_samples):
    wav = 0.1 * torch.randn(2, 1, num_samples)
    latents = encodec_codec.encode(wav)
    with torch.no_grad():
        assert latents.shape[-1] == math.ceil(num_samples / HOP)
        assert torch.allclose(latents, model.encoder(wav), atol=1e-5)
        assert torch.allclose(encodec_codec.decode(latents), model.decoder(latents), atol=1e-5)
        assert encodec_codec.decode(latents, num_samples).shape == wav.shape


def test_encodec_is_frozen_yet_gradients_reach_the_latents(encodec_codec):
    encodec_codec.train()
    assert not any(p.requires_grad for p in encodec_codec.parameters())
    training = {type(module) for module in encodec_codec.modules() if module.training}
    assert training == {torch.nn.LSTM}  # cuDNN refuses a backward pass in eval mode
    latents = torch.randn(1, DIM, 4, requires_grad=True)
    encodec_codec.decode(latents).square().sum().backward()
    assert (latents.grad.abs().sum(dim=(0, 1)) > 0).all()


def test_encodec_ignores_autocast_and_input_precision(encodec_codec):
    wav = 0.1 * torch.randn(1, 1, 1600)
    plain = encodec_codec.encode(wav)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encodec_codec.encode(wav), plain)
    assert encodec_codec.encode(wav.double()).dtype == torch.float32
    with pytest.raises(ValueError, match="NaN"):
        encodec_codec.encode(torch.full((1, 1, 1600), float("nan")))


def test_encodec_loading_leaves_the_random_numbers_alone_and_warns_of_nothing(weights_dir, recwarn):
    state = torch.get_rng_state()
    EncodecCodec.from_directory(weights_dir)
    assert torch.equal(torch.get_rng_state(), state)
    assert not recwarn.list


def test_encodec_fingerprint_follows_the_weights(encodec_codec, model, tmp_path):
    state = model.state_dict()
    state["decoder.model.0.conv.conv.bias"] = state["decoder.model.0.conv.conv.bias"] + 1
    write_weights(tmp_path, saved(state, tmp_path / "temp"))
    other = EncodecCodec.from_directory(tmp_path)
    assert len({other.fingerprint, encodec_codec.fingerprint, MdctCodec().fingerprint}) == 3


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_encodec_refuses_a_pickle_that_would_run_code(tmp_path):
    trap = tmp_path / "trap"
    for content in (saved(RunsCode(trap), tmp_path / "temp"), pickle.dumps(RunsCode(trap), protocol=2)):
        path = write_weights(tmp_path / "weights", content)
        with pytest.raises(UserError, match=f"{path.name}: refused, loading it would run code"):
            EncodecCodec.from_directory(path.parent)
        path.unlink()
    assert not trap.exists()


def test_encodec_names_what_is_wrong_with_a_weights_directory(weights_dir, model, tmp_path):
    good = next(weights_dir.glob("*.th")).read_bytes()
    with pytest.raises(UserError, match="no such directory"):
        EncodecCodec.from_directory(tmp_path / "absent")
    with pytest.raises(UserError, match=r"exactly one .* found none"):
        EncodecCodec.from_directory(tmp_path)
    (tmp_path / "encodec_24khz-00000000.th").write_bytes(good)
    with pytest.raises(UserError, match="checksum"):
        EncodecCodec.from_directory(tmp_path)
    write_weights(tmp_path, b"second")
    with pytest.raises(UserError, match=r"exactly one .* found encodec_24khz-.*, encodec_24khz-"):
        EncodecCodec.from_directory(tmp_path)

    wrong = {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "text": b"<html>not found</html>",
        "list": saved([1, 2], tmp_path / "temp"),
        "keys": saved({"weight": torch.zeros(2)}, tmp_path / "temp"),
        "shape": saved(model.state_dict() | {"decoder.model.0.conv.conv.bias": torch.zeros(3)}, tmp_path / "temp"),
    }
    for name, content in wrong.items():
        path = write_weights(tmp_path / name, content)
        with pytest.raises(UserError, match=path.name) as caught:
            EncodecCodec.from_directory(path.parent)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


# --- load_codec -------------------------------------------------------------------------------------------------------


def test_load_codec_names_its_choices():
    assert load_codec("mdct").name == "mdct"
    with pytest.raises(UserError) as caught:
        load_codec("opus")
    assert all(choice in str(caught.value) for choice in ("opus", *CODEC_NAMES, "directory"))


def test_load_codec_without_weights_names_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(url, *args, **kwargs):
        assert url.endswith(lib.codec.WEIGHTS_FILE)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError, match=r"no route to host.*--codec DIR.*network"):
        load_codec("encodec")
    monkeypatch.setenv(lib.codec.OFFLINE_VARIABLE, "1")
    with pytest.raises(UserError, match="ENCODEC_OFFLINE is set"):
        load_codec("encodec")


def test_load_codec_takes_downloaded_weights_and_then_the_cached_ones(
    encodec_codec, weights_dir, tmp_path, monkeypatch
):
    source = next(weights_dir.glob("*.th"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(lib.codec, "WEIGHTS_FILE", source.name)
    downloads = []

    def download(url, destination, hash_prefix):
        downloads.append(hash_prefix)
        Path(destination).write_bytes(source.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    first, second = load_codec("encodec"), load_codec("encodec")
    assert downloads == [source.stem[-8:]]
    assert first.fingerprint == second.fingerprint == encodec_codec.fingerprint
