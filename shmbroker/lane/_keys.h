/* Frames recognised by their bytes alone. */
#ifndef SHMBROKER_KEYS_H
#define SHMBROKER_KEYS_H

#include "../memory/_arguments.h"

#include <shmbroker/frames.h>

enum { KEYS = 256 }; /* a power of two */

/* Keys that were given before, each where its bytes' mixture says: so Python hashes each only once. */
typedef struct {
    PyObject *known[KEYS];
} Keys;

/* The constant part of a private copy of a frame, as the very object that was given for the same bytes before where there is one. NULL with MemoryError. */
static inline PyObject *key_of(Keys *keys, const struct shmbroker_submission_frame *frame)
{
    const char *start = (const char *)frame + SHMBROKER_CONSTANT_START;
    Py_ssize_t nbytes = (Py_ssize_t)shmbroker_constant_bytes(frame);
    size_t tensors = shmbroker_tensors_in(frame);
    uint64_t mixed = frame->op_id;
    for (size_t i = 0; i < tensors; i++)
        mixed = (mixed ^ frame->tensors[i].offset) * 0x9e3779b97f4a7c15u;
    PyObject **known = &keys->known[mixed >> 32 & (KEYS - 1)];
    if (*known != NULL && PyBytes_GET_SIZE(*known) == nbytes && memcmp(PyBytes_AS_STRING(*known), start, (size_t)nbytes) == 0)
        return Py_NewRef(*known);
    PyObject *key = PyBytes_FromStringAndSize(start, nbytes);
    if (key != NULL)
        Py_XSETREF(*known, Py_NewRef(key));
    return key;
}

static inline void forget_keys(Keys *keys)
{
    for (int i = 0; i < KEYS; i++)
        Py_CLEAR(keys->known[i]);
}

#endif
