"""Draws what the panels of a dashboard show, for the documentation, without Grafana. Used by dashboards_test.py --render."""
import io
import itertools
import math
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of the backend)
import numpy  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator  # noqa: E402
from PIL import Image  # noqa: E402

COLUMN, ROW = 0.5, 0.34  # inches of a cell of Grafana's grid
TITLE = 1.4              # cells for the dashboard's own title
POINTS = 300             # of a series
COLOURS = ["#56a64b", "#e0b400", "#3274d9", "#ff780a", "#e02f44", "#a352cc", "#37872d", "#8ab8ff", "#fa6400", "#c4162a"]
GREY = "#8e8e8e"
SUFFIX = {"reqps": "/s", "cps": "/s", "ops": "/s", "rowsps": "/s", "cpm": "/min", "Bps": "B/s"}


def format_value(value, unit):
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s" and value < 1:
        return f"{1000 * value:.3g} ms" if value else "0 s"
    if unit == "s":
        return f"{value:.3g} s"
    if unit in ("bytes", "binBps"):
        power = 0 if value < 1 else min(4, int(math.log(value, 1024)))
        return f"{value / 1024**power:.4g} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}{'/s' if unit == 'binBps' else ''}"
    return (f"{value:,.0f}" if value >= 1000 else f"{value:.4g}") + SUFFIX.get(unit, "")


def locator(unit, span):
    """Round numbers of the unit."""
    if unit not in ("bytes", "binBps"):
        return MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])
    power = 1024 ** max(0, int(math.log(max(span / 5, 1), 1024)))
    steps = [factor * power for factor in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1024)]
    return MultipleLocator(next((step for step in steps if step >= span / 5), steps[-1]))


def format_time(seconds, _):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def name_of(legend, labels):
    """The legend with its labels filled in; without the run, which is the same everywhere here."""
    return re.sub(r"\{\{(\w+)\}\} ?", lambda match: "" if match[1] == "run" else labels.get(match[1], "") + " ", legend).strip()


def series_of(panel, api, begin, end):
    """Names and values at POINTS times from begin to end; NaN where there is none."""
    step = max(1.0, (end - begin) / POINTS)
    times = numpy.arange(0, end - begin, step)
    series = []
    for target in panel["targets"]:
        for one in api.query_range(target["expr"], begin, end, step):
            values = numpy.full(len(times), numpy.nan)
            for at, value in one["values"]:
                index = round((float(at) - begin) / step)
                if index < len(times) and math.isfinite(float(value)):
                    values[index] = float(value)
            if numpy.isfinite(values).any():
                series.append((name_of(target["legendFormat"], one["metric"]), values))
    return times, series


def draw_lines(axes, times, series, panel):
    drawing = panel["fieldConfig"]["defaults"]
    if drawing["custom"].get("stacking"):
        levels = numpy.cumsum([numpy.nan_to_num(values) for _, values in series], axis=0)
        series = [(name, numpy.where(numpy.isnan(values), numpy.nan, level)) for (name, values), level in zip(series, levels)]
    everything = numpy.array([values for _, values in series])
    low = drawing.get("min", numpy.nanmin(everything))
    high = max(numpy.nanmax(everything), low)
    high = drawing.get("max", high + 0.08 * (high - low) if high > low else low + 1)
    opacity = drawing["custom"]["fillOpacity"] / 100
    for (_, values), colour in zip(series, itertools.cycle(COLOURS)):
        axes.plot(times, values, linewidth=1, color=colour, clip_on="max" in drawing)  # a line at 0 is whole
        axes.fill_between(times, values, low, color=colour, alpha=opacity, linewidth=0)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(locator(drawing["unit"], high - low))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value, drawing["unit"])))


def draw_heatmap(axes, times, series):
    """Cumulative buckets, one row for each upper bound."""
    rows = sorted(series, key=lambda one: float(one[0]))
    counts = numpy.diff([numpy.zeros(len(times))] + [numpy.nan_to_num(values) for _, values in rows], axis=0)
    axes.pcolormesh(times, range(len(rows)), numpy.maximum(counts, 0), cmap="Blues", shading="nearest")
    axes.set_yticks(range(len(rows)), [f"{name} s" if math.isfinite(float(name)) else "more" for name, _ in rows], fontsize=4)


