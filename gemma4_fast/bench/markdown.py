from __future__ import annotations


def performance(rows):
    return ""
