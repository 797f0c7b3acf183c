"""Counting, against layers whose operations are known by hand, and verdicts that come out both ways."""

import pytest
import torch
from full_size import Count, audit_sizes, count_costs, count_sizes, counted, full_parts, latent_shape, macs
from torch import nn

from lib.lab.claims import REFUTED, REPRODUCED
from lib.lab.results import read_record
from lib.project import RECORD
from lib.superres.unet import Denoiser, DenoiserConfig, EncoderConfig, GlobalTransformer
from lib.superres.vae import MelVae, VaeConfig
from lib.superres.vocoder import Vocoder, VocoderConfig

VAE = VaeConfig((4, 8), num_res_blocks=1, latent_channels=2, norm_groups=2)
VOCODER = VocoderConfig(32, resblock_kernels=(3,), dilations=(1,))
ENCODER = EncoderConfig((2, 3, 4), 8, num_layers=1, num_heads=2, ffn_dim=8, context_dim=6, positions=8)
DENOISER = DenoiserConfig(2, (8, 16), (False, True), 1, head_channels=4, norm_groups=4, encoder=ENCODER)


def tiny() -> dict[str, nn.Module]:
    return {"denoiser": Denoiser(DENOISER), "vae": MelVae(VAE), "vocoder": Vocoder(VOCODER)}


@pytest.fixture(scope="module")
def on_meta():
    with torch.device("meta"):
        return tiny()


@pytest.fixture(scope="module")
def costs(on_meta):
    return {cost.what: cost for cost in count_costs(on_meta)}


@pytest.fixture(scope="module")
def full():
    return full_parts()


# --- counting ---------------------------------------------------------------------------------------------------------


def test_operations_of_known_layers():
    """One multiplication and addition for each weight that a value meets; on the meta device nothing is computed."""
    with torch.device("meta"):
        picture, line, tokens = torch.zeros(2, 6, 11, 7), torch.zeros(2, 6, 11), torch.zeros(3, 5, 16)
        convolution, transposed = nn.Conv2d(6, 4, (5, 3), (2, 1), (0, 1)), nn.ConvTranspose1d(6, 4, 10, 5, 2)
        grouped, linear = nn.Conv1d(6, 4, 3, padding=1, groups=2), nn.Linear(16, 9)
        attention, others = nn.MultiheadAttention(16, 2, batch_first=True), torch.zeros(3, 7, 16)
        assert macs(lambda: convolution(picture)) == 2 * (4 * 7) * 4 * 6 * 15  # places · outputs · inputs · kernel
        assert macs(lambda: transposed(line)) == 2 * 11 * 6 * 4 * 10
        assert macs(lambda: grouped(line)) == 2 * 11 * 4 * 3 * 3
        assert macs(lambda: linear(tokens)) == 3 * 5 * 16 * 9
        projections, products = 3 * (2 * 5 + 2 * 7) * 16 * 16, 2 * 3 * 5 * 7 * 16
        for training in (True, False):
            attention.train(training)
            assert macs(lambda: attention(tokens, others, others, need_weights=False)) == projections + products
        assert macs(lambda: tokens + 1) == 0


@pytest.mark.parametrize("context", ["pooled", "sequence"])
def test_attention_to_the_context_costs_as_much_as_it_is_long(context):
    places, L = 32 * 4, 1 if context == "pooled" else 9
    with torch.device("meta"):
        module = GlobalTransformer(8, head_channels=4, context_dim=6, norm_groups=4)
        x, keys = torch.zeros(1, 8, 32, 4), torch.zeros(1, L, 6)
        attended = macs(lambda: module.attend(x, keys))
    assert attended == 6 * 8 * L + 2 * 64 * places + 2 * 64 * L + 2 * 8 * places * L


def test_counting_leaves_no_gradients():
    linear = nn.Linear(2, 2)
    made = []
    macs(lambda: made.append(linear(torch.zeros(1, 2))))
    assert not made[0].requires_grad


# --- the table --------------------------------------------------------------------------------------------------------


def test_sizes_are_the_numbers_in_parts_really_built(on_meta):
    parts = tiny()
    counted = {size.what: size.counted for size in count_sizes(parts)}
    numbers = {name: sum(len(p.detach().flatten()) for p in part.parameters()) for name, part in parts.items()}
    transformers = [m for m in parts["denoiser"].modules() if isinstance(m, GlobalTransformer)]
    assert len(transformers) == 2 * (1 + 1 + 2)  # down, middle, up
    own = sum(p.numel() for m in transformers for p in m.parameters())
    encoder = sum(p.numel() for p in parts["denoiser"].encoder.parameters())
    assert counted == {
        "global encoder": encoder,
        "UNet, all of it": numbers["denoiser"] - encoder,
        "its 8 conditioned transformers": own,
        "autoencoder": numbers["vae"],
        "vocoder": numbers["vocoder"],
        "together": sum(numbers.values()),
    }
    assert list(counted.values()) == [size.counted for size in count_sizes(on_meta)]


def test_full_table_beside_the_documents(full):
    assert count_sizes(full) == [
        Count("global encoder", 3_233_312, 3_232_312),
        Count("UNet, all of it", 288_248_208, 64_876_712),
        Count("its 32 conditioned transformers", 185_341_440, 14_313_024),
        Count("autoencoder", 223_535_569, 100_001_328),
        Count("vocoder", 190_281_889, 39_317_489),
        Count("together", 705_298_978, 207_427_841),
    ]
    sizes = {size.what: size for size in count_sizes(full)}
    parts = [sizes[name] for name in ("global encoder", "UNet, all of it", "autoencoder", "vocoder")]
    assert sizes["together"].counted == sum(size.counted for size in parts)
    assert sizes["together"].claimed == sum(size.claimed for size in parts)  # the document too counts transformers once
    assert all(p.device.type == "meta" for part in full.values() for p in part.parameters())


