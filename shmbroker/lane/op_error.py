r"""An op's error as it travels from worker to client: its type, its text and its traceback, in one text.

::

    TYPE \n TEXT [ \0 TRACEBACK ]

The body of a completion carries it, and the answer to a control request. The error's own text comes first: the traceback has what room is left, and
is cut by whole lines of calls, from outside, since the innermost tells the most.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import NamedTuple

from shmbroker.errors import text_of

_END_OF_TEXT = "\0"
_OURS = str(Path(__file__).parents[1])
"""Code of shmbroker itself, which has called the op."""

_LEFT_OUT = "  ... {} calls further out\n"


class OpError(NamedTuple):
    """What an op raised. ``traceback`` is empty where it is not carried."""

    type_name: str
    text: str
    traceback: str


def pack_op_error(error: BaseException, nbytes: int, *, traceback: bool) -> str:
    """``error`` as a text of at most ``nbytes`` bytes of UTF-8; with its ``traceback``, as far as it has room."""
    head = _cut(f"{type(error).__name__}\n{text_of(error)}".replace(_END_OF_TEXT, "\\0"), nbytes)
    if not traceback:
        return head
    told = traceback_text(error, nbytes - len(head.encode()) - 1)
    return f"{head}{_END_OF_TEXT}{told}" if told else head


def read_op_error(text: str) -> OpError:
    """From what :func:`pack_op_error` made, or from anything else that a peer sent."""
    head, _, told = text.partition(_END_OF_TEXT)
    type_name, _, message = head.partition("\n")
    return OpError(type_name, message, told)


def traceback_text(error: BaseException, nbytes: int) -> str:
    """The calls that led to ``error``, outermost first, without those of shmbroker that led to the op; at most ``nbytes`` bytes of UTF-8."""
    calls = [_line_of(call) for call in _calls_of(error)]
    kept = ""
    for number, line in enumerate(reversed(calls)):
        left_out = len(calls) - number - 1
        mark = _LEFT_OUT.format(left_out) if left_out else ""
        if len((mark + line + kept).encode("utf-8", "replace")) > nbytes:
            return _LEFT_OUT.format(left_out + 1) + kept if kept else ""
        kept = line + kept
    return kept


def _calls_of(error: BaseException) -> list[traceback.FrameSummary]:
    try:
        calls = list(traceback.extract_tb(error.__traceback__))
    except Exception:  # a source file that cannot be read, say: an answer without traceback is better than none
        return []
    own = next((at for at, call in enumerate(calls) if not call.filename.startswith(_OURS)), len(calls))
    return calls[own:]


def _line_of(call: traceback.FrameSummary) -> str:
    source = f"    {call.line}\n" if call.line else ""
    return f'  File "{call.filename}", line {call.lineno}, in {call.name}\n{source}'


def _cut(text: str, nbytes: int) -> str:
    return text.encode("utf-8", "replace")[:nbytes].decode("utf-8", "ignore")
