"""Verdicts on attention that come out both ways."""

import pytest
import torch

from lib.lab.claims import REFUTED, REPRODUCED
from lib.superres.audit import audit_attention, spread_over_places


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
