/* Frames: a call and its outcome, filled by who sends, and read by who cannot trust who sent (F1, F2).
 *
 * Contract of all functions here
 *   Before   A slot is one that claim or peek of queue.h gave, of a queue whose slots are as large as the frame.
 *   Who      Whoever has that end of the queue.
 *   After    A filled slot is whole but for its sequence number, which commit stores. Who reads has a private copy, and looks at nothing else (F1).
 *            Counts in a copy are as the other side wrote them; the functions here clamp them before they are used (F2).
 *   Failure  As each function says; nothing outside of slot and copy is touched.
 */
#ifndef SHMBROKER_FRAMES_H
#define SHMBROKER_FRAMES_H

#include "layout.h"
#include "queue.h"

#include <string.h>

/* --- submissions -------------------------------------------------------------------------------------------------------------------------- */

/* Where in a submission the part begins that is the same for every call of one op on the same blocks. */
#define SHMBROKER_CONSTANT_START offsetof(struct shmbroker_submission_frame, op_id)

/* How a tensor lies: contiguous, `shape` in elements of `element_bytes`, its first one at `offset`. False: more than 8 dimensions, or a negative one. */
static inline bool shmbroker_describe(struct shmbroker_tensor_descriptor *tensor, enum shmbroker_dtype dtype, uint64_t element_bytes,
                                      uint64_t offset, unsigned ndim, const int64_t *shape)
{
    uint64_t elements = 1;
    if (ndim > SHMBROKER_MAX_DIMS)
        return false;
    memset(tensor, 0, sizeof *tensor);
    for (unsigned i = ndim; i-- > 0;) {
        if (shape[i] < 0)
            return false;
        tensor->shape[i] = shape[i];
        tensor->strides[i] = (int64_t)elements;
        elements *= (uint64_t)(shape[i] > 1 ? shape[i] : 1); /* as torch counts strides; a size of 0 makes no bytes, below */
    }
    for (unsigned i = 0; i < ndim; i++)
        if (shape[i] == 0)
            elements = 0;
    tensor->offset = offset;
    tensor->nbytes = elements * element_bytes;
    tensor->dtype = (uint8_t)dtype;
    tensor->ndim = (uint8_t)ndim;
    tensor->space = SHMBROKER_SPACE_SEGMENT;
    return true;
}

/* Of a frame behind its sequence number, `packed`: how many tensors it tells of; -1 for bytes that no frame has. */
static inline int shmbroker_packed_tensors(const void *packed, size_t nbytes)
{
    const uint8_t *bytes = (const uint8_t *)packed;
    size_t head = offsetof(struct shmbroker_submission_frame, tensors) - SHMBROKER_SEQUENCE_BYTES;
    uint16_t inputs, outputs;
    if (nbytes < head || nbytes > sizeof(struct shmbroker_submission_frame) - SHMBROKER_SEQUENCE_BYTES)
        return -1;
    memcpy(&inputs, bytes + offsetof(struct shmbroker_submission_frame, input_count) - SHMBROKER_SEQUENCE_BYTES, sizeof inputs);
    memcpy(&outputs, bytes + offsetof(struct shmbroker_submission_frame, output_count) - SHMBROKER_SEQUENCE_BYTES, sizeof outputs);
    size_t tensors = (size_t)inputs + outputs;
    if (tensors > SHMBROKER_MAX_TENSORS || nbytes < head + tensors * sizeof(struct shmbroker_tensor_descriptor))
        return -1;
    return (int)tensors;
}

/* How many bytes of `frame`, a private one, have to be sent behind its sequence number: to its last tensor, or all with metadata. */
static inline size_t shmbroker_packed_bytes(const struct shmbroker_submission_frame *frame)
{
    size_t tensors = (size_t)frame->input_count + frame->output_count;
    if (frame->metadata_bytes || tensors > SHMBROKER_MAX_TENSORS)
        return sizeof *frame - SHMBROKER_SEQUENCE_BYTES;
    return offsetof(struct shmbroker_submission_frame, tensors) + tensors * sizeof *frame->tensors - SHMBROKER_SEQUENCE_BYTES;
}

