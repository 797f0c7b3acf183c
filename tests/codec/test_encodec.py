"""EnCodec and the choice of a codec: exact frame counts, and every way weights can be wrong."""

import math
import pickle
import urllib.error
from pathlib import Path

import encodec.modules.conv
import pytest
import torch
from conftest import encodec_model, write_weights
from torch import nn

import lib.codec.encodec
from lib.codec.codec import load_codec
from lib.codec.encodec import EncodecCodec
from lib.codec.mdct import DIM, HOP, MdctCodec
from lib.util.errors import UserError


def saved(thing, path: Path) -> bytes:
    torch.save(thing, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def model():
    return encodec_model()


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights")).parent


@pytest.fixture(scope="module")
def encodec_codec(weights_dir):
    return load_codec(weights_dir)


def test_encodec_16_seconds_are_1200_frames_and_back(encodec_codec):
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
    encodec_codec.eval()
    assert not any(p.requires_grad for p in encodec_codec.parameters())
    layers = [module for module in encodec_codec.modules() if isinstance(module, torch.nn.LSTM)]
    assert len(layers) == 2
    assert all(layer.training and layer.dropout == 0 for layer in layers)  # cuDNN refuses a backward pass in eval mode
    latents = torch.randn(1, DIM, 4, requires_grad=True)
    encodec_codec.decode(latents).square().sum().backward()
    assert (latents.grad.abs().sum(dim=(0, 1)) > 0).all()


@pytest.mark.parametrize(("length", "paddings"), [(9, (3, 2)), (9, (0, 4)), (9, (4, 0)), (3, (3, 2)), (1, (2, 4))])
def test_its_convolutions_pad_as_the_package_does(length, paddings):
    """Whose words these are: what is shorter than its padding is continued by silence first."""
    x = torch.randn(2, 3, length, requires_grad=True)
    silence = max(0, max(paddings) - length + 1)
    stock = nn.functional.pad(nn.functional.pad(x, (0, silence)), paddings, "reflect")
    stock = stock[..., : stock.shape[-1] - silence]
    own = encodec.modules.conv.pad1d(x, paddings, mode="reflect")
    assert torch.equal(own, stock)
    weights = torch.randn_like(stock)
    first, second = (torch.autograd.grad((padded * weights).sum(), x)[0] for padded in (own, stock))
    assert torch.allclose(first, second, atol=1e-6)
    assert torch.equal(encodec.modules.conv.pad1d(x, paddings), nn.functional.pad(x, paddings))


def test_encodec_ignores_autocast_and_input_precision(encodec_codec):
    wav = 0.1 * torch.randn(1, 1, 1600)
    plain = encodec_codec.encode(wav)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encodec_codec.encode(wav), plain)
    assert encodec_codec.encode(wav.double()).dtype == torch.float32
    with pytest.raises(ValueError, match="NaN"):
        encodec_codec.encode(torch.full((1, 1, 1600), float("nan")))


def test_encodec_loading_leaves_the_random_state_alone_and_does_not_warn(weights_dir, recwarn):
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
        with pytest.raises(UserError, match=f"{path.name}: refused, because loading it would run code"):
            EncodecCodec.from_directory(path.parent)
        path.unlink()
    assert not trap.exists()


def test_encodec_names_what_is_wrong_with_a_weights_directory(weights_dir, model, tmp_path):
    good = next(weights_dir.glob("*.th")).read_bytes()
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
        assert len(str(caught.value)) < 700


# --- load_codec -------------------------------------------------------------------------------------------------------


def test_load_codec_without_weights_names_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(url, *args, **kwargs):
        assert url.endswith(lib.codec.encodec.WEIGHTS_FILE)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError, match=r"no route to host.*--codec DIR.*network"):
        load_codec("encodec")
    monkeypatch.setenv(lib.codec.encodec.OFFLINE_VARIABLE, "1")
    with pytest.raises(UserError, match="ENCODEC_OFFLINE is set"):
        load_codec("encodec")


def test_load_codec_takes_downloaded_weights_and_then_the_cached_ones(
    encodec_codec, weights_dir, tmp_path, monkeypatch
):
    source = next(weights_dir.glob("*.th"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(lib.codec.encodec, "WEIGHTS_FILE", source.name)
    downloads = []

    def download(url, destination, hash_prefix):
        downloads.append(hash_prefix)
        Path(destination).write_bytes(source.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    first, second = load_codec("encodec"), load_codec("encodec")
    assert downloads == [source.stem[-8:]]
    assert first.fingerprint == second.fingerprint == encodec_codec.fingerprint
