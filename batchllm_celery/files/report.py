"""A batch's results as one HTML page: no script, no font, no picture from elsewhere.

Plots are SVG that matplotlib draws, inside the page. Every text of a result is escaped: ids and
errors come from foreigners.
"""

from __future__ import annotations

import html
import io
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchllm_celery.errors import UsageError
from batchllm_celery.files.failures import FailureGroup, group_failures

#: Results whose times are drawn; of more of them every second one, every fourth one, ...
_MOST_POINTS = 100_000
#: Values of a field that are counted; a field with more of them is no category.
_MOST_VALUES = 12
_INK, _SOFT = "#1f4e79", "#9db8d2"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff;
  max-width: 60rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr));
  gap: .75rem; margin: 0; }}
dt {{ color: #555; font-size: .85rem; }} dd {{ margin: 0; font-size: 1.25rem; }}
svg {{ width: 100%; height: auto; display: block; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0;
  border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }}
td.n, th.n {{ text-align: right; white-space: nowrap; }}
.soft {{ color: #555; font-size: .85rem; }}
@media print {{ body {{ max-width: none; font-size: 11px; }}
  figure, table {{ break-inside: avoid; }} }}
figure {{ margin: 1rem 0; }}
</style></head><body>
{body}
</body></html>
"""


@dataclass(slots=True)
class _Sums:
    """What one pass over the results has found."""

    total: int = 0
    succeeded: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cached: int = 0
    cost: float = 0.0
    priced: int = 0
    every: int = 1
    times: list[tuple[float, float, float]] = field(default_factory=list)
    """Seconds queued, waited and executed of a result."""
    by_model: dict[str, list[float]] = field(default_factory=dict)
    """Results, tokens in and out, cost."""
    fields: dict[str, Counter[str]] = field(default_factory=dict)
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any]) -> None:
        usage, timing = line.get("token_usage") or {}, line.get("timing") or {}
        self.total += 1
        self.succeeded += bool(line["success"])
        read, written = usage.get("input_tokens") or 0, usage.get("output_tokens") or 0
        self.tokens_in += read
        self.tokens_out += written
        self.cached += usage.get("cached_input_tokens") or 0
        cost = line.get("cost")
        self.cost += cost or 0.0
        self.priced += cost is not None
        model = str((line.get("metadata") or {}).get("model") or "")
        sums = self.by_model.setdefault(model if len(self.by_model) < 32 else "", [0, 0, 0, 0.0])
        for n, value in enumerate((1, read, written, cost or 0.0)):
            sums[n] += value
        if line.get("attempts") and self.total % self.every == 0:
            queued, waited, executed = (
                float(timing.get(part) or 0.0) for part in ("queued", "waited", "executed")
            )
            self.times.append((queued, waited, executed))
            if len(self.times) >= _MOST_POINTS:
                self.times, self.every = self.times[::2], self.every * 2
        if isinstance(output := line.get("output"), dict):
            for name, value in output.items():
                self._add_field(str(name), value)

    def _add_field(self, name: str, value: Any) -> None:
        if len(self.fields) + len(self.numbers) >= 40 and name not in {*self.fields, *self.numbers}:
            return
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers = self.numbers.setdefault(name, [])
            if len(numbers) < _MOST_POINTS:
                numbers.append(float(value))
        elif isinstance(value, str | bool) or value is None:
            counts = self.fields.setdefault(name, Counter())
            if len(counts) <= _MOST_VALUES or str(value) in counts:
                counts[str(value)[:80]] += 1


def write_report(lines: Iterable[Mapping[str, Any]], title: str) -> str:
    """The page as HTML.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        extra = "pip install 'batchllm-celery[report]'"
        raise UsageError(f"a report needs the extra: {extra}") from None
    matplotlib.use("svg")
    sums = _Sums()

    def counted() -> Iterable[Mapping[str, Any]]:
        for line in lines:
            sums.add(line)
            yield line

    _, groups = group_failures(counted())
    parts = [f"<h1>{_text(title)}</h1>", _figures(sums)]
    if sums.times:
        parts.append(_latency(sums))
        parts.append(_waiting(sums))
    if len(sums.by_model) > 1 or "" not in sums.by_model:
        parts.append(_models(sums))
    if groups:
        parts.append(_failures(groups))
    parts += [_categories(name, counts, sums.succeeded) for name, counts in sums.fields.items()]
    parts += [_histogram(name, numbers) for name, numbers in sums.numbers.items()]
    return _PAGE.format(title=_text(title), body="\n".join(filter(None, parts)))


def _text(value: Any) -> str:
    """Escaped; characters that turn the writing direction, or are not shown, as their number."""
    shown = "".join(c if c.isprintable() or c == " " else f"\\u{ord(c):04x}" for c in str(value))
    return html.escape(shown)


def _figures(sums: _Sums) -> str:
    failed = sums.total - sums.succeeded
    cost = f"${sums.cost:,.4f}" if sums.priced else "price unknown"
    shown = {
        "Results": f"{sums.total:,}",
        "Succeeded": f"{sums.succeeded:,}",
        "Failed": f"{failed:,}",
        "Tokens in": f"{sums.tokens_in:,}",
        "of them cached": f"{sums.cached:,}",
        "Tokens out": f"{sums.tokens_out:,}",
        "Cost": cost,
    }
    rows = (f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in shown.items())
    return f"<dl>{''.join(rows)}</dl>"


def _svg(draw: Any, label: str, height: float = 2.6) -> str:
    """What `draw(axes)` draws, as an SVG element that screen readers name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    buffer = io.StringIO()
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": label, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(
        "<svg", f'<svg role="img" aria-label="{_text(label)}"', 1
    )
    return f"<figure>{svg}</figure>"


def _latency(sums: _Sums) -> str:
    executed = sorted(times[2] for times in sums.times)
    shown = {
        f"{p} %": executed[min(len(executed) - 1, len(executed) * p // 100)] for p in (50, 90, 99)
    }

    def draw(axes: Any) -> None:
        axes.hist(executed, bins=40, color=_INK)
        axes.set_xlabel("seconds in provider calls")
        axes.set_ylabel("results")

    words = ", ".join(f"{name} within {value:.2f} s" for name, value in shown.items())
    return f"<h2>Latency</h2><p>{words}.</p>{_svg(draw, 'Seconds in provider calls')}"


def _waiting(sums: _Sums) -> str:
    names = ("queued", "waited", "executed")
    means = [statistics.fmean(times[n] for times in sums.times) for n in range(3)]

    def draw(axes: Any) -> None:
        axes.barh(names[::-1], means[::-1], color=[_INK, _SOFT, _SOFT])
        axes.set_xlabel("seconds of a result, on average")

    words = "Until a worker had a slot; for the quota, in backoff; in provider calls."
    return (
        f"<h2>Where the time went</h2><p class=soft>{words}</p>{_svg(draw, 'Seconds by part', 1.7)}"
    )


def _models(sums: _Sums) -> str:
    rows = "".join(
        f"<tr><td>{_text(model or 'not named')}</td>"
        + "".join(f"<td class=n>{value:,.0f}</td>" for value in values[:3])
        + f"<td class=n>${values[3]:,.4f}</td></tr>"
        for model, values in sorted(sums.by_model.items())
    )
    head = (
        "<tr><th>Model<th class=n>Results<th class=n>Tokens in<th class=n>out<th class=n>Cost</tr>"
    )
    return f"<h2>Models</h2><table>{head}{rows}</table>"


def _failures(groups: list[FailureGroup]) -> str:
    rows = "".join(
        f"<tr><td class=n>{group.count:,}</td><td>{_text(group.kind)}</td>"
        f"<td>{_text(group.message[:500])}<br><span class=soft>e.g. "
        f"{_text(', '.join(group.examples))}</span></td></tr>"
        for group in groups[:50]
    )
    head = "<tr><th class=n>Count<th>Kind<th>Message</tr>"
    more = f"<p class=soft>and {len(groups) - 50} further messages</p>" if len(groups) > 50 else ""
    return f"<h2>Failures</h2><table>{head}{rows}</table>{more}"


def _categories(name: str, counts: Counter[str], succeeded: int) -> str:
    if len(counts) > _MOST_VALUES:
        return ""  # texts, all different
    rows = "".join(
        f"<tr><td>{_text(value)}</td><td class=n>{number:,}</td>"
        f"<td class=n>{number / max(succeeded, 1):.0%}</td></tr>"
        for value, number in counts.most_common()
    )
    return f"<h2>Output: {_text(name)}</h2><table>{rows}</table>"


def _histogram(name: str, numbers: list[float]) -> str:
    def draw(axes: Any) -> None:
        axes.hist(numbers, bins=min(40, max(1, len(set(numbers)))), color=_INK)
        axes.set_ylabel("results")

    return f"<h2>Output: {_text(name)}</h2>{_svg(draw, f'Distribution of {name}')}"
