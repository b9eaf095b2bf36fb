"""Grouped bars as SVG, written by hand: no dependencies, readable in a browser and on a code-hosting page."""

import math
from xml.sax.saxutils import escape

COLOURS = ["#2c6fbb", "#e08a1e", "#5a9e4b", "#9a5fb5", "#7a7a7a", "#c0504d"]
HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 74, 24, 64, 64
BAR, GROUP_GAP = 30, 30


def ticks(low, high, logarithmic):
    if logarithmic:
        values = [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
        return [v for v in values if low <= v <= high * 1.0001]
    step = 10 ** math.floor(math.log10(high))
    step = step / 5 if high / step < 2 else step / 2 if high / step < 5 else step
    return [step * i for i in range(int(high / step) + 1)]


def label(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def grouped_bars(path, title, axis, groups, series, values, logarithmic=False, line=None, note=""):
    """`values[group][series]` may be None (not measured). `line`: a value and its text, drawn across."""
    measured = [v for row in values for v in row if v]
    if not measured:
        return False
    high = max(measured + ([line[0]] if line else [])) * 1.15
    low = min(measured + ([line[0]] if line else [])) / 1.6 if logarithmic else 0
    group_width = len(series) * BAR
    width = LEFT + RIGHT + GROUP_GAP + len(groups) * (group_width + GROUP_GAP)
    width = max(width, LEFT + RIGHT + 10 * len(title), LEFT + RIGHT + sum(34 + 7 * len(name) for name in series))
    bottom = HEIGHT - BOTTOM

    def y(value):
        share = (math.log(value / low) / math.log(high / low)) if logarithmic else value / high
        return bottom - share * (bottom - TOP)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" '
           'font-family="sans-serif" font-size="12" fill="#222">', f'<rect width="{width}" height="{HEIGHT}" fill="#fff"/>',
           f'<text x="{LEFT}" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
           f'<text transform="translate(16 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">{escape(axis)}</text>']
    x = LEFT
    for index, name in enumerate(series):
        out.append(f'<rect x="{x}" y="34" width="11" height="11" fill="{COLOURS[index % len(COLOURS)]}"/>'
                   f'<text x="{x + 16}" y="44">{escape(name)}</text>')
        x += 34 + 7 * len(name)
    for value in ticks(low, high, logarithmic):
        out.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
                   f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{label(value)}</text>' if value > 0 or not logarithmic else "")
    for g, group in enumerate(groups):
        left = LEFT + GROUP_GAP + g * (group_width + GROUP_GAP)
        for s in range(len(series)):
            value = values[g][s]
            if not value:
                continue
            top = y(value)
            middle = left + s * BAR + BAR / 2
            out.append(f'<rect x="{left + s * BAR + 1}" y="{top:.1f}" width="{BAR - 2}" height="{max(bottom - top, 0.5):.1f}" '
                       f'fill="{COLOURS[s % len(COLOURS)]}"><title>{escape(group)}, {escape(series[s])}: {label(value)}</title></rect>'
                       f'<text x="{middle}" y="{top - 3:.1f}" text-anchor="middle" font-size="9">{label(value)}</text>')
        out.append(f'<text x="{left + group_width / 2}" y="{bottom + 18}" text-anchor="middle">{escape(group)}</text>')
    if line:
        out.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y(line[0]):.1f}" y2="{y(line[0]):.1f}" stroke="#c00" stroke-dasharray="5 3"/>'
                   f'<text x="{width - RIGHT}" y="{y(line[0]) - 4:.1f}" text-anchor="end" fill="#c00" font-size="11">{escape(line[1])}</text>')
    out.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{bottom}" y2="{bottom}" stroke="#222"/>')
    out.append(f'<text x="{LEFT}" y="{HEIGHT - 14}" font-size="11" fill="#666">{escape(note)}</text></svg>')
    with open(path, "w") as file:
        file.write("\n".join(out) + "\n")
    return True
