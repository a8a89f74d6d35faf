/* What the compiled ends of a queue share as bindings: a queue of the core (shmbroker/include/shmbroker/queue.h) in a segment that Python maps, and for
 * who sends the peer's bell.
 *
 * Contract of all functions here
 *   Before   The interpreter lock is held, but for is_ready. The part was made: its owner's methods ask is_made first. Between claim and commit, and
 *            between peek and advance, nothing runs Python code.
 *   Who      One thread at a time for each end.
 *   After    As queue.h and doorbell.h of the core say: orders, rules and clamps are there, and nowhere else.
 *   Failure  What makes a part makes all of it or leaves it as it was, with an error set.
 */
#ifndef SHMBROKER_LANE_QUEUE_H
#define SHMBROKER_LANE_QUEUE_H

#include "../memory/_arguments.h"

#include <shmbroker/doorbell.h>
#include <shmbroker/queue.h>

/* The part of an end that frames are put into. */
typedef struct {
    Py_buffer map; /* keeps the segment mapped for as long as the end lives */
    struct shmbroker_queue queue;
    shmbroker_word *peer_sleeping;
    PyObject *ring; /* wakes the peer */
} Sender;

/* The part of an end that frames come out of. */
typedef struct {
    Py_buffer map;
    struct shmbroker_queue queue;
} Receiver;

/* --- making and ending -------------------------------------------------------------------------------------------------------------------- */

static inline bool is_made(const struct shmbroker_queue *queue)
{
    if (queue->slots != NULL)
        return true;
    PyErr_SetString(PyExc_RuntimeError, "this end of a queue was never made: its __init__ was not called, or raised");
    return false;
}

static inline bool find_word(const Py_buffer *map, uint64_t offset, shmbroker_word **word)
{
    if (!shmbroker_lies_in((uint64_t)map->len, offset, 1, sizeof(shmbroker_word))) {
        PyErr_Format(PyExc_ValueError, "a word at %llu does not lie in a segment of %zd bytes", (unsigned long long)offset, map->len);
        return false;
    }
    *word = shmbroker_word_at((uint8_t *)map->buf + offset);
    return true;
}

static inline bool depth_of(PyObject *segment, uint64_t *depth)
{
    PyObject *geometry = PyObject_GetAttrString(segment, "geometry");
    PyObject *number = geometry ? PyObject_GetAttrString(geometry, "depth") : NULL;
    bool read = number && as_unsigned(number, UINT64_MAX, "depth", depth);
    Py_XDECREF(geometry);
    Py_XDECREF(number);
    return read;
}

static inline bool find_slots(struct shmbroker_queue *queue, const Py_buffer *map, PyObject *segment, uint64_t slot_bytes, PyObject *offset,
                              PyObject *taken_offset)
{
    uint64_t depth, first, taken, room = (uint64_t)map->len;
    shmbroker_word *taken_word;
    if (!depth_of(segment, &depth) || !as_unsigned(offset, UINT64_MAX, "offset", &first)
        || !as_unsigned(taken_offset, UINT64_MAX, "taken_offset", &taken) || !find_word(map, taken, &taken_word))
        return false;
    if (shmbroker_queue_open(queue, map->buf, room, first, slot_bytes, depth, taken))
        return true;
    PyErr_Format(PyExc_ValueError, "%llu slots of %llu bytes at %llu do not lie in a segment of %zd bytes", (unsigned long long)depth,
                 (unsigned long long)slot_bytes, (unsigned long long)first, map->len);
    return false;
}

/* A queue that is whole, or an error and nothing that would have to be given back. */
static inline bool open_queue(struct shmbroker_queue *queue, Py_buffer *map, PyObject *segment, uint64_t slot_bytes, PyObject *offset,
                              PyObject *taken_offset)
{
    PyObject *mapping = PyObject_GetAttrString(segment, "map");
    int failed = mapping == NULL || PyObject_GetBuffer(mapping, map, PyBUF_WRITABLE) < 0;
    Py_XDECREF(mapping);
    if (failed)
        return false;
    if (find_slots(queue, map, segment, slot_bytes, offset, taken_offset))
        return true;
    PyBuffer_Release(map);
    return false;
}

/* Asked last, since all that comes before may run Python code, which may make the same end. */
static inline bool is_first_making(const struct shmbroker_queue *queue)
{
    if (queue->slots == NULL)
        return true;
    PyErr_SetString(PyExc_RuntimeError, "an end of a queue is made once");
    return false;
}

static inline bool make_sender(Sender *self, PyObject *arguments, PyObject *keywords, uint64_t slot_bytes)
{
    static char *names[] = {"segment", "offset", "taken_offset", "sleeping_offset", "ring", NULL};
    PyObject *segment, *offset, *taken_offset, *sleeping_offset, *ring;
    Sender made;
    uint64_t sleeping;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOOOO", names, &segment, &offset, &taken_offset, &sleeping_offset, &ring)
        || !as_unsigned(sleeping_offset, UINT64_MAX, "sleeping_offset", &sleeping)
        || !open_queue(&made.queue, &made.map, segment, slot_bytes, offset, taken_offset))
        return false;
    if (!find_word(&made.map, sleeping, &made.peer_sleeping) || !is_first_making(&self->queue)) {
        PyBuffer_Release(&made.map);
        return false;
    }
    made.ring = Py_NewRef(ring);
    *self = made;
    return true;
}

static inline bool make_receiver(Receiver *self, PyObject *arguments, PyObject *keywords, uint64_t slot_bytes)
{
    static char *names[] = {"segment", "offset", "taken_offset", NULL};
    PyObject *segment, *offset, *taken_offset;
    Receiver made;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOO", names, &segment, &offset, &taken_offset)
        || !open_queue(&made.queue, &made.map, segment, slot_bytes, offset, taken_offset))
        return false;
    if (!is_first_making(&self->queue)) {
        PyBuffer_Release(&made.map);
        return false;
    }
    *self = made;
    return true;
}

static inline void close_sender(Sender *self)
{
    if (self->queue.slots != NULL)
        PyBuffer_Release(&self->map);
    Py_XDECREF(self->ring);
}

static inline void close_receiver(Receiver *self)
{
    if (self->queue.slots != NULL)
        PyBuffer_Release(&self->map);
}

/* --- sending and receiving ---------------------------------------------------------------------------------------------------------------- */

/* Ring the peer's bell where the core says that it has to be rung. False: ring raised. */
static inline bool ring_if(Sender *self, bool must_ring)
{
    if (must_ring) {
        PyObject *rung = PyObject_CallNoArgs(self->ring);
        if (rung == NULL)
            return false;
        Py_DECREF(rung);
    }
    return true;
}

/* Publish the slot and wake the peer if it sleeps. False: ring raised; the frame is published all the same. */
static inline bool commit(Sender *self, uint8_t *slot)
{
    shmbroker_commit(&self->queue, slot);
    return ring_if(self, shmbroker_must_ring(self->peer_sleeping));
}

/* Between two looks. */
static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Whether a frame is published and not yet taken. Needs no interpreter lock. */
static inline bool is_ready(const Receiver *self)
{
    return shmbroker_peek(&self->queue) != NULL;
}

#endif
