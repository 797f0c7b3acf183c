"""How good a fusion is: metrics of latents and of sound, and baselines that a model is compared with."""

from lib.evaluation.baselines import advantage, encoded, mean_metrics, measure_fusions
from lib.evaluation.fusion_metrics import sound_features, sound_metrics
from lib.evaluation.metrics import evaluate_fusion
