"""Super-resolution: a clip's missing upper band, restored at 48 kHz by latent diffusion.

    low-resolution clip ─mel─▶ log mel ─vae─▶ latents ─────────────┐
                                  └─encoder─▶ global context ─unet─┴▶ latents ─vae─▶ log mel ─vocoder─▶ upper band
    the clip's own band and the restored one above it ─▶ 48 kHz

Legend: B batch, N samples, F mel bands (256), T mel frames (100 a second), Z latent channels, H × W latent map (F/8 ×
T/8), L context length, C channels.
"""
