/* Frames recognised by their bytes alone. */
#ifndef SHMBROKER_KEYS_H
#define SHMBROKER_KEYS_H

#include "../memory/_arguments.h"

#include <stddef.h>
#include <string.h>

#include "../memory/shmbroker.h"

enum { KEYS = 256 }; /* a power of two */

/* Keys that were given before, each where its bytes' mixture says: so Python hashes each only once. */
typedef struct {
    PyObject *known[KEYS];
} Keys;

/* How many tensors a frame tells of, clamped. */
static inline unsigned tensors_in(const struct shmbroker_submission_frame *frame)
{
    unsigned tensors = (frame->input_count & 0xff) + (frame->output_count & 0xff);
    return tensors > SHMBROKER_MAX_TENSORS ? SHMBROKER_MAX_TENSORS : tensors;
}

/* The constant part of a private copy of a frame, as the very object that was given for the same bytes before where there is one. NULL with MemoryError. */
static inline PyObject *key_of(Keys *keys, const struct shmbroker_submission_frame *frame)
{
    const char *start = (const char *)&frame->op_id;
    unsigned tensors = tensors_in(frame);
    Py_ssize_t nbytes = (Py_ssize_t)(offsetof(struct shmbroker_submission_frame, tensors) - offsetof(struct shmbroker_submission_frame, op_id)
                                     + tensors * sizeof(struct shmbroker_tensor_descriptor));
    uint64_t mixed = frame->op_id;
    for (unsigned i = 0; i < tensors; i++)
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
