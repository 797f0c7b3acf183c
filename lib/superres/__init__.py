"""Super-resolution: a clip's missing upper band, restored at 48 kHz by latent diffusion.

    low-resolution clip ─mel─▶ log mel ─vae─▶ latents ─────────────┐
                                  └─encoder─▶ global context ─unet─┴▶ latents ─vae─▶ log mel ─vocoder─▶ upper band
    the clip's own band and the restored one above it ─▶ 48 kHz

`degradation` makes training pairs, `training` trains the parts into runs, `resolver` restores clips, signals and files
with them, `evaluation` measures the distance to the original, `audit` counts the full sizes against seed 004, `audiosr`
imports the parts of a public checkpoint.

Legend: B batch, N samples, F mel bands (256), T mel frames (100 a second), Z latent channels, H × W latent map (F/8 ×
T/8), L context length, C channels.
"""
