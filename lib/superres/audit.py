"""The verdicts on what source document 004 claims of its attention; `make record` has those on its sizes."""

from torch import Tensor

from lib.lab.claims import Verdict, decide

ALIKE = 1e-5  # relative spread over positions, below which all of them receive the same


def audit_attention(pooled: Tensor, sequence: Tensor) -> list[Verdict]:
    """C18, from the attention outputs `[C, H, W]` for one pooled vector and for a sequence as context."""
    verdicts = []
    for part, received, why in (("pooled", pooled, ""), ("sequence", sequence, "the repair that is the default here")):
        differ = (spread := spread_over_places(received)) > ALIKE
        found = f"places differ by {spread:.0%} of what they receive" if differ else "every place receives the same"
        verdicts.append(decide(f"C18.{part}", holds=differ, found=found, why=why))
    return verdicts


def spread_over_places(received: Tensor) -> float:
    """RMS distance of `[C, H, W]` from its mean over places, relative to its RMS."""
    deviation = received - received.mean(dim=(1, 2), keepdim=True)
    return float(deviation.square().mean().sqrt() / received.square().mean().sqrt())
