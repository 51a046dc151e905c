"""Pictures as SVG: plain data in, a string out. Of a run: draw_curves; of a search: draw_heads, draw_backbone,
draw_surrogate, draw_halving; of a study: draw_scores, draw_matrices, draw_costs."""

import math
from itertools import cycle
from xml.sax.saxutils import escape

from models import OPS, plan, stage_macs, true_name

COLOURS = dict(zip(OPS, cycle(["#000000", "#999999", "#CC79A7", "#D55E00", "#0072B2", "#009E73", "#E69F00"])))


def _svg(width: float, height: float, title: str, parts: list[str]) -> str:
    title = f'<text x="20" y="26" font-size="15">{escape(title)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        + "\n".join([title, *parts])
        + "</svg>\n"
    )


def _ticks(low: int, high: int, most: int) -> range:
    """Round numbers from low to high, about `most` of them."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if (high - low) / s <= most)
    return range(-(-low // step) * step, high + 1, step)


def draw_heads(history: list[dict], dims: dict[str, list[int]], title: str) -> str:
    """SVG: softmax(alpha) of each layer over the epochs, and under it what it chose, by true_name; dims by head."""
    cell, wide, tall, row = 150, 126, 84, 168
    heads = history[-1]["ops"]
    width = 40 + cell * max(map(len, heads.values()))
    svg = []
    for k, (op, colour) in enumerate(COLOURS.items()):
        x, y = 20 + 150 * (k % (width // 150)), 50 + 18 * (k // (width // 150))
        svg.append(f'<line x1="{x}" x2="{x + 16}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>')
        svg.append(f'<text x="{x + 22}" y="{y}">{op}</text>')
    top = 68 + 18 * (-(-len(OPS) // (width // 150)))
    for head, ops in heads.items():
        curves = [line["alphas"][head] for line in history]  # (epochs + 1, L, 7)
        peak = max(0.3, max(p for line in curves for layer in line for p in layer))
        svg.append(f'<text x="20" y="{top}" font-weight="bold">{head}</text>')
        scale = f"softmax(alpha), 0 to {peak:.2f}, over {len(history) - 1} epochs; chosen below"
        svg.append(f'<text x="90" y="{top}" fill="#666">{scale}</text>')
        for layer, op in enumerate(ops):
            label = true_name(op, dims[head][layer], dims[head][layer + 1])
            x0, y0 = 20 + cell * layer, top + 10
            svg.append(f'<rect x="{x0}" y="{y0}" width="{wide}" height="{tall}" fill="none" stroke="#bbb"/>')
            for k, (name, colour) in enumerate(COLOURS.items()):
                columns = (x0 + wide * t / max(1, len(curves) - 1) for t in range(len(curves)))
                rows = (y0 + tall * (1 - line[layer][k] / peak) for line in curves)
                points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(columns, rows))
                thick = 2.5 if name == op else 1.2
                svg.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{thick}"/>')
            y1 = y0 + tall + 8
            colours = f'fill="{COLOURS[op]}" fill-opacity="0.18" stroke="{COLOURS[op]}"'
            svg.append(f'<rect x="{x0}" y="{y1}" width="{wide}" height="24" rx="4" {colours}/>')
            svg.append(f'<text x="{x0 + wide / 2}" y="{y1 + 16}" text-anchor="middle">{label}</text>')
            if layer + 1 < len(ops):
                arrow = f"M{x0 + wide} {y1 + 12} h{cell - wide - 7} m-5 -4 l5 4 l-5 4"
                svg.append(f'<path d="{arrow}" fill="none" stroke="#666"/>')
        top += row
    return _svg(width, top - 12, title, svg)


KERNEL_COLOURS = {1: "#999999", 3: "#0072B2", 5: "#E69F00", 7: "#D55E00"}


def draw_backbone(networks: dict[str, tuple[dict, int]], width: float, stem: str, size: int, title: str) -> str:
    """SVG: the networks, (architecture, parameters) by name, one below the other on one scale, for images of that size.

    A block is a box: as high as its inner channels (root scale), coloured by its kernel; stages stand side by side.
    """
    plans = {}
    for name, (arch, parameters) in networks.items():
        plans[name] = (plan(arch, width, stem).blocks, arch, stage_macs(arch, width, stem, size), parameters)
    stages = range(max(len(arch["depth"]) for _, arch, _, _ in plans.values()))
    deepest = [max(arch["depth"][s] for _, arch, _, _ in plans.values()) for s in stages]
    widest = max(spec.inner for blocks, *_ in plans.values() for spec in blocks)
    box, gap, tall = 20, 5, 96
    room = [max(d * (box + gap) + 22, 118) for d in deepest]
    svg = []
    x = 20
    for kernel in sorted({spec.kernel for blocks, *_ in plans.values() for spec in blocks}):
        colour = KERNEL_COLOURS.get(kernel, "#555555")
        svg.append(f'<rect x="{x}" y="40" width="14" height="14" rx="2" fill="{colour}"/>')
        svg.append(f'<text x="{x + 20}" y="51">{kernel}x{kernel}</text>')
        x += 70
    svg.append(f'<text x="{x}" y="51" fill="#666">a box is a block, as high as the root of its inner channels</text>')
    top = 84
    for name, (blocks, arch, macs, parameters) in plans.items():
        facts = f"{sum(macs) / 1e6:,.4g} MMACs, {parameters / 1e6:,.2f} M parameters, {len(blocks)} blocks"
        svg.append(f'<text x="20" y="{top}" font-weight="bold">{escape(name)}</text>')
        svg.append(f'<text x="160" y="{top}">{facts}</text>')
        x = 20
        for s in stages:
            floor = top + 16 + tall
            of_stage = [spec for spec in blocks if spec.stage == s]
            for j, spec in enumerate(of_stage):
                h = max(4, tall * math.sqrt(spec.inner / widest))
                where = f'x="{x + j * (box + gap)}" y="{floor - h:.1f}" width="{box}" height="{h:.1f}"'
                svg.append(f'<rect {where} rx="3" fill="{KERNEL_COLOURS.get(spec.kernel, "#555555")}"/>')
            svg.append(f'<path d="M{x} {floor + 4} h{len(of_stage) * (box + gap) - gap}" stroke="#666"/>')
            kind = "x input" if arch["block"] == "inverted" else "of planes"
            ratio, kernel = arch["inner"][s], arch["kernel"][s]
            svg.append(f'<text x="{x}" y="{floor + 19}">stage {s + 1}: {of_stage[-1].c_out} wide</text>')
            svg.append(f'<text x="{x}" y="{floor + 34}">{len(of_stage)} deep, {kernel}x{kernel}</text>')
            svg.append(f'<text x="{x}" y="{floor + 49}">inner {ratio:g} {kind}</text>')
            svg.append(f'<text x="{x}" y="{floor + 64}" fill="#666">{macs[1 + s] / 1e6:,.3g} MMACs</text>')
            x += room[s]
        top += tall + 116
    return _svg(max(sum(room), 8 * len(title)) + 40, top - 24, title, svg)


def draw_scores(scores: dict[str, dict[str, list[float]]], title: str) -> str:
    """SVG: accuracies in % as dots, a panel for each data set, a line for each row: {data: {row: [accuracy, ...]}}."""
    panel, line, across = 300, 24, 3
    rows = list(dict.fromkeys(row for values in scores.values() for row in values))
    left = 30 + 6.6 * max(map(len, rows))
    tall = 64 + line * len(rows)
    svg = []
    for p, (data, values) in enumerate(scores.items()):
        x0, y0 = left + p % across * (panel + 60), 52 + p // across * tall
        bottom = y0 + 12 + line * len(rows)
        every = [v for row in values.values() for v in row]
        low, high = math.floor(min(every)), math.ceil(max(every) + 1e-9)
        high += low == high

        def at(v, x0=x0, low=low, high=high):
            return x0 + panel * (v - low) / (high - low)

        svg.append(f'<text x="{x0}" y="{y0}" font-weight="bold">{escape(data)}</text>')
        for v in _ticks(low, high, 6):
            svg.append(f'<path d="M{at(v):.1f} {y0 + 8} V{bottom}" stroke="#ddd"/>')
            svg.append(f'<text x="{at(v):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#666">{v} %</text>')
        for r, row in enumerate(rows):
            y = y0 + 20 + line * r
            if p % across == 0:
                svg.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(row)}</text>')
            style = f'fill="{"#999999" if row.startswith("random") else "#0072B2"}" fill-opacity="0.6" stroke="white"'
            for v in values.get(row, []):
                svg.append(f'<circle cx="{at(v):.1f}" cy="{y}" r="4" {style}/>')
            if values.get(row):
                mean = sum(values[row]) / len(values[row])
                svg.append(f'<path d="M{at(mean):.1f} {y - 9} v18" stroke="black" stroke-width="2"/>')
    return _svg(left + min(across, len(scores)) * (panel + 60) + 10, 40 + -(-len(scores) // across) * tall, title, svg)


def draw_matrices(panels: dict[str, tuple], title: str, scale: tuple[float, float] | None, digits: int) -> str:
    """SVG: tables of numbers on coloured squares, {panel: (row names, column names, numbers)}. scale: (low, high): high
    is blue; white is low, or 0 if low is negative, with orange below. None: each table's own (largest, smallest)."""
    cell, y0, width = 34, 50, 8 * len(title)
    svg = []
    for panel, (rows, columns, values) in panels.items():
        left = 30 + 6.6 * max(map(len, rows))
        top = y0 + 14 + 5.2 * max(map(len, columns))
        svg.append(f'<text x="20" y="{y0:.0f}" font-weight="bold">{escape(panel)}</text>')
        for c, name in enumerate(columns):
            x = left + cell * (c + 0.6)
            svg.append(f'<text transform="translate({x:.0f} {top - 6:.0f}) rotate(-50)">{escape(name)}</text>')
        for r, (name, numbers) in enumerate(zip(rows, values)):
            y = top + cell * r
            svg.append(f'<text x="{left - 6:.0f}" y="{y + 21:.0f}" text-anchor="end">{escape(name)}</text>')
            for c, value in enumerate(numbers):
                x, (fill, ink) = left + cell * c, shade(value, scale or (max(map(max, values)), min(map(min, values))))
                svg.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{cell - 1}" height="{cell - 1}" fill="{fill}"/>')
                text = f"{value:.{digits}f}".replace("0.", ".") if digits else f"{value:.0f}"
                style = f'font-size="11" text-anchor="middle" fill="{ink}"'
                svg.append(f'<text x="{x + cell / 2:.0f}" y="{y + 21:.0f}" {style}>{text}</text>')
        y0 = top + cell * len(rows) + 40
        width = max(width, left + cell * len(columns) + 4 * max(map(len, columns)))
    return _svg(width, y0 - 20, title, svg)


