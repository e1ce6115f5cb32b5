"""Messages that a person types or pastes at a terminal. A pasted block of lines is one message.

Two mechanisms make it one message. With GNU readline 8.1 and a terminal that marks pasted text
(bracketed paste), a pasted block is shown, can be edited, and is sent by Enter. Anywhere else the
block's first line break acts like Enter; the lines that have arrived by then belong to the same
message.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator

PAUSE = 0.05  # seconds of silence that end a pasted block
END_OF_FILE = "\x04"  # what Ctrl-D sends


def typed(prompt: str, interrupted: str) -> Iterator[str]:
    """Messages from standard input, which is a terminal, until Ctrl-D.

    prompt: shown before each message. interrupted: shown on stderr after Ctrl-C, which discards
    what has been typed.
    """
    with contextlib.suppress(ImportError):  # Windows has none
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            yield _message(prompt)
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(f"\n{interrupted}", file=sys.stderr)


def _message(prompt: str) -> str:
    shown = sys.stdout.isatty()
    if not shown:  # input() would write its prompt into the answers
        print(prompt, end="", file=sys.stderr, flush=True)
    first = input(prompt if shown else "")
    more = waiting(sys.stdin.fileno())
    if not more:
        return first
    print(more, end="" if more.endswith("\n") else "\n", file=sys.stderr, flush=True)
    return f"{first}\n{more}"


def waiting(terminal: int) -> str:
    """Text that has arrived at a terminal, given by its file descriptor, and is still unread.

    Line breaks are returned as "\\n". On Windows, where there is no termios, the text is "".
    """
    try:
        import termios
        import tty
    except ImportError:
        return ""
    before = termios.tcgetattr(terminal)
    pieces = []
    try:
        tty.setcbreak(terminal, termios.TCSANOW)  # a last line without its end counts too
        while select.select([terminal], [], [], PAUSE)[0]:
            piece = os.read(terminal, 65536)
            if not piece:
                break
            pieces.append(piece)
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
    text = b"".join(pieces).decode("utf-8", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace(END_OF_FILE, "")
