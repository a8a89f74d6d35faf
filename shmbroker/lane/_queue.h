/* What the compiled ends of a queue share: where the slots lie, claim and commit of whoever sends, look and advance of whoever receives.
 *
 * The rules Q1..Q3 are told in queue.py, the fence D1 and the word D4 in doorbell.py; the layout is shmbroker.h.
 *
 * Contract of all functions here
 *   Before   The interpreter lock is held, but for is_ready. The part was made: its owner's methods ask is_made first. A slot that claim gave is
 *            followed by one commit, with nothing between them that could run Python code, or by none: then nothing is published, and the
 *            next claim gives the same slot. advance follows an is_ready that said so, once, likewise.
 *   Who      One thread at a time for each end.
 *   After    All memory that is touched lies in the mapping, whatever the other side has written into it: positions are counted here and not
 *            read back, and the one word of the other side that is read is clamped.
 *   Failure  What makes a part makes all of it or leaves it as it was, with an error set.
 */
#ifndef SHMBROKER_QUEUE_H
#define SHMBROKER_QUEUE_H

#include "../memory/_arguments.h"

#include <stdatomic.h>

enum { SEQUENCE_BYTES = 8 };

/* The slots of one queue, as one end of it sees them. */
typedef struct {
    Py_buffer map;  /* keeps the segment mapped for as long as the end lives */
    uint8_t *slots; /* NULL: never made */
    uint64_t slot_bytes;
    uint64_t mask;
    uint64_t position; /* frames published, or taken, so far */
    _Atomic uint64_t *taken;
} Queue;

/* The part of an end that frames are put into. */
typedef struct {
    Queue queue;
    uint64_t known_taken;
    _Atomic uint64_t *peer_sleeping;
    PyObject *ring; /* wakes the peer */
} Sender;

/* The part of an end that frames come out of. */
typedef struct {
    Queue queue;
} Receiver;

/* --- making and ending -------------------------------------------------------------------------------------------------------------------- */

static inline bool is_made(const Queue *queue)
{
    if (queue->slots != NULL)
        return true;
    PyErr_SetString(PyExc_RuntimeError, "this end of a queue was never made: its __init__ was not called, or raised");
    return false;
}

static inline bool find_word(const Queue *queue, uint64_t offset, _Atomic uint64_t **word)
{
    uint64_t room = (uint64_t)queue->map.len;
    if (offset % 8 || room < 8 || offset > room - 8) {
        PyErr_Format(PyExc_ValueError, "a word at %llu does not lie in a segment of %zd bytes", (unsigned long long)offset, queue->map.len);
        return false;
    }
    *word = (_Atomic uint64_t *)((uint8_t *)queue->map.buf + offset);
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

static inline bool find_slots(Queue *queue, PyObject *segment, uint64_t slot_bytes, PyObject *offset, PyObject *taken_offset)
{
    uint64_t depth, first, taken, room = (uint64_t)queue->map.len;
    if (!depth_of(segment, &depth) || !as_unsigned(offset, UINT64_MAX, "offset", &first)
        || !as_unsigned(taken_offset, UINT64_MAX, "taken_offset", &taken))
        return false;
    if (depth == 0 || (depth & (depth - 1)) || first % 8 || first > room || depth > (room - first) / slot_bytes) {
        PyErr_Format(PyExc_ValueError, "%llu slots of %llu bytes at %llu do not lie in a segment of %zd bytes", (unsigned long long)depth,
                     (unsigned long long)slot_bytes, (unsigned long long)first, queue->map.len);
        return false;
    }
    queue->slots = (uint8_t *)queue->map.buf + first;
    queue->slot_bytes = slot_bytes;
    queue->mask = depth - 1;
    return find_word(queue, taken, &queue->taken);
}

/* A queue that is whole, or an error and nothing that would have to be given back. */
static inline bool open_queue(Queue *queue, PyObject *segment, uint64_t slot_bytes, PyObject *offset, PyObject *taken_offset)
{
    *queue = (Queue){.slots = NULL};
    PyObject *map = PyObject_GetAttrString(segment, "map");
    int failed = map == NULL || PyObject_GetBuffer(map, &queue->map, PyBUF_WRITABLE) < 0;
    Py_XDECREF(map);
    if (failed)
        return false;
    if (find_slots(queue, segment, slot_bytes, offset, taken_offset))
        return true;
    PyBuffer_Release(&queue->map);
    return false;
}

/* Asked last, since all that comes before may run Python code, which may make the same end. */
static inline bool is_first_making(const Queue *queue)
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
    Sender made = {.known_taken = 0};
    uint64_t sleeping;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOOOO", names, &segment, &offset, &taken_offset, &sleeping_offset, &ring)
        || !as_unsigned(sleeping_offset, UINT64_MAX, "sleeping_offset", &sleeping)
        || !open_queue(&made.queue, segment, slot_bytes, offset, taken_offset))
        return false;
    if (!find_word(&made.queue, sleeping, &made.peer_sleeping) || !is_first_making(&self->queue)) {
        PyBuffer_Release(&made.queue.map);
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
        || !open_queue(&made.queue, segment, slot_bytes, offset, taken_offset))
        return false;
    if (!is_first_making(&self->queue)) {
        PyBuffer_Release(&made.queue.map);
        return false;
    }
    *self = made;
    return true;
}

