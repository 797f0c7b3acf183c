"""The laboratory: which part of the cascade does what, and which claims of the seeds hold.

    variants ─▶ ablation ─▶ results ─▶ measures ─▶ findings, audit, plots

`variants` are settings as data; `ablation` trains them over seeds; `results` keeps a result for each run, and the
record; `measures` are functions of results, from which `findings` makes notebook 02's tables and `audit` the verdicts
on `claims`. `collapse` holds cascades against the law of the RMS for notebook 03, with the instruments of `probes`.
"""
