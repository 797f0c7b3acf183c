"""The laboratory: which part of the cascade does what, and which claims of the source documents hold.

variants ─▶ ablation ─▶ results ─▶ findings, audit, plots     notebook 02
probes, which hold cascades against the law of the RMS        notebook 03
"""
