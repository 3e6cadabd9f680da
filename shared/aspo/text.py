"""Text that strangers wrote, made fit to be read by a person."""

from __future__ import annotations

MAX_TEXT = 500


def printable(text: str, limit: int = MAX_TEXT) -> str:
    """Cut a stranger's text and escape whatever could move a cursor, hide or reorder what is read."""
    cut = text if len(text) <= limit else f"{text[:limit]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
