/* What the compiled ends have in common as Python objects.
 *
 * Contract of every one of them (what it has beyond this stands at the head of its section)
 *   Before   It was made: its __init__ returned. `segment` has a writable `map`, a buffer of which `offset`, `taken_offset` and `sleeping_offset`
 *            are multiples of 8, and a `geometry` whose `depth`, a power of two, is how many slots lie at `offset`. One process has this end of
 *            this queue, once.
 *   Who      Any thread that holds the interpreter lock, one at a time for each object: threads that share one serialise their calls. The other
 *            ends of a channel need not be waited for.
 *   After    The object keeps `map` exported, so the segment stays mapped while it lives, and mmap.close() raises BufferError. Nothing is written
 *            into the segment but this end's own word and slots, and 0 into the peer's sleeping word.
 *   Failure  A method of an object that was never made, or whose making failed, raises RuntimeError; so does a second making. A making that
 *            fails leaves the object as it was, and may be tried again: ValueError for what does not lie in the segment, AttributeError where
 *            `map` or `geometry` is missing, BufferError or TypeError where `map` is no writable buffer. What does not fit into a frame raises
 *            as _arguments.h says; a frame that was refused leaves the queue as it was.
 */
#ifndef SHMBROKER_ENDS_H
#define SHMBROKER_ENDS_H

#include "_queue.h"

#include <time.h>

#include <shmbroker/frames.h>

/* CLOCK_MONOTONIC, by which all times in frames are told. */
static inline unsigned long long clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (unsigned long long)now.tv_sec * 1000000000u + (unsigned long long)now.tv_nsec;
}

/* What both kinds of senders begin with. */
typedef struct {
    PyObject_HEAD
    Sender sender;
} AnySender;

/* What both kinds of receivers begin with: ready() and spin() are the same for either. */
typedef struct {
    PyObject_HEAD
    Receiver receiver;
} AnyReceiver;

static inline PyObject *receiver_ready(AnyReceiver *self, PyObject *Py_UNUSED(ignored))
{
    return is_made(&self->receiver.queue) ? PyBool_FromLong(is_ready(&self->receiver)) : NULL;
}

static inline void free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* The type of a struct, by its functions prefix_init, prefix_dealloc and its prefix_methods. */
#define END_TYPE(struct_name, prefix, documentation)                                                                                       \
    static PyType_Slot prefix##_slots[] = {                                                                                                \
        {Py_tp_doc, documentation},                                                                                                        \
        {Py_tp_new, PyType_GenericNew},                                                                                                    \
        {Py_tp_init, prefix##_init},                                                                                                       \
        {Py_tp_dealloc, prefix##_dealloc},                                                                                                 \
        {Py_tp_methods, prefix##_methods},                                                                                                 \
        {0, NULL},                                                                                                                         \
    };                                                                                                                                     \
    PyType_Spec prefix##_spec = {                                                                                                          \
        .name = "shmbroker.lane._ends." #struct_name,                                                                                      \
        .basicsize = sizeof(struct_name),                                                                                                  \
        .flags = Py_TPFLAGS_DEFAULT,                                                                                                       \
        .slots = prefix##_slots,                                                                                                           \
    };

extern PyType_Spec submission_sender_spec, submission_receiver_spec, completion_sender_spec, completion_receiver_spec;

#endif
