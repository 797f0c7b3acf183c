"""The completed mel: what it leaves alone, what it starts as, and that it learns what regression cannot."""

import pytest
import torch

from lib.superres.baselines import MelStatistics, neighbours
from lib.superres.completion import SHARE, Completion, CompletionConfig, missing_bands
from lib.superres.mel import MELS, known_bands

SIZES = CompletionConfig(hidden_dim=32, num_layers=2)


def statistics_of(mel: torch.Tensor) -> MelStatistics:
    return MelStatistics(mel.mean(dim=(0, 1, 3)), torch.cov(neighbours(mel).flatten(0, 1).mT))


def clips(seed: int) -> torch.Tensor:
    """Mels whose bands below 8 kHz follow a level, and those above its square: nothing linear tells it."""
    level, noise = torch.randn(2, 12, 1, MELS, 40, generator=torch.Generator().manual_seed(seed))
    mel = level[:, :, :1] + 0.1 * noise
    mel[:, :, known_bands(8_000) :] = level[:, :, :1].square() + 0.1 * noise[:, :, known_bands(8_000) :]
    return mel


def test_untrained_it_is_the_regression():
    mel = clips(0)
    completion = Completion(SIZES, statistics_of(mel))
    for cutoff in (2_000, 8_000):
        assert torch.equal(completion.complete(mel, cutoff), completion.statistics.predicted(mel, cutoff))


def test_a_share_of_the_correction_is_added_where_bands_are_missing():
    torch.manual_seed(0)
    mel = clips(0)
    completion = Completion(SIZES, statistics_of(mel))
    torch.nn.init.normal_(completion.network[-1].weight)
    made, linear = completion.complete(mel, 8_000), completion.statistics.predicted(mel, 8_000)
    known = known_bands(8_000)
    assert torch.equal(made[:, :, :known], mel[:, :, :known])
    correction = completion(linear, missing_bands(8_000).expand(12, -1))
    assert correction[:, :, :known].abs().max() == 0
    assert correction[:, :, known:].abs().mean() > 0.1
    torch.testing.assert_close(made, linear + SHARE * correction)
    assert 0 < SHARE < 1
    above = mel.clone()
    above[:, :, known:] += 5  # what is above the cutoff is not looked at
    assert torch.equal(completion.complete(above, 8_000), made)


def test_it_learns_what_no_regression_can():
    torch.manual_seed(0)
    mel, held_out = clips(0), clips(1)
    completion, missing = Completion(SIZES, statistics_of(mel)), missing_bands(8_000).expand(12, -1)
    linear = completion.statistics.predicted(mel, 8_000)
    optimizer = torch.optim.Adam(completion.parameters(), 1e-2)
    for _ in range(60):
        loss = ((linear + completion(linear, missing) - mel) * missing[:, None, :, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before, after = (
        (made - held_out)[:, :, known_bands(8_000) :].square().mean().item()
        for made in (completion.statistics.predicted(held_out, 8_000), completion.complete(held_out, 8_000))
    )
    assert after < 0.5 * before  # (1 − SHARE)² is left where the correction is right


def test_statistics_are_part_of_the_weights():
    one, other = Completion(SIZES, statistics_of(clips(0))), Completion(SIZES)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.complete(clips(1), 4_000), one.complete(clips(1), 4_000))


@pytest.mark.parametrize("cutoff", [2_000, 16_000])
def test_missing_bands_begin_where_known_ones_end(cutoff):
    assert missing_bands(cutoff).tolist() == [0.0] * known_bands(cutoff) + [1.0] * (MELS - known_bands(cutoff))
