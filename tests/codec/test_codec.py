"""`load_codec` names its choices, and takes a codec of one's own that has what `Codec` says."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import BLOCKS

from lib.codec.codec import CODECS, decoded, load_codec
from lib.codec.mdct import MdctCodec
from lib.util.errors import UserError


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes the module `own_codec`, with some of its code changed."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(**changes: str) -> None:
        code = BLOCKS
        for old, new in changes.values():
            assert code.count(old) == 1
            code = code.replace(old, new)
        (tmp_path / "own_codec.py").write_text(code)
        monkeypatch.delitem(sys.modules, "own_codec", raising=False)

    yield write
    sys.modules.pop("own_codec", None)


def test_load_codec_names_its_choices():
    assert load_codec("mdct").name == "mdct"
    with pytest.raises(UserError) as caught:
        load_codec("opus")
    assert all(choice in str(caught.value) for choice in ("opus", *CODECS, "directory", "module:Class"))


def test_a_codec_of_ones_own_is_found_again_by_its_name(own):
    own()
    codec = load_codec("own_codec:Blocks")
    assert codec.name == "own_codec:Blocks"
    assert type(load_codec(codec.name)) is type(codec)


FAULTS = {
    "no hop": ("hop, dim, fingerprint = 16_000, 128, 64,", "dim, fingerprint = 16_000, 64,"),
    "a rate that is no whole number": ("= 16_000,", "= 16_000.0,"),
    "a fingerprint that is none": ("b10c5b10c5b1", "mine"),
    "a frame too few": ("torch.nn.functional.pad(wav, (0, -wav.shape[-1] % self.hop))", "wav[..., :15_872]"),
    "other channels": ("128, 64,", "128, 32,"),
    "three channels": ("    def encode", "    channels = 3\n\n    def encode"),
    "a second channel that is not there": ("    def encode", "    channels = 2\n\n    def encode"),
    "no length": ("[..., :length]", ""),
    "no gradient": ("return (latents.mT", "return (latents.detach().mT"),
    "an error": ("return 30 *", "return 1 / 0 *"),
    "arguments": ("    def encode", "    def __init__(self, size):\n        pass\n\n    def encode"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_codec_is_named_and_what_a_codec_must_have(own, fault):
    own(change=FAULTS[fault])
    with pytest.raises(
        UserError, match=r"^codec 'own_codec:Blocks': \w+Error: .*A codec has whole numbers sample_rate"
    ):
        load_codec("own_codec:Blocks")


SAID = {
    "channels": (("    def encode", "    channels = 3\n\n    def encode"), "channels=3 .* 1 or 2"),
    "size": (("128, 64,", "128, 2,"), "dim=2 .* 3 or more"),
    "random": (("return 30 *", "return torch.rand(()) *"), "encode=.* the same for the same sound"),
    "NaN": (("return 30 *", "return torch.nan *"), "encode=.* finite latents"),
}


@pytest.mark.parametrize("fault", SAID)
def test_what_is_wrong_is_said(own, fault):
    change, words = SAID[fault]
    own(change=change)
    with pytest.raises(UserError, match=words):
        load_codec("own_codec:Blocks")


def test_a_codec_with_weights_is_frozen_and_in_eval_mode(own):
    """With dropout, which would make its latents random."""
    own(
        a=("class Blocks:", "class Blocks(torch.nn.Module):"),
        b=(
            "    def encode",
            "    def __init__(self):\n        super().__init__()\n        self.drop = torch.nn.Dropout()\n"
            "        self.weight = torch.nn.Parameter(torch.ones(1))\n\n    def encode",
        ),
        c=("return 30 *", "return 30 * self.weight * self.drop(torch.ones(64)[:, None]) *"),
    )
    codec = load_codec("own_codec:Blocks")
    assert not codec.training
    assert not codec.weight.requires_grad


@pytest.mark.parametrize("address", ["own_codec:Gone", "no_such_module:Blocks", ":Blocks"])
def test_a_codec_that_is_not_there_is_named(own, address):
    own()
    with pytest.raises(UserError, match=f"^'{address}': cannot be imported .*PYTHONPATH"):
        load_codec(address)


def test_sound_is_compared_in_mono():
    codec = SimpleNamespace(decode=lambda latents: latents, sample_rate=24_000)
    assert torch.equal(decoded(codec, torch.tensor([[[1.0, 2], [3, 8]]])), torch.tensor([[[2.0, 5]]]))


def test_sound_is_compared_at_24_khz_with_a_gradient(own):
    """A tone of 1 kHz, at the codec's 16 kHz, is a tone of 1 kHz there; mdct's sound is not touched."""
    own()
    codec = load_codec("own_codec:Blocks")
    latents = codec.encode((2 * torch.pi * 1000 * torch.arange(16_000) / 16_000).sin()[None, None]).requires_grad_()
    wav = decoded(codec, latents)
    assert wav.shape == (1, 1, 24_000)
    assert torch.fft.rfft(wav[0, 0]).abs().argmax() == 1000
    wav.square().mean().backward()
    assert (latents.grad != 0).float().mean() > 0.9
    latents = 5 * torch.randn(1, 128, 3)
    assert torch.equal(decoded(MdctCodec(), latents), MdctCodec().decode(latents))
