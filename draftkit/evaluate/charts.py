"""Small SVG pictures for the report: they take their colours from the page, so they follow its light and
dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from draftkit.evaluate.metrics import Interval

WIDTH, LEFT, ROW, HEIGHT = 560, 150, 24, 240
COLOURS = 9  # classes c0 to c8 of the page


def interval_bars(values: Mapping[str, Interval], label: str) -> str:
    """One bar per name with its 95 % interval; bars begin at 1, where nothing was accepted."""
    shown = {name: one for name, one in values.items() if one.value == one.value}
    most = max((one.high for one in shown.values()), default=2.0)
    scale = (WIDTH - LEFT - 60) / max(most - 1, 0.1)
    rows = []
    for place, (name, one) in enumerate(shown.items()):
        y, x = place * ROW + 4, [LEFT + (v - 1) * scale for v in (one.value, one.low, one.high)]
        rows.append(
            f'<text x="{LEFT - 8}" y="{y + 12}" class="end">{escape(name)}</text>'
            f'<rect x="{LEFT}" y="{y}" width="{max(x[0] - LEFT, 1):.1f}" height="16" class="c0"/>'
            f'<line x1="{x[1]:.1f}" x2="{x[2]:.1f}" y1="{y + 8}" y2="{y + 8}" class="mark"/>'
            f'<text x="{x[2] + 6:.1f}" y="{y + 12}">{one.value:.2f}</text>'
        )
    return _svg(len(shown) * ROW + 8, label, rows)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], label: str, x: str, y: str) -> str:
    """Lines over points (x, y), y from 0 to 1; points that are no numbers are left out."""
    kept = {n: [p for p in points if p[1] == p[1]] for n, points in series.items()}
    kept = {n: points for n, points in kept.items() if points}
    most = max((p[0] for points in kept.values() for p in points), default=1.0)
    least = min((p[0] for points in kept.values() for p in points), default=0.0)
    wide, high = WIDTH - LEFT - 40, HEIGHT - 60

    def at(point: tuple[float, float]) -> str:
        across = LEFT + (point[0] - least) / max(most - least, 1e-9) * wide
        return f"{across:.1f},{20 + (1 - point[1]) * high:.1f}"

    rows = []
    for value in (0, 0.5, 1):
        up = 20 + (1 - value) * high
        rows.append(f'<line x1="{LEFT}" x2="{LEFT + wide}" y1="{up}" y2="{up}" class="grid"/>')
        rows.append(f'<text x="{LEFT - 8}" y="{up + 4}" class="end">{value:g}</text>')
    for place, (name, points) in enumerate(kept.items()):
        colour = place % COLOURS
        rows.append(f'<polyline points="{" ".join(map(at, points))}" class="c{colour}" fill="none"/>')
        rows.append(f'<text x="4" y="{24 + place * 16}" class="c{colour} name">{escape(name)}</text>')
    rows.append(f'<text x="{LEFT}" y="{HEIGHT - 20}">{least:g}</text>')
    rows.append(f'<text x="{LEFT + wide}" y="{HEIGHT - 20}" class="end">{most:g}</text>')
    rows.append(f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 4}">{escape(x)} (up: {escape(y)})</text>')
    return _svg(max(HEIGHT, 30 + 16 * len(kept)), label, rows)


def _svg(height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
