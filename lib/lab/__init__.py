"""The laboratory: which part of the cascade does what, and which claims of the seeds hold.

    variants ─▶ ablation ─▶ results ─▶ findings, audit, plots

`variants` are settings as data; `ablation` trains them over seeds; `results` keeps a result for each run, the record,
and what is measured of them; `findings` makes notebook 02's tables of it and `audit` the verdicts on `claims`. `probes`
measures cascades for notebook 03 and holds them against the law of the RMS.
"""
