/* One end of a queue in shared memory: claim and commit of who sends, peek and advance of who receives (Q1 to Q3).
 *
 * Contract of all functions here
 *   Before   shmbroker_queue_open said true. A slot that claim gave is followed by one commit, or by none: then nothing is published, and the next
 *            claim gives the same slot. A slot that peek gave is followed by one advance, likewise.
 *   Who      One thread at a time for each end; the other end need not be waited for. The memory stays mapped: that is the owner's to see to.
 *   After    All memory that is touched lies in the mapping, whatever the other side has written into it: positions are counted here and not
 *            read back, and the one word of the other side that is read is clamped.
 *   Failure  NULL or false, and nothing was changed.
 */
#ifndef SHMBROKER_QUEUE_H
#define SHMBROKER_QUEUE_H

#include "word.h"

#include <stddef.h>

enum { SHMBROKER_SEQUENCE_BYTES = 8 }; /* how every frame begins */

/* The slots of one queue, as one end of it sees them. */
struct shmbroker_queue {
    uint8_t *slots; /* NULL: never opened */
    uint64_t slot_bytes;
    uint64_t mask;        /* slots, less one */
    uint64_t position;    /* frames published, or taken, so far: counted here */
    uint64_t known_taken; /* of who sends: what the receiver said when it was last asked, never more than `position` */
    shmbroker_word *taken;
};

/* Whether `count` things of `nbytes` lie at `offset` in `room` bytes, at a multiple of 8. `nbytes` is not 0. */
static inline bool shmbroker_lies_in(uint64_t room, uint64_t offset, uint64_t count, uint64_t nbytes)
{
    return offset % 8 == 0 && offset <= room && count <= (room - offset) / nbytes;
}

/* An end that has sent, or taken, nothing yet; the channel area was cleared. False: `depth` is no power of two, or something lies outside of `map`. */
static inline bool shmbroker_queue_open(struct shmbroker_queue *queue, void *map, uint64_t map_bytes, uint64_t offset, uint64_t slot_bytes,
                                        uint64_t depth, uint64_t taken_offset)
{
    if (depth == 0 || (depth & (depth - 1)) || slot_bytes < SHMBROKER_SEQUENCE_BYTES || slot_bytes % 8)
        return false;
    if (!shmbroker_lies_in(map_bytes, offset, depth, slot_bytes) || !shmbroker_lies_in(map_bytes, taken_offset, 1, sizeof(shmbroker_word)))
        return false;
    queue->slots = (uint8_t *)map + offset;
    queue->slot_bytes = slot_bytes;
    queue->mask = depth - 1;
    queue->position = 0;
    queue->known_taken = 0;
    queue->taken = shmbroker_word_at((uint8_t *)map + taken_offset);
    return true;
}

static inline uint8_t *shmbroker_slot_of(const struct shmbroker_queue *queue, uint64_t position)
{
    return queue->slots + (position & queue->mask) * queue->slot_bytes;
}

/* --- who sends ---------------------------------------------------------------------------------------------------------------------------- */

/* The slot to fill behind its first 8 bytes, or NULL while the queue is full (Q1). The receiver's word can be anything: it is clamped. */
static inline uint8_t *shmbroker_claim(struct shmbroker_queue *queue)
{
    if (queue->position - queue->known_taken > queue->mask) {
        uint64_t taken = SHMBROKER_ASK_TAKEN(queue->taken);
        queue->known_taken = taken < queue->position ? taken : queue->position;
        if (queue->position - queue->known_taken > queue->mask)
            return NULL;
    }
    return shmbroker_slot_of(queue, queue->position);
}

/* Publish the slot that was claimed (Q2). Then shmbroker_must_ring of doorbell.h is asked. */
static inline void shmbroker_commit(struct shmbroker_queue *queue, uint8_t *slot)
{
    queue->position += 1;
    SHMBROKER_PUBLISH(shmbroker_word_at(slot), queue->position);
}

/* --- who receives ------------------------------------------------------------------------------------------------------------------------- */

/* The slot of the next frame, to be copied from, or NULL when there is none. Until advance the other side leaves it alone, if it means well. */
static inline uint8_t *shmbroker_peek(const struct shmbroker_queue *queue)
{
    uint8_t *slot = shmbroker_slot_of(queue, queue->position);
    return SHMBROKER_LOOK(shmbroker_word_at(slot)) == queue->position + 1 ? slot : NULL;
}

/* The frame has been copied: its slot may be filled again (Q3). */
static inline void shmbroker_advance(struct shmbroker_queue *queue)
{
    queue->position += 1;
    SHMBROKER_SAY_TAKEN(queue->taken, queue->position);
}

#endif
