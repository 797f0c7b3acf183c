"""Verdicts on seed 004's claims: each comes out both ways."""

import dataclasses

import pytest
import torch

from lib.lab.claims import REFUTED, REPRODUCED
from lib.superres.audit import audit_attention, audit_sizes, near, spread_over_places
from lib.superres.sizes import Cost, Size

AS_SAID = [
    Size("global encoder", 3_232_312, 3_232_312),
    Size("UNet, all of it", 64_876_712, 64_876_712),
    Size("its 18 conditioned transformers", 14_313_024, 14_313_024),
    Size("together", 207_427_841, 207_427_841),
]
STEP = [Cost("vocoder", 1, 1.0), Cost("UNet, one step", round(57.5e9 / 8), 57.5e9)]


def outcomes(sizes=AS_SAID, costs=STEP, transformers=18, latent=(16, 64, 64)):
    return {verdict.said: verdict.verdict for verdict in audit_sizes(sizes, costs, transformers, latent)}


def test_what_is_as_said_is_reproduced():
    found = outcomes()
    assert set(found.values()) == {REPRODUCED}
    assert len(found) == 3 + 4  # the transformers are no part of their own


@pytest.mark.parametrize("place", range(4))
def test_another_count_is_refuted_and_nothing_else(place):
    sizes = list(AS_SAID)
    sizes[place] = dataclasses.replace(sizes[place], counted=round(1.02 * sizes[place].counted))
    refuted = [said for said, verdict in outcomes(sizes).items() if verdict == REFUTED]
    assert len(refuted) == 1
    named = (
        "with 14.3 M parameters" if place == 2 else f"{sizes[place].part}: {sizes[place].said / 1e6:.2f} M parameters"
    )
    assert refuted == [named]


def test_transformers_latents_and_costs_are_refuted_by_others():
    assert outcomes(transformers=12)["18 (or 12) conditioned transformers"] == REPRODUCED
    assert outcomes(transformers=32)["18 (or 12) conditioned transformers"] == REFUTED
    assert outcomes(latent=[16, 64, 64])["latents [16, 64, 64]"] == REPRODUCED
    assert outcomes(latent=(16, 32, 128))["latents [16, 64, 64]"] == REFUTED
    dear = [STEP[0], Cost("UNet, one step", round(57.5e9), 57.5e9)]  # eight clips cost eight times as much
    assert outcomes(costs=dear)["57.5 GMACs a step for a batch of eight"] == REFUTED


def test_near_is_within_a_per_cent():
    assert near(100.9, 100)
    assert not near(101.1, 100)
    assert not near(98.9, 100)


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
