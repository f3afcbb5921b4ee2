"""What a run found: printed row by row, written after every part, and summed up against the goals."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measured_code import code_digest

Row = dict[str, Any]

# Rows whose bound is shorter than this do not fill the device: launch latency is what they show.
FILLS_DEVICE_MICROSECONDS = 50.0


# Sections by the part of the benchmark that fills them, and how its tasks are called.
SECTIONS_AND_TASKS = {
    "kernels": (("checks", "kernels"), ("checks", "timings")),
    "engine": (("engine", "readiness"), ("engine",)),
    "baselines": (("baselines", "cublas"), ("baselines",)),
}
SECTIONS = {part: sections for part, (sections, _) in SECTIONS_AND_TASKS.items()}


class Report:
    def __init__(self, output: Path, options: Row, earlier: Row, parts: Sequence[str]) -> None:
        """`earlier`: the record of another run on this device, or {}: it is kept but for `parts`, measured anew."""
        self.output = output
        self.record: Row = {
            "kind": "gpu",
            "code": code_digest("gpu"),
            "options": options,
            "complete": False,
            "errors": {},
        }
        for part, (sections, names) in SECTIONS_AND_TASKS.items():
            if part not in parts:
                self.record |= {section: earlier[section] for section in sections if section in earlier}
                errors = earlier.get("errors", {})
                self.record["errors"] |= {name: text for name, text in errors.items() if name.startswith(names)}
        self._written = 0.0

    def add(self, section: str, row: Row) -> None:
        self._add(section, row)
        # A run that is killed leaves what it has.
        if time.monotonic() > self._written + 3 and "environment" in self.record:
            self.write()

    def _add(self, section: str, row: Row) -> None:
        if section in ("environment", "ceilings"):
            self.record.setdefault(section, {}).update(row)
            print(f"{section}: " + ", ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
            return
        rows = self.record.setdefault(section, [])
        rows.append(row)
        print(LINES[section](row), flush=True)

    def fail(self, errors: dict[str, str]) -> None:
        for name, text in errors.items():
            self.record["errors"][name] = text[-4000:]
            print(f"FAILED {name}\n{text}", flush=True)

    def write(self, *, complete: bool = False) -> Path:
        """benchmarks/results/<device>-<date>.json; a later part of the same run overwrites it."""
        self.record["complete"] = complete
        self.record["summary"] = summary(self.record)
        environment = self.record.get("environment", {})
        device = str(environment.get("device", "unknown")).lower().replace(" ", "-")
        stem = "".join(c for c in device if c.isalnum() or c in "-.") + f"-{environment.get('date', 'undated')}"
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / f"{stem}.json"
        path.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        self._written = time.monotonic()
        return path

    @property
    def passed(self) -> bool:
        checks = self.record.get("checks", [])
        compiled = [row for row in self.record.get("readiness", []) if not row["ok"]]
        return all(row["ok"] for row in checks) and not compiled and not self.record["errors"]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_line(row: Row) -> str:
    verdict = "ok" if row["ok"] else "WRONG"
    return f"{verdict:5s} {row['op']:18s} {row['dtype']:9s} {row['error']:9.2e} of {row['bound']:.1e}  {row['case']}"


def _kernel_line(row: Row) -> str:
    more = "  ".join(f"{key} {_short(value)}" for key, value in row.get("versus", {}).items())
    return (
        f"{row['op']:18s} {row['model']:11s} {row['case']:34s} {row['microseconds']:10.2f} us  "
        f"bound {row['bound_microseconds']:10.2f} ({row['bound_by']})  {100 * row['ratio']:6.1f} %  "
        f"+-{100 * row['spread']:.0f} %  {more}"
    )


def _engine_line(row: Row) -> str:
    more = "  ".join(f"{key} {_short(row[key])}" for key in ENGINE_MORE if row.get(key) is not None)
    head = f"{row['model']:11s} batch {row['batch']:3d} {row['case']:28s}"
    return f"{head} {row['tokens_per_second']:10.1f} tokens/s  {more}"


def _ready_line(row: Row) -> str:
    late = "" if row["ok"] else "  LATE: " + "; ".join(row["compiled_after_ready"])
    return (
        f"{row['model']:11s} ready in {row['seconds']:.1f} s, {row['compiled_before_ready']} variants compiled before "
        f"and {len(row['compiled_after_ready'])} after{late}"
    )


ENGINE_MORE = (
    "step_ms",
    "replay_ms",
    "execute_ms",
    "bound_ms",
    "ratio",
    "replay_ratio",
    "vs",
    "vs_ratio",
    "vs_replay_ratio",
    "spread",
)
LINES = {
    "checks": _check_line,
    "kernels": _kernel_line,
    "engine": _engine_line,
    "baselines": _engine_line,
    "cublas": _kernel_line,
    "readiness": _ready_line,
}


def summary(record: Row) -> Row:
    """By goal of the design: what was measured (the worst where there are several), the goal, and whether it is met.

    A goal without a measurement has the value None: it stays open.
    """
    kernels, engine = record.get("kernels", []), record.get("engine", [])
    decode = [r for r in kernels if r["op"] == "paged_attention" and r["case"].startswith("decode")]
    filling = [r for r in decode if r["bound_microseconds"] >= FILLS_DEVICE_MICROSECONDS]
    plain = [r["ratio"] for r in filling if not r["case"].endswith("readout")]
    readouts = [r["versus"]["overhead"] for r in filling if r["case"].endswith("readout")]
    sparse = [r["ratio"] for r in kernels if r["op"] == "sparse_mlp" and r["case"].startswith("keep 0.5 ")]

    def ratios(case: str, batch: int, key: str) -> list[float]:
        return [r[key] for r in engine if r["case"] == case and r["batch"] == batch and r.get(key) is not None]

    def steering(case: str, goal: float) -> Row:
        row = _goal(ratios(case, 256, "vs_ratio"), goal, min)
        return {**row, "replay_values": ratios(case, 256, "vs_replay_ratio")}

    clamps = [1 / value - 1 for value in ratios("neuron clamps", 256, "vs_ratio")]
    batch1 = _goal(ratios("unsteered", 1, "ratio"), 0.82, min)
    return {
        "attention_decode_vs_bound": _goal(plain, 0.80, min),
        "attention_readout_overhead": _goal(readouts, 0.03, max),
        "all_layer_steering_256": steering("all layers", 0.98),
        "distinct_programs_256": steering("256 programs", 0.97),
        "neuron_clamps_overhead": _goal(clamps, 0.01, max),
        "sparse_mlp_vs_bound_keep50": _goal(sparse, 0.90, min),
        "batch1_decode_vs_bound": {**batch1, "replay_values": ratios("unsteered", 1, "replay_ratio")},
    }


def _goal(values: list[float], goal: float, worst: Any) -> Row:
    """`value` is the worst of `values`, which are of one shape or case each."""
    if not values:
        return {"value": None, "goal": goal, "met": None, "values": []}
    value = worst(values)
    met = value >= goal if worst is min else value <= goal
    return {"value": round(value, 4), "goal": goal, "met": met, "values": [round(v, 4) for v in values]}


def final_table(record: Row) -> str:
    checks = record.get("checks", [])
    wrong = [row for row in checks if not row["ok"]]
    lines = [f"checks: {len(checks)}, wrong: {len(wrong)}"]
    lines += ["  " + _check_line(row) for row in wrong]
    lines += ["engine: " + _ready_line(row) for row in record.get("readiness", [])]
    for name, row in record["summary"].items():
        direction = "at most" if name.endswith("overhead") else "at least"
        value = "not measured" if row["value"] is None else f"{100 * row['value']:.2f} %"
        met = {None: "open", True: "met", False: "MISSED"}[row["met"]]
        each = " ".join(f"{100 * v:.1f}" for v in row["values"])
        if row.get("replay_values"):
            each += " | replays alone " + " ".join(f"{100 * v:.1f}" for v in row["replay_values"])
        lines.append(f"{name:28s} {value:>14s}  goal {direction} {100 * row['goal']:.0f} %  {met:6s}  [{each}]")
    lines += [f"FAILED {name}: {text.strip().splitlines()[-1]}" for name, text in record["errors"].items()]
    return "\n".join(lines)