/* A frame that was packed before, with what differs from call to call. `packed` is one that shmbroker_packed_tensors has counted. */
static inline void shmbroker_fill_submission(uint8_t *slot, const void *packed, size_t nbytes, uint64_t call_id, uint64_t deadline_ns,
                                             uint64_t submitted_ns)
{
    struct shmbroker_submission_frame *frame = (struct shmbroker_submission_frame *)slot;
    memcpy(slot + SHMBROKER_SEQUENCE_BYTES, packed, nbytes);
    frame->call_id = call_id;
    frame->deadline_ns = deadline_ns;
    frame->submitted_ns = submitted_ns;
}

/* Where its tensor number `i` lies this time, below SHMBROKER_MAX_TENSORS; inputs come first. */
static inline void shmbroker_fill_tensor(uint8_t *slot, int i, uint64_t offset, uint32_t generation)
{
    struct shmbroker_submission_frame *frame = (struct shmbroker_submission_frame *)slot;
    frame->tensors[i].offset = offset;
    frame->generations[i] = generation;
}

/* A private copy of the frame in the slot, all of it (F1). */
static inline void shmbroker_copy_submission(const uint8_t *slot, struct shmbroker_submission_frame *copy)
{
    memcpy(copy, slot, sizeof *copy);
    SHMBROKER_COPIED();
}

/* How many tensors a copy tells of, as far as it may (F2). */
static inline size_t shmbroker_tensors_in(const struct shmbroker_submission_frame *copy)
{
    size_t tensors = (size_t)(copy->input_count & 0xff) + (copy->output_count & 0xff);
    return tensors > SHMBROKER_MAX_TENSORS ? SHMBROKER_MAX_TENSORS : tensors;
}

/* How many bytes of a copy are its constant part, from SHMBROKER_CONSTANT_START on: within the frame, whatever counts the frame tells (F2). */
static inline size_t shmbroker_constant_bytes(const struct shmbroker_submission_frame *copy)
{
    return offsetof(struct shmbroker_submission_frame, tensors) + shmbroker_tensors_in(copy) * sizeof *copy->tensors - SHMBROKER_CONSTANT_START;
}

/* A private copy of a frame to the end of its constant part (F1): all that has to be looked at of one that was met before. */
static inline void shmbroker_copy_constant(const uint8_t *slot, struct shmbroker_submission_frame *copy)
{
    size_t head = offsetof(struct shmbroker_submission_frame, tensors);
    memcpy(copy, slot, head);
    SHMBROKER_COPIED();
    memcpy(copy->tensors, slot + head, shmbroker_tensors_in(copy) * sizeof *copy->tensors);
    SHMBROKER_COPIED();
}

/* --- completions -------------------------------------------------------------------------------------------------------------------------- */

/* How a call ended. `text` has at most SHMBROKER_TEXT_BYTES. */
static inline void shmbroker_fill_completion(uint8_t *slot, uint64_t call_id, uint32_t status, uint64_t queued_ns, uint64_t compute_ns,
                                             const void *text, uint32_t text_bytes)
{
    struct shmbroker_completion_frame *frame = (struct shmbroker_completion_frame *)slot;
    frame->call_id = call_id;
    frame->status = status;
    frame->reserved0 = 0;
    frame->text_bytes = text_bytes;
    frame->reserved1 = 0;
    frame->queued_ns = queued_ns;
    frame->compute_ns = compute_ns;
    if (text_bytes)
        memcpy(frame->body, text, text_bytes);
}

/* A private copy of the completion in the slot (F1), of its body what it says to have. False: it cannot be one, and is to be passed over (F2). */
static inline bool shmbroker_copy_completion(const uint8_t *slot, struct shmbroker_completion_frame *copy)
{
    size_t body = offsetof(struct shmbroker_completion_frame, body);
    memcpy(copy, slot, body);
    SHMBROKER_COPIED();
    if (copy->text_bytes > SHMBROKER_TEXT_BYTES)
        return false;
    if (copy->text_bytes) {
        memcpy(copy->body, slot + body, copy->text_bytes);
        SHMBROKER_COPIED();
    }
    return true;
}

#endif
