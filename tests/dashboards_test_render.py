"""Draws what the panels of a dashboard show, for the documentation, without Grafana. Used by dashboards_test.py --render."""
import math
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of the backend)
from matplotlib.ticker import FuncFormatter  # noqa: E402

COLUMN, ROW = 0.55, 0.36  # inches of a cell of Grafana's grid
SUFFIX = {"reqps": "/s", "cps": "/s", "ops": "/s", "rowsps": "/s", "cpm": "/min", "Bps": "B/s"}


def format_value(value, unit):
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s" and value < 1:
        return f"{1000 * value:.3g} ms"
    if unit == "s":
        return f"{value:.3g} s"
    if unit in ("bytes", "binBps"):
        power = 0 if value < 1 else min(4, int(math.log(value, 1024)))
        return f"{value / 1024**power:.4g} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}{'/s' if unit == 'binBps' else ''}"
    return (f"{value:,.0f}" if value >= 1000 else f"{value:.4g}") + SUFFIX.get(unit, "")


def name_of(legend, labels):
    """The legend with its labels filled in; without the run, which is the same everywhere here."""
    return re.sub(r"\{\{(\w+)\}\} ?", lambda match: "" if match[1] == "run" else labels.get(match[1], "") + " ", legend).strip()


def series_of(panel, api, begin, end):
    step = max(1.0, (end - begin) / 300)
    for target in panel["targets"]:
        for one in api.query_range(target["expr"], begin, end, step):
            points = [(float(at) - begin, float(value)) for at, value in one["values"]]
            if any(math.isfinite(value) for _, value in points):
                yield name_of(target["legendFormat"], one["metric"]), points


def draw_lines(axes, series, panel):
    drawing = panel["fieldConfig"]["defaults"]
    for name, points in series:
        axes.plot([at for at, _ in points], [value for _, value in points], linewidth=1, label=name, clip_on=False)
    axes.margins(y=0.2)  # room for the legend
    axes.set_ylim(bottom=drawing.get("min"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value, drawing["unit"])))
    if any(name for name, _ in series):
        axes.legend(fontsize=5, loc="upper left", ncols=2, frameon=False)


def draw_heatmap(axes, series):
    """Cumulative buckets, one row for each upper bound."""
    rows = sorted(series, key=lambda one: float(one[0]))
    times = sorted({at for _, points in rows for at, _ in points})
    below = {at: 0.0 for at in times}
    counts = []
    for _, points in rows:
        cumulative = dict(points)
        counts.append([max(0.0, cumulative.get(at, below[at]) - below[at]) for at in times])
        below |= cumulative
    axes.pcolormesh(times, range(len(rows)), counts, cmap="Blues", shading="nearest")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=4)


def draw_panel(figure, panel, series, height):
    place = panel["gridPos"]
    axes = figure.add_axes(((place["x"] + 1.1) / 24, 1 - (place["y"] + place["h"] - 1.0) / height, (place["w"] - 1.4) / 24,
                            (place["h"] - 2.2) / height))
    axes.set_title(panel["title"], fontsize=7, loc="left")
    axes.tick_params(labelsize=5)
    if panel["type"] == "stat":
        axes.axis("off")
        unit = panel["fieldConfig"]["defaults"]["unit"]
        text = ", ".join(format_value(points[-1][1], unit) for _, points in series) or "no data"
        axes.text(0, 0.4, text, fontsize=14)
    elif not series:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", fontsize=7, transform=axes.transAxes)
    elif panel["type"] == "heatmap":
        draw_heatmap(axes, series)
    else:
        draw_lines(axes, series, panel)


def render(dashboards, api, begin, end, folder):
    """Writes FOLDER/NAME.png for each dashboard; the horizontal axes are seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, dashboard in dashboards.items():
        height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
        figure = plt.figure(figsize=(24 * COLUMN, height * ROW))
        for panel in dashboard["panels"]:
            if panel["type"] == "row":
                figure.text(0.01, 1 - (panel["gridPos"]["y"] + 0.8) / height, panel["title"], fontsize=9, weight="bold")
            else:
                draw_panel(figure, panel, list(series_of(panel, api, begin, end)), height)
        figure.savefig(folder / f"{name}.png", dpi=100)
        plt.close(figure)
