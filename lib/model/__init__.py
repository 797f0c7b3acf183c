"""The model, and the law of its instability.

- `cascade`: stages of transformers and the configs that describe them; read it top to bottom
- `projection`: the spectral-norm projection that ends every stage, and the RMS ceiling it implies
- `rms_law`: the RMS of every stage, predicted before training; `check_collapse`
- `masks`: what is taken from each clip, learned or by rule
- `discriminator`: its logit says whether latents are real or generated
- `fusion`: masks and cascade as one model; `load_model` for that of a trained run
- `import_original`: checkpoints of the original implementation
"""

from lib.model.cascade import Cascade, CascadeConfig, StageConfig, StageTrace
from lib.model.discriminator import Discriminator
from lib.model.fusion import FusionModel, load_model
from lib.model.import_original import import_original_checkpoint
from lib.model.masks import MaskGenerator, MaskingConfig
from lib.model.projection import SpectralLinear, rms_ceiling, spectral_sigma
from lib.model.rms_law import check_collapse
