from __future__ import annotations


def write(rows, path, pictures):
    path.write_text("")