def draw_number(figure, panel, times, series, area):
    left, bottom, width, height = area
    axes = figure.add_axes((left, bottom, width, 0.35 * height))
    axes.axis("off")
    unit = panel["fieldConfig"]["defaults"]["unit"]
    text = ", ".join(format_value(values[numpy.isfinite(values)][-1], unit) for _, values in series) or "No data"
    figure.text(left + 0.5 * width, bottom + 0.45 * height, text, fontsize=16, ha="center", va="center", color=COLOURS[0])
    for _, values in series:
        axes.plot(times, values, linewidth=1, color=COLOURS[0])
        axes.fill_between(times, values, min(0, numpy.nanmin(values)), color=COLOURS[0], alpha=0.2, linewidth=0)


def draw_legend(figure, series, left, bottom, width):
    """One line of names below the panel; what does not fit is left out."""
    inches = width * figure.get_figwidth()
    at = 0.0
    for (name, _), colour in zip(series, itertools.cycle(COLOURS)):
        if not name or at + 0.3 + 0.048 * len(name) > inches:
            break
        x = left + at / figure.get_figwidth()
        figure.text(x, bottom, "—", fontsize=7, color=colour, weight="bold", va="center")
        figure.text(x + 0.13 / figure.get_figwidth(), bottom, name, fontsize=5.5, va="center")
        at += 0.3 + 0.048 * len(name)


def draw_panel(figure, panel, times, series, rows):
    place = panel["gridPos"]
    top = TITLE + place["y"]
    x, y = (place["x"] + 0.1) / 24, 1 - (top + place["h"] - 0.1) / rows
    width, height = (place["w"] - 0.2) / 24, (place["h"] - 0.2) / rows
    figure.add_artist(Rectangle((x, y), width, height, facecolor="white", edgecolor="#d8d9da", linewidth=0.6, zorder=-1))
    figure.text(x + 0.2 / 24, 1 - (top + 0.6) / rows, panel["title"], fontsize=7, weight="bold", va="center")
    if panel["type"] == "stat":
        draw_number(figure, panel, times, series, (x, y, width, height))
        return
    axes = figure.add_axes((x + 1.2 / 24, y + 1.5 / rows, width - 1.5 / 24, height - 2.8 / rows))
    if not series:
        axes.axis("off")
        axes.text(0.5, 0.5, "No data", ha="center", va="center", fontsize=9, color=GREY, transform=axes.transAxes)
        return
    if panel["type"] == "heatmap":
        draw_heatmap(axes, times, series)
    else:
        draw_lines(axes, times, series, panel)
        draw_legend(figure, series, x + 0.4 / 24, y + 0.4 / rows, width - 0.6 / 24)
        axes.grid(color="#e9e9ea", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlim(times[0], times[-1])
    axes.xaxis.set_major_locator(MultipleLocator(max(30, 60 * math.ceil(times[-1] / 300))))
    axes.xaxis.set_major_formatter(FuncFormatter(format_time))
    axes.tick_params(labelsize=5, length=0, colors="#464c54")
    axes.spines[:].set_visible(False)


def save(figure, path):
    """With 256 colours: half the size."""
    with io.BytesIO() as buffer:
        figure.savefig(buffer, dpi=100, facecolor="#f4f5f5")
        plt.close(figure)
        Image.open(buffer).convert("RGB").quantize(256, kmeans=2).save(path, optimize=True)


def render(dashboards, api, begin, end, folder):
    """Writes FOLDER/NAME.png for each dashboard; the horizontal axes are minutes since the run began."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, dashboard in dashboards.items():
        rows = TITLE + max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
        figure = plt.figure(figsize=(24 * COLUMN, rows * ROW))
        figure.text(0.2 / 24, 1 - 0.7 / rows, dashboard["title"], fontsize=11, va="center")
        for panel in dashboard["panels"]:
            if panel["type"] == "row":
                y = 1 - (TITLE + panel["gridPos"]["y"] + 0.5) / rows
                figure.text(0.2 / 24, y, f"⌄ {panel['title']}", fontsize=8, va="center")
            else:
                draw_panel(figure, panel, *series_of(panel, api, begin, end), rows)
        save(figure, folder / f"{name}.png")