def shade(value: float, scale: tuple[float, float]) -> tuple[str, str]:
    """(background, ink): white at 0, or at the scale's beginning, then blue; orange below 0. Grey where it is nan."""
    if math.isnan(value):
        return "#dddddd", "black"
    low, high = scale
    share = value / high if low < 0 else (value - low) / (high - low)
    end = (0, 90, 160) if share >= 0 else (200, 90, 0)
    share = min(1.0, abs(share))
    red, green, blue = (round(255 - share * (255 - channel)) for channel in end)
    return f"#{red:02x}{green:02x}{blue:02x}", "white" if share > 0.6 else "black"


SERIES_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#999999"]


def draw_costs(series: dict[str, list[tuple[float, float]]], title: str) -> str:
    """SVG: accuracy in % over MMACs on a log scale, {series: [(MMACs, accuracy), ...]}, and its Pareto front."""
    width, height, left, top = 620, 330, 60, 64
    xs, ys = zip(*(point for points in series.values() for point in points))
    x_low, x_high = math.log2(min(xs)) - 0.1, math.log2(max(xs)) + 0.1
    y_low, y_high = math.floor(min(ys)), math.ceil(max(ys) + 1e-9)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - x_low) / (x_high - x_low)
        return left + width * across, top + height * (1 - (y - y_low) / (y_high - y_low))

    svg = [f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#bbb"/>']
    for y in _ticks(y_low, y_high, 8):
        _, row = at(1, y)
        svg.append(f'<path d="M{left} {row:.1f} h{width}" stroke="#eee"/>')
        svg.append(f'<text x="{left - 8}" y="{row + 4:.1f}" text-anchor="end" fill="#666">{y} %</text>')
    for k in range(math.ceil(x_low), math.floor(x_high) + 1):
        column, _ = at(2.0**k, y_low)
        svg.append(f'<path d="M{column:.1f} {top} v{height}" stroke="#eee"/>')
        svg.append(f'<text x="{column:.1f}" y="{top + height + 17}" text-anchor="middle" fill="#666">{2.0**k:g}</text>')
    svg.append(f'<text x="{left + width / 2}" y="{top + height + 36}" text-anchor="middle">MMACs an image</text>')
    for n, (name, points) in enumerate(series.items()):
        colour, front = SERIES_COLOURS[n % len(SERIES_COLOURS)], []
        for x, y in sorted(points):
            column, row = at(x, y)
            svg.append(f'<circle cx="{column:.1f}" cy="{row:.1f}" r="3.5" fill="{colour}" fill-opacity="0.5"/>')
            if not front or y > front[-1][1]:
                front.append((x, y))
        path = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in front)
        svg.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        x = left + 160 * n
        svg.append(f'<circle cx="{x + 5}" cy="46" r="5" fill="{colour}"/>')
        svg.append(f'<text x="{x + 16}" y="50">{escape(name)}</text>')
    return _svg(max(left + width, 8 * len(title)) + 30, top + height + 50, title, svg)


