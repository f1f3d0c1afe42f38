"""Numbers as text for people."""

from __future__ import annotations


def count(number: float) -> str:
    """12,345"""
    return f"{number:,.0f}"


def short(number: float) -> str:
    """123 · 12.3k · 1.2M"""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            return f"{number / (1e3 if unit == 'k' else limit):.1f}{unit}"
    return f"{number:,.0f}"


def money(dollars: float | None) -> str:
    """$0.0012 · $3.40 · $1,234.50, or `price unknown`."""
    if dollars is None:
        return "price unknown"
    if 0 < dollars < 0.00005:
        return "< $0.0001"
    return f"${dollars:,.4f}" if dollars < 1 else f"${dollars:,.2f}"


def duration(seconds: float) -> str:
    """0.8 s · 42 s · 3 min 05 s · 2 h 10 min · 3 d 4 h"""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def rate(per_second: float) -> str:
    """12.3/s; below one a second 42/min."""
    return f"{per_second:.1f}/s" if per_second >= 1 else f"{per_second * 60:.0f}/min"


def plural(number: int, noun: str) -> str:
    """1 item · 1,200 items"""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
