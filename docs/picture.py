#!/usr/bin/env python3
"""Draws docs/dashboard.png: the dashboard's main panels after one run of the tutorial's load test.

    make picture

It starts the local stack with one process of the service, lets it grow to five by the rule of the demo, places the
load on it with order-load, then asks the stack's Prometheus the queries of grafana/dashboard.json and draws what
it answers, in the file's colours. No Grafana is involved, and no KEDA. The environment sets:

    PICTURE_PHASES  what to send, 30s@5,60s@0,30s@2
    PICTURE_FILE    where to draw, docs/dashboard.png
    PICTURE_DATA    what Prometheus answered is kept here, target/picture.json; `picture.py draw` draws it again
    STACK_SERVICE   the program, target/release/order-service; order-load is looked for beside it
"""

import json
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = json.loads((ROOT / "grafana/dashboard.json").read_text())
PANELS = [
    "Orders against capacity", "Replicas", "Share of calls by replica",
    "Request Rate", "Average Response Time", "Latency heatmap",
]
# What Grafana would put in. It makes $__rate_interval four scrapes, of the 5 s that are usual.
VARIABLES = {
    "$__rate_interval": "20s", "$threshold": "20", "$namespace": ".*", "$job": ".+", "$pod": ".*", "$instance": ".+",
}
MAX_REPLICAS = 5
BEFORE, AFTER = 5, 15  # seconds around the load

# Grafana's dark theme.
CANVAS, PANEL, GRID, TEXT, FAINT = "#111217", "#181b1f", "#2c3035", "#ccccdc", "#8e8e9a"
COLOURS = {
    "green": "#73bf69", "yellow": "#fade2a", "orange": "#ff9830", "red": "#f2495c", "blue": "#5794f2",
    "purple": "#b877d9",
}
CLASSIC = ["#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0"]


def panel(title):
    return next(panel for panel in DASHBOARD["panels"] if panel["title"] == title)


def seconds(phases):
    """How long the load takes."""
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    spans = [re.match(r"(\d+)([a-z]+)@", phase) for phase in phases.split(",")]
    return [int(span[1]) * units[span[2]] for span in spans]


def record(phases):
    """One run; what Prometheus answers afterwards to the queries of the panels."""
    service = Path(os.environ.get("STACK_SERVICE", ROOT / "target/release/order-service"))
    environment = {
        "STACK_API_PORT": "0", "STACK_ADMIN_PORT": "0", "STACK_PROMETHEUS_PORT": "0",
        # Connections move to new processes within the phases of a run this short.
        "ORDER_MAX_CONNECTION_AGE": "10s",
        **os.environ,
        "STACK_REPLICAS": "1", "STACK_MAX_REPLICAS": str(MAX_REPLICAS),
    }
    stack = subprocess.Popen(
        [sys.executable, "-B", str(ROOT / "stack/stack.py")], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        said = {}
        for line in stack.stdout:
            print(line, end="", flush=True)
            name, _, rest = line.partition(" ")
            said[name] = rest.split()
            if name == "Ready.":
                break
        else:
            raise SystemExit("the stack did not start")
        api, prometheus = said["API"][0].rstrip(","), said["Prometheus"][0]
        time.sleep(BEFORE)
        begun = time.time()
        load = [str(service.parent / "order-load"), "--target", api, "--phases", phases, "--connections", "20"]
        table = subprocess.run([*load, "--json"], check=True, stdout=subprocess.PIPE, text=True).stdout
        time.sleep(AFTER)
        answers = [
            [(target["legendFormat"], ask(prometheus, target["expr"], begun)) for target in panel(title)["targets"]]
            for title in PANELS
        ]
    finally:
        stack.terminate()
        stack.communicate()
    return {"phases": phases, "begun": begun, "answers": answers, "load": json.loads(table)}


def ask(prometheus, query, begun):
    """The series of a query over the run."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    form = {"query": query, "start": begun - BEFORE, "end": time.time(), "step": 1}
    url = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(form)}"
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)["data"]["result"]


def axis_text(unit):
    """How an axis writes its values."""
    def written(value, _):
        if unit == "percentunit":
            return f"{value:.0%}"
        if unit == "s":
            return f"{value:g} s" if value >= 1 else f"{value * 1000:g} ms"
        return f"{value:g}"
    return FuncFormatter(written)


def draw_graph(axes, shape, answers, begun):
    """Lines or stacked areas, with the colours and styles of the file's overrides."""
    defaults = shape["fieldConfig"]["defaults"]
    overrides = {
        override["matcher"]["options"]: {p["id"]: p["value"] for p in override["properties"]}
        for override in shape["fieldConfig"]["overrides"]
    }
    custom = defaults["custom"]
    series = []
    for legend, found in answers:
        for one in found:
            name = re.sub(r"{{(\w+)}}", lambda label: one["metric"].get(label[1], ""), legend)
            series.append((name, {float(at) - begun: float(value) for at, value in one["values"]}))
    series.sort(key=lambda one: one[0] if "{{" in answers[0][0] else "")
    known = {at for _, points in series for at in points}
    # Every second of the run: where a query had no data there is a gap.
    times = [min(known) + second for second in range(round(max(known) - min(known)) + 1)]
    series = [(name, {round(at): value for at, value in points.items()}) for name, points in series]
    step = custom.get("lineInterpolation") == "stepAfter"
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    base = [0.0] * len(times)
    for index, (name, points) in enumerate(series):
        own = overrides.get(name, {})
        fixed = own.get("color", {}).get("fixedColor")
        colour = COLOURS.get(fixed, fixed) or CLASSIC[index % len(CLASSIC)]
        values = [points.get(round(at), float("nan")) for at in times]
        if stacked:
            # A series that is not there adds nothing; where none is, nothing is drawn.
            idle = [all(round(at) not in others for _, others in series) for at in times]
            top = [low + (0.0 if value != value else value) for low, value in zip(base, values)]
            axes.fill_between(times, base, top, where=[not one for one in idle], step="post" if step else None, color=colour, alpha=0.75, zorder=2,
                              linewidth=0, label=name)
            base = top
        else:
            dashes = "--" if "custom.lineStyle" in own else "-"
            # The first is the widest, so that it shows where others lie over it.
            axes.plot(times, values, dashes, drawstyle="steps-post" if step else "default", color=colour,
                      linewidth=3 if index == 0 else 1.8, label=name)
    if defaults.get("decimals") == 0:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, defaults.get("max"))
    if "max" not in defaults:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    return defaults["unit"]


