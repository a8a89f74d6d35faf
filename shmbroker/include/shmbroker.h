/* shmbroker's core in C: queues, doorbells, frames and segments, as the compiled ends of the Python package use them.
 *
 * Header-only: C11 (or C++23) and POSIX, no library beside the C library's. `cc $(python -c 'import shmbroker; print("-I" + shmbroker.get_include())')`
 * finds it. What it writes is described in docs/memory-layout.md, who may call what in docs/c.md.
 *
 * | file        | what is in it                                                                       |
 * |-------------|-------------------------------------------------------------------------------------|
 * | layout.h    | the structures of a segment, generated from shmbroker/memory/layout.py               |
 * | word.h      | the steps on words that two processes share: each with its memory order and its rule |
 * | queue.h     | one end of a queue: claim and commit, peek and advance                               |
 * | doorbell.h  | who publishes asks whether the peer sleeps, who sleeps looks once more               |
 * | bell.h      | the semaphore that a process sleeps on                                               |
 * | frames.h    | submissions and completions: filled, and read by who cannot trust them               |
 * | segment.h   | a client's segment, mapped, its header checked; the queues of its channels           |
 */
#ifndef SHMBROKER_H
#define SHMBROKER_H

#include "shmbroker/bell.h"
#include "shmbroker/doorbell.h"
#include "shmbroker/frames.h"
#include "shmbroker/layout.h"
#include "shmbroker/queue.h"
#include "shmbroker/segment.h"
#include "shmbroker/word.h"

#endif