LINES = ("training", "held out", "alphas", "chance")  # of a run: each has one colour, whatever else is drawn


def draw_curves(
    panels: dict[str, dict[str, list[tuple[float, float]]]],
    title: str,
    x_name: str,
    y_limits: tuple[float, float] | None = None,
) -> str:
    """SVG: lines, panels side by side, three in a row: {panel: {line: [(x, y), ...]}}. y_limits: None: each panel's
    own."""
    wide, tall, left, top, across = 240, 170, 66, 76, 3
    found = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = dict(zip(dict.fromkeys([*LINES, *found] if set(LINES) & set(found) else found), cycle(SERIES_COLOURS)))
    colours = {name: colour for name, colour in colours.items() if name in found}
    svg = []
    x = 20
    for name, colour in colours.items():
        svg.append(f'<path d="M{x} 46 h18" stroke="{colour}" stroke-width="3"/><text x="{x + 24}" y="50">{name}</text>')
        x += 44 + 7 * len(name)
    width = max(x, 8 * len(title), min(across, len(panels)) * (wide + left))
    for p, (panel, lines) in enumerate(panels.items()):
        x0, y0 = left + p % across * (wide + left), top + p // across * (tall + 76)
        finite = {name: [point for point in line if math.isfinite(point[1])] for name, line in lines.items()}
        points = [point for line in finite.values() for point in line] or [(0.0, 0.0)]
        (x_low, x_high), (y_low, y_high) = ((min(v), max(v)) for v in zip(*points))
        y_low, y_high = y_limits or (y_low, y_high)
        if x_low == x_high:
            x_low, x_high = x_low - 1, x_high + 1
        if y_low == y_high:
            y_low, y_high = y_low - (0.1 * abs(y_low) or 1.0), y_high + (0.1 * abs(y_high) or 1.0)
        svg.append(f'<text x="{x0}" y="{y0 - 8}" font-weight="bold">{escape(panel)}</text>')
        svg.append(f'<rect x="{x0}" y="{y0}" width="{wide}" height="{tall}" fill="none" stroke="#bbb"/>')
        for share in (0, 0.5, 1):
            y, value = y0 + tall * (1 - share), y_low + share * (y_high - y_low)
            svg.append(f'<text x="{x0 - 6}" y="{y + 4:.0f}" text-anchor="end" fill="#666">{value:.3g}</text>')
            x, value = x0 + wide * share, x_low + share * (x_high - x_low)
            svg.append(f'<text x="{x:.0f}" y="{y0 + tall + 16}" text-anchor="middle" fill="#666">{value:.3g}</text>')
        svg.append(f'<text x="{x0 + wide / 2}" y="{y0 + tall + 32}" text-anchor="middle">{escape(x_name)}</text>')
        for name, line in finite.items():
            columns = [x0 + wide * (x - x_low) / (x_high - x_low) for x, _ in line]
            rows = [y0 + tall * (y_high - y) / (y_high - y_low) for _, y in line]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(columns, rows))
            svg.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
            if len(line) == 1:
                svg.append(f'<circle cx="{columns[0]:.1f}" cy="{rows[0]:.1f}" r="4" fill="{colours[name]}"/>')
    return _svg(width + 30, top + -(-len(panels) // across) * (tall + 76) - 30, title, svg)


def draw_surrogate(worth: dict[str, tuple[float, float]], title: str) -> str:
    """SVG: what each value of a choice is worth, with two standard errors to either side, a panel for each stage:
    {"stage 1 depth 2": (worth, standard error), ...}."""
    tall, step, top = 190, 26, 60
    stages: dict[str, dict[str, list[tuple[str, float, float]]]] = {}
    for label, (value, error) in worth.items():
        _, stage, choice, option = label.split()
        stages.setdefault(stage, {}).setdefault(choice, []).append((option, value, error))
    most = max(abs(value) + 2 * error for value, error in worth.values()) or 1.0
    svg, x = [], 64

    def row(value: float) -> float:
        return top + tall / 2 * (1 - value / most)

    for value in (-most, 0.0, most):
        svg.append(f'<text x="{x - 12}" y="{row(value) + 4:.1f}" text-anchor="end" fill="#666">{value:+.2g}</text>')
    for stage, choices in stages.items():
        begin = x
        svg.append(f'<text x="{x}" y="{top - 10}" font-weight="bold">stage {stage}</text>')
        for colour, (choice, options) in zip(SERIES_COLOURS, choices.items()):
            middle = x + step * len(options) / 2
            svg.append(f'<text x="{middle}" y="{top + tall + 36}" text-anchor="middle">{choice}</text>')
            for option, value, error in options:
                x += step / 2
                bar = f"M{x} {row(value - 2 * error):.1f} V{row(value + 2 * error):.1f}"
                svg.append(f'<path d="{bar}" stroke="{colour}" stroke-width="2"/>')
                svg.append(f'<circle cx="{x}" cy="{row(value):.1f}" r="4" fill="{colour}"/>')
                svg.append(f'<text x="{x}" y="{top + tall + 18}" text-anchor="middle" fill="#666">{option}</text>')
                x += step / 2
            x += 12
        svg.append(f'<path d="M{begin - 6} {row(0):.1f} H{x - 8}" stroke="#999"/>')
        x += 24
    return _svg(max(x, 60 + 7.5 * len(title)), top + tall + 50, title, svg)


def draw_halving(rounds: dict[str, list[tuple[float, list[float]]]], best: str, title: str) -> str:
    """SVG: scores of candidates at each rung, means and seeds, over the share of their training: {candidate: [(share,
    [a seed's score, ...]), ...]}. best: the one that was chosen."""
    width, tall, left, top = 460, 260, 70, 52
    scores = [score for rungs in rounds.values() for _, seeds in rungs for score in seeds]
    low, high = min(scores), max(scores)
    high += (high == low) * (abs(low) or 1.0)

    def at(share: float, score: float) -> tuple[float, float]:
        return left + width * share, top + tall * (high - score) / (high - low)

    svg = [f'<rect x="{left}" y="{top - 8}" width="{width + 8}" height="{tall + 16}" fill="none" stroke="#bbb"/>']
    for score in (low, (low + high) / 2, high):
        _, y = at(0, score)
        svg.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#666">{score:.3g}</text>')
    for share in sorted({share for rungs in rounds.values() for share, _ in rungs}):
        x, y = at(share, low)
        svg.append(f'<text x="{x:.1f}" y="{y + 24:.1f}" text-anchor="middle" fill="#666">{100 * share:.0f} %</text>')
    svg.append(f'<text x="{left + width / 2}" y="{top + tall + 42}" text-anchor="middle">of the training</text>')
    y = top + tall + 66
    for name, rungs in rounds.items():
        kind = "best" if name == best else name.split()[0].rstrip(":")
        colour = {"best": "#0072B2", "handcrafted": "#D55E00", "random": "#999999"}.get(kind, "#56B4E9")
        thick = 3 if kind == "best" else 1.5
        means = [at(share, sum(seeds) / len(seeds)) for share, seeds in rungs]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in means)
        svg.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick}"/>')
        for share, seeds in rungs:
            for score in seeds:
                a, b = at(share, score)
                svg.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}" fill-opacity="0.6"/>')
        svg.append(f'<circle cx="{left}" cy="{y - 4}" r="5" fill="{colour}"/>')
        bold = ' font-weight="bold"' if kind == "best" else ""
        svg.append(f'<text x="{left + 12}" y="{y}"{bold}>{escape(name)}</text>')
        y += 18
    longest = max(map(len, rounds))
    return _svg(max(left + width + 30, left + 30 + 6.4 * longest, 7.5 * len(title) + 40), y, title, svg)