def draw_heatmap(axes, shape, answers, begun):
    """Calls per second in each bucket: cumulative counts, less those of the bucket below."""
    found = {float(one["metric"]["le"].replace("+Inf", "inf")): dict(one["values"]) for one in answers[0][1]}
    bounds = sorted(found)
    times = sorted({at for points in found.values() for at in points})
    rows, below = [], [0.0] * len(times)
    for bound in bounds:
        total = [float(found[bound].get(at, 0)) for at in times]
        rows.append([max(0.0, high - low) or float("nan") for high, low in zip(total, below)])
        below = total
    used = [i for i, row in enumerate(rows) if any(value == value for value in row)] or [0]
    first, last = max(0, min(used) - 1), min(len(rows) - 1, max(used) + 1)
    edges = [at - begun for at in times] + [times[-1] - begun + 1]
    axes.pcolormesh(edges, range(last - first + 2), rows[first:last + 1], cmap="Oranges_r", shading="flat")
    axes.set_yticks(range(1, last - first + 2))
    axes.set_yticklabels([f"{bound * 1000:g} ms" if bound < 1 else f"{bound:g} s" for bound in bounds[first:last + 1]])
    return None


def draw(data, file):
    """The panels, three in a row."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": TEXT})
    figure, grid = plt.subplots(2, 3, figsize=(15, 7.6), dpi=110, facecolor=CANVAS)
    spans = seconds(data["phases"])
    end = sum(spans) + AFTER
    for axes, title, answers in zip(grid.flat, PANELS, data["answers"]):
        shape = panel(title)
        axes.set_facecolor(PANEL)
        heatmap = shape["type"] == "heatmap"
        unit = (draw_heatmap if heatmap else draw_graph)(axes, shape, answers, data["begun"])
        axes.set_title(title, loc="left", color=TEXT, fontsize=11, fontweight="bold", pad=8)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_color(GRID)
        axes.tick_params(colors=FAINT, labelsize=8, length=0)
        axes.set_xlim(0, end)
        axes.xaxis.set_major_locator(plt.MultipleLocator(30 if end > 60 else 5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{int(at) // 60}:{int(at) % 60:02}"))
        if unit:
            axes.yaxis.set_major_formatter(axis_text(unit))
        at = 0
        for span, phase in zip(spans, data["phases"].split(",")):
            if not phase.endswith("@0"):
                axes.axvspan(at, at + span, color="#ffffff", alpha=0.05, linewidth=0, zorder=0)
            at += span
        if not heatmap:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=5, frameon=False, labelcolor=TEXT,
                        fontsize=8, handlelength=1.2, columnspacing=1.2)
    placed = sum(phase["ok"] for phase in data["load"]["phases"])
    failed = sum(phase["sent"] - phase["ok"] for phase in data["load"]["phases"])
    figure.text(0.01, 0.965, DASHBOARD["title"], fontsize=15, fontweight="bold")
    figure.text(
        0.145, 0.967,
        f"order-load {data['phases']}: {placed} orders placed, {failed} failed. Drawn from the dashboard's queries.",
        fontsize=10, color=FAINT,
    )
    figure.subplots_adjust(left=0.04, right=0.985, top=0.9, bottom=0.08, wspace=0.16, hspace=0.42)
    figure.savefig(file, facecolor=CANVAS)


if __name__ == "__main__":
    kept = Path(os.environ.get("PICTURE_DATA", ROOT / "target/picture.json"))
    if sys.argv[1:] != ["draw"]:
        kept.write_text(json.dumps(record(os.environ.get("PICTURE_PHASES", "30s@5,60s@0,30s@2"))))
    target = os.environ.get("PICTURE_FILE", ROOT / "docs/dashboard.png")
    draw(json.loads(kept.read_text()), target)
    print(f"drawn: {target}")
