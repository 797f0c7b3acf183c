"""How good a fusion is, measured.

- `metrics`: objective metrics of a reconstruction and of fused latents (`evaluate_fusion`)
- `fusion_metrics`: of fused sound (`sound_metrics`), among them the figure of merit
- `baselines`: outputs that need no training, and a model compared with them on the same pairs (`measure_fusions`)
"""

from lib.evaluation.baselines import advantage, baseline_losses, measure_fusions
from lib.evaluation.fusion_metrics import sound_features, sound_metrics
from lib.evaluation.metrics import evaluate_fusion
