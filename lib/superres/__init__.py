"""Super-resolution: a clip's missing upper band, restored at 48 kHz: what is expected, and draws of latent diffusion.

    low-resolution clip ─mel─▶ log mel ─completion─▶ expected log mel ─vocoder─▶ upper band
    for a draw: expected log mel ─vae─▶ latents ─unet, which sees a global context─▶ latents ─vae─▶ log mel
    the clip's own band and the restored one above it ─▶ 48 kHz

Legend: B batch, N samples, F mel bands (256), T mel frames (100 a second), Z latent channels, H × W latent map (F/8 ×
T/8), L context length, C channels.
"""