def test_latent_map_of_a_clip_of_ten_seconds(full, on_meta):
    assert latent_shape(full) == (16, 32, 128)
    assert latent_shape(on_meta) == (2, 128, 512)


def test_costs_of_encoder_and_vocoder_layer_by_layer(costs):
    assert [cost.claimed for cost in costs.values()] == [50e6, 2.3e9, 57.5e9, 50e9, 8e9]
    T = 1024
    convolutions = T * (64 * 1 * 2 * 24 + 32 * 2 * 3 * 12 + 16 * 3 * 4 * 12)
    layer = T * (4 * 8 * 8 + 2 * 8 * 8) + 2 * T * T * 8
    rest = T * (32 * 8 + 8 * 8 + 8 * 6) + 6 * 6
    assert costs["global encoder"].counted == convolutions + layer + rest
    length, wanted = T, T * 7 * 256 * 32
    for i, (rate, kernel) in enumerate(zip((6, 5, 4, 2, 2), (12, 10, 8, 4, 4), strict=True)):
        width = 32 // 2 ** (i + 1)
        wanted += length * kernel * 2 * width * width
        length = length * rate + (kernel - rate) % 2
        wanted += length * 2 * 3 * width * width
    assert costs["vocoder"].counted == wanted + length * 7 * 1
    assert length == 480 * T + 16


def test_unet_s_cost_has_as_many_context_vectors_as_frames(on_meta, costs):
    """One vector more to attend to adds its key, its value and its products."""
    denoiser, places, C = on_meta["denoiser"], 64 * 256, 16  # all eight are at half the latent map's sides
    with torch.device("meta"):
        latents, time = torch.zeros(1, 2, 128, 512), torch.zeros(1)
        one, two = (macs(lambda L=L: denoiser.denoise(latents, time, latents, torch.zeros(1, L, 6))) for L in (1, 2))
    assert two - one == 8 * (6 * C + 2 * C * C + 2 * C * places)
    assert costs["UNet, one step"].counted == one + 1024 * (two - one)


def test_autoencoder_costs_as_much_as_its_layers(costs):
    """Levels of 4 and of 8 channels, the second with half the sides; between them attention; 2 latent channels."""
    P, p = 256 * 1024, 128 * 512  # places of each level

    def block(a, b):
        return 9 * (a * b + b * b) + (a != b) * a * b

    middle = p * (2 * block(8, 8) + 4 * 8 * 8) + 2 * p * p * 8
    encoder = P * (9 * 4 + block(4, 4)) + p * (9 * 4 * 4 + block(4, 8)) + middle + p * (9 * 8 * 4 + 4 * 4)
    assert costs["autoencoder, encoding"].counted == encoder
    last = 9 * 8 * 8 + block(8, 4) + block(4, 4) + 9 * 4  # with the convolution that comes after doubling the sides
    decoder = p * (2 * 2 + 9 * 2 * 8) + middle + p * 2 * block(8, 8) + P * last
    assert costs["autoencoder, decoding"].counted == decoder


# --- verdicts ---------------------------------------------------------------------------------------------------------


AS_SAID = [
    Count("global encoder", 3_232_312, 3_232_312),
    Count("UNet, all of it", 64_876_712, 64_876_712),
    Count("its 18 conditioned transformers", 14_313_024, 14_313_024),
    Count("together", 207_427_841, 207_427_841),
]
STEP = [Count("vocoder", 1, 1.0), Count("UNet, one step", round(57.5e9 / 8), 57.5e9)]


def outcomes(sizes=AS_SAID, costs=STEP, transformers=18, latent=(16, 64, 64)):
    return {verdict.said: verdict.verdict for verdict in audit_sizes(sizes, costs, transformers, latent)}


def test_what_is_as_said_is_reproduced():
    found = outcomes()
    assert set(found.values()) == {REPRODUCED}
    assert len(found) == 3 + 4  # the transformers are no part of their own


@pytest.mark.parametrize("place", range(4))
def test_another_count_is_refuted_and_nothing_else(place):
    sizes = list(AS_SAID)
    sizes[place] = sizes[place]._replace(counted=round(1.02 * sizes[place].counted))
    refuted = [said for said, verdict in outcomes(sizes).items() if verdict == REFUTED]
    assert len(refuted) == 1
    named = (
        "with 14.3 M parameters"
        if place == 2
        else f"{sizes[place].what}: {sizes[place].claimed / 1e6:.2f} M parameters"
    )
    assert refuted == [named]


def test_transformers_latents_and_costs_are_refuted_by_others():
    assert outcomes(transformers=12)["18 (or 12) conditioned transformers"] == REPRODUCED
    assert outcomes(transformers=32)["18 (or 12) conditioned transformers"] == REFUTED
    assert outcomes(latent=[16, 64, 64])["latents [16, 64, 64]"] == REPRODUCED
    assert outcomes(latent=(16, 32, 128))["latents [16, 64, 64]"] == REFUTED
    dear = [STEP[0], Count("UNet, one step", round(57.5e9), 57.5e9)]  # eight clips cost eight times as much
    assert outcomes(costs=dear)["57.5 GMACs a step for a batch of eight"] == REFUTED


def test_counts_agree_within_one_per_cent():
    assert Count("", 1_009, 1_000).agrees
    assert not Count("", 1_011, 1_000).agrees
    assert not Count("", 989, 1_000).agrees


# --- what is committed ------------------------------------------------------------------------------------------------


def test_what_is_recorded_is_what_is_counted():
    rows, facts = counted()
    assert read_record(RECORD / "full_size.json", dict) == (tuple(rows), facts)
    assert facts["latent"] == [16, 32, 128]