static inline void close_queue(Queue *queue)
{
    if (queue->slots != NULL)
        PyBuffer_Release(&queue->map);
}

static inline void close_sender(Sender *self)
{
    close_queue(&self->queue);
    Py_XDECREF(self->ring);
}

/* --- sending ------------------------------------------------------------------------------------------------------------------------------ */

static inline uint8_t *slot_of(const Queue *queue, uint64_t position)
{
    return queue->slots + (position & queue->mask) * queue->slot_bytes;
}

static inline _Atomic uint64_t *sequence_of(uint8_t *slot)
{
    return (_Atomic uint64_t *)slot;
}

/* The slot to fill, or NULL while the queue is full (Q1). The consumer's word can be anything: it is clamped. */
static inline uint8_t *claim(Sender *self)
{
    Queue *queue = &self->queue;
    if (queue->position - self->known_taken > queue->mask) {
        uint64_t taken = atomic_load_explicit(queue->taken, memory_order_acquire);
        self->known_taken = taken < queue->position ? taken : queue->position;
        if (queue->position - self->known_taken > queue->mask)
            return NULL;
    }
    return slot_of(queue, queue->position);
}

/* Wake the peer if it sleeps; its word is taken down, so that it is rung for once (D4). False: ring raised. */
static inline bool wake(Sender *self)
{
    if (atomic_load_explicit(self->peer_sleeping, memory_order_relaxed)) {
        atomic_store_explicit(self->peer_sleeping, 0, memory_order_relaxed);
        PyObject *rung = PyObject_CallNoArgs(self->ring);
        if (rung == NULL)
            return false;
        Py_DECREF(rung);
    }
    return true;
}

/* Publish the slot (Q2) and wake the peer if it sleeps (D1). False: ring raised; the frame is published all the same. */
static inline bool commit(Sender *self, uint8_t *slot)
{
    self->queue.position += 1;
    atomic_store_explicit(sequence_of(slot), self->queue.position, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    return wake(self);
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

/* --- receiving ---------------------------------------------------------------------------------------------------------------------------- */

/* Whether a frame is published and not yet taken. Needs no interpreter lock. */
static inline bool is_ready(const Receiver *self)
{
    uint8_t *slot = slot_of(&self->queue, self->queue.position);
    return atomic_load_explicit(sequence_of(slot), memory_order_acquire) == self->queue.position + 1;
}

/* The frame has been copied: its slot may be filled again (Q3). */
static inline void advance(Receiver *self)
{
    self->queue.position += 1;
    atomic_store_explicit(self->queue.taken, self->queue.position, memory_order_release);
}

#endif
