"""How good a fusion is, measured.

- `metrics`: objective metrics of a reconstruction, of fused latents (`evaluate_fusion`) and of sound (`sound_metrics`)
- `baselines`: outputs that need no training, and a model compared with them on the same pairs (`measure_fusions`)
"""

from lib.evaluation.baselines import advantage, baseline_losses, measure_fusions
from lib.evaluation.metrics import evaluate_fusion, sound_features, sound_metrics
