"""Fuse two clips of music in the latent space of a frozen codec; study why the cascade that does it can explode."""
