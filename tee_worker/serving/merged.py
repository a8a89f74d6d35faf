"""The pieces of several answers, in the order in which they come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from tee_worker.serving.answers import Answer, Piece
from tee_worker.serving.resumption import Stage


async def merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[Answer, Piece | None], None]:
    """Each piece with its answer; None: that answer is at its end. Raises what the first does that fails, and ends the others.

    Answers whose end was told before have nothing to tell.
    """
    answers = [answer for answer in answers if answer.told_stage is not Stage.END]
    arrived: asyncio.Queue[tuple[Answer, Piece | None] | BaseException] = asyncio.Queue()

    async def read(answer: Answer) -> None:
        try:
            async with contextlib.aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    arrived.put_nowait((answer, piece))
            arrived.put_nowait((answer, None))
        except Exception as error:
            arrived.put_nowait(error)

    readers = [asyncio.ensure_future(read(answer)) for answer in answers]
    try:
        left = len(answers)
        while left:
            one = await arrived.get()
            if isinstance(one, BaseException):
                raise one
            left -= one[1] is None
            one[0].told(one[1])
            yield one
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
