"""What was measured, as tables: ratios first."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lib.report.report import Table
from lib.util.provenance import versions

Rows = Sequence[Mapping[str, Any]]


def _race(rows: Rows) -> Rows:
    return [
        {
            "what": row["what"],
            "clips × frames": f"{row['batch']} × {row['frames']}",
            "times the stock build": f"{row['ratio']:.2f}",
            "highest possible": f"{row['highest_ratio']:.2f}",
            "share of the limit": f"{row['here_share_of_limit']:.0%}",
            "stock build's share": f"{row['baseline_share_of_limit']:.0%}",
            "seconds": f"{row['here_s']:.3g}",
            "stock build's": f"{row['baseline_s']:.3g}",
            "MiB a clip": f"{row['here_mib_per_clip']:.0f}",
            "stock build's MiB": f"{row['baseline_mib_per_clip']:.0f}",
        }
        for row in rows
    ]


def _curves(found: dict[str, Any]) -> Rows:
    curves = found["curves"]
    what = f"mean loss of the last {curves['last']} of {curves['steps']} steps, batch {curves['batch']}, "
    what += f"{curves['frames']} frames, each seed"
    precisions = {"baseline": "fp32", "here": curves["precision"]}
    rows = [
        {"build": f"{name}, {precisions[name]}", what: ", ".join(f"{x:.5f}" for x in values)}
        for name, values in curves["last_losses"].items()
    ]
    rows += [
        {"build": "difference of the means", what: f"{curves['difference']:+.5f}"},
        {"build": "between seeds", what: f"{curves['seed_spread']:.5f}"},
        {"build": "do they agree?", what: "yes" if curves["agree"] else "no"},
    ]
    return rows


def _data(found: dict[str, Any]) -> Rows:
    return [
        {
            "pairs": f"{row['pairs']:,}",
            "open and shuffle": f"{row['open_and_shuffle_s']:.2f} s, {row['open_and_shuffle_mib']:.0f} MiB",
            "read a step of 8": f"{row['read_ms']:.1f} ms",
            f"stall of a step of {row['step_s']:g} s": f"{row['stall']:.2%}",
        }
        for row in found["data"]
    ]


def _codecs(found: dict[str, Any]) -> Rows:
    return [
        {
            "codec": f"{row['codec']} {row['what']}",
            "times the package": f"{row['ratio']:.2f}" if "ratio" in row else "",
            "times real time": f"{row['times_real_time']:.0f}",
        }
        for row in found["codecs"]
    ]


def _fusing(found: dict[str, Any]) -> Rows:
    fusing = found["fusing"]
    stages = [
        {"stage": name, "times real time": f"{value:.0f}", "s": f"{fusing['stages_seconds'][name]:.2f}"}
        for name, value in fusing["stages_times_real_time"].items()
    ]
    whole = {
        "stage": "all of it",
        "times real time": f"{fusing['times_real_time']:.1f}",
        "s": f"{fusing['seconds']:.2f}",
    }
    growth = {"stage": "memory, last third over the second", "s": f"{fusing['memory_growth_mib']:+.1f} MiB"}
    return [*stages, whole, growth]


def _shares(shares: Mapping[str, float]) -> Rows:
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return [{"part": name, "share": f"{value:.1%}"} for name, value in ordered]


def _objective(found: dict[str, Any]) -> Rows:
    objective = found["objective"]
    rows = _shares(objective["shares"])
    rows.append({"part": "the parts together", "share": f"{objective['sum_of_parts_s']:.2f} s"})
    rows.append({"part": "the whole step", "share": f"{objective['step_s']:.2f} s"})
    rows.append({"part": "all terms on sound", "share": f"{objective['sound_over_cascade']:.1%} of the cascade"})
    return rows


def _flat(values: Mapping[str, Any]) -> Rows:
    return [{name: f"{x:.4g}" if isinstance(x, float) else str(x) for name, x in values.items()}]


TABLES: dict[str, Callable[[dict[str, Any]], Rows]] = {
    # without commit and versions: only record.json of a record names them
    "machine": lambda found: _flat({name: x for name, x in found["machine"].items() if name not in versions()}),
    "limit": lambda found: _flat(found["limit"]),
    "cascade": lambda found: _race(found["cascade"]),
    "sweep": lambda found: _race([row for rows in found["sweep"].values() for row in rows]),
    "curves": _curves,
    "codecs": _codecs,
    "intake": lambda found: [row for values in found["intake"] for row in _flat(values)],
    "fusing": _fusing,
    "data": _data,
    "objective": _objective,
    "kernels": lambda found: _shares(found["kernels"]),
    "scaling": lambda found: _flat(found["scaling"]),
    "paper": lambda found: [
        {"link": row["link"], "devices": row["devices"]}
        | {name: f"{row[name]:.1%}" for name in ("efficiency", "efficiency_overlapped")}
        for row in found["paper"]
    ],
    "explorer": lambda found: [{"slider": r["slider"], "ms": f"{r['ms']:.0f}"} for r in found["explorer"]],
    "superres": lambda found: [
        {"one pass over 10.24 s": r["what"], "GMACs": f"{r['gmacs']:,.0f}", "seconds": f"{r['s']:.3g}"}
        | {"share of the limit": f"{r['share']:.0%}"}
        for r in found["superres"]
    ],
    "restoring": lambda found: [
        {"steps of the sampler": r["steps"], "times real time": f"{r['times_real_time']:.1f}"}
        | {"memory, last third over the second": f"{r['memory_growth_mib']:+.1f} MiB"}
        for r in found["restoring"]
    ],
    "gpu": lambda found: _flat(found["gpu"]),
}


def as_text(name: str, found: dict[str, Any]) -> str:
    return repr(Table(TABLES[name](found)))


def as_markdown(found: dict[str, Any]) -> str:
    """Every part that was measured, under its name."""
    return "\n".join(f"## {name}\n\n{markdown(TABLES[name](found))}" for name in TABLES if name in found)


def markdown(rows: Rows) -> str:
    table = Table(rows)
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
