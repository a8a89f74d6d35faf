/* A client's segment: mapped, its header checked against the file's true size before anything in it is believed, and the queues of its channels.
 *
 * Contract of all functions here
 *   Before   A segment is one that shmbroker_segment_map gave. Its channel area `index` was cleared before either end is opened.
 *   Who      Any thread; each end of a queue belongs to one.
 *   After    The map stays until shmbroker_segment_unmap, and with it every end. The descriptor is the caller's: who uses the segment for life
 *            keeps a shared flock on one (docs/memory-layout.md, "Other objects"); a mapping alone holds nothing.
 *   Failure  A text that says what is wrong, or NULL where nothing is; false where a queue does not lie in the segment.
 */
#ifndef SHMBROKER_SEGMENT_H
#define SHMBROKER_SEGMENT_H

#if defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE)
#define _POSIX_C_SOURCE 200809L /* -std=c11 hides POSIX; includes above this one, if any, have to say so before them */
#endif

#include "layout.h"
#include "queue.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Copied out of the header when it was checked: what it says later changes nothing. Offsets are bytes from the start. */
struct shmbroker_segment {
    uint8_t *map;
    uint64_t total_bytes;
    uint64_t arena_offset;
    uint64_t arena_bytes;
    uint64_t channels_offset;
    uint64_t channel_bytes;
    uint32_t channel_count;
    uint32_t depth; /* of every queue */
};

#define SHMBROKER_PAGE 4096u
#define SHMBROKER_MOST_CHANNELS 1024u
#define SHMBROKER_MOST_DEPTH 65536u

static inline uint64_t shmbroker_whole_pages(uint64_t nbytes)
{
    return (nbytes + SHMBROKER_PAGE - 1) / SHMBROKER_PAGE * SHMBROKER_PAGE;
}

/* What is wrong with a private copy of a header, in a file of so many bytes; NULL, and `segment` has its sizes, where nothing is. */
static inline const char *shmbroker_segment_check(struct shmbroker_segment *segment, const struct shmbroker_segment_header *header,
                                                  uint64_t file_bytes)
{
    uint64_t depth = header->submission_depth, channels = header->channel_count, arena = header->arena_bytes;
    if (header->version == 0)
        return "the segment is still being made: try again";
    if (memcmp(header->magic, SHMBROKER_MAGIC, sizeof header->magic) != 0 || header->byte_order != SHMBROKER_BYTE_ORDER_MARK)
        return "the file is no segment of shmbroker's";
    if (header->version != SHMBROKER_LAYOUT_VERSION)
        return "the segment has another layout version than this program: run the same release of shmbroker at both ends";
    if (depth == 0 || (depth & (depth - 1)) || depth > SHMBROKER_MOST_DEPTH || channels == 0 || channels > SHMBROKER_MOST_CHANNELS
        || arena < SHMBROKER_PAGE || arena % SHMBROKER_PAGE || arena > file_bytes)
        return "the segment has a spoilt header: sizes that no segment has";
    uint64_t channel_bytes = sizeof(struct shmbroker_channel_header)
                             + depth * (sizeof(struct shmbroker_submission_frame) + sizeof(struct shmbroker_completion_frame));
    uint64_t channels_offset
        = shmbroker_whole_pages(sizeof(struct shmbroker_segment_header) + channels * sizeof(struct shmbroker_channel_statistics));
    uint64_t arena_offset = shmbroker_whole_pages(channels_offset + channels * channel_bytes);
    if (header->statistics_offset != sizeof(struct shmbroker_segment_header)
        || header->statistics_bytes != sizeof(struct shmbroker_channel_statistics) || header->channels_offset != channels_offset
        || header->channel_bytes != channel_bytes || header->arena_offset != arena_offset || header->total_bytes != arena_offset + arena
        || header->total_bytes > file_bytes || header->completion_depth != depth || header->alignment != SHMBROKER_ALIGNMENT
        || header->submission_slot_bytes != sizeof(struct shmbroker_submission_frame)
        || header->completion_slot_bytes != sizeof(struct shmbroker_completion_frame))
        return "the segment has a spoilt header: its parts do not lie where they have to";
    segment->total_bytes = arena_offset + arena;
    segment->arena_offset = arena_offset;
    segment->arena_bytes = arena;
    segment->channels_offset = channels_offset;
    segment->channel_bytes = channel_bytes;
    segment->channel_count = (uint32_t)channels;
    segment->depth = (uint32_t)depth;
    return NULL;
}

/* Map the segment that `fd`, of a regular file as those in /dev/shm are, is open on for reading and writing, all of it. A client that cuts its own file short later kills who touches it: SIGBUS. */
static inline const char *shmbroker_segment_map(struct shmbroker_segment *segment, int fd)
{
    struct shmbroker_segment_header header;
    struct stat found;
    segment->map = NULL;
    if (fstat(fd, &found) < 0)
        return "the segment cannot be looked at";
    if ((uint64_t)found.st_size < SHMBROKER_PAGE || pread(fd, &header, sizeof header, 0) != (ssize_t)sizeof header)
        return "the segment is still being made: try again";
    const char *wrong = shmbroker_segment_check(segment, &header, (uint64_t)found.st_size);
    if (wrong != NULL)
        return wrong;
    void *map = mmap(NULL, segment->total_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        return "the segment cannot be mapped";
    segment->map = (uint8_t *)map;
    return NULL;
}

static inline void shmbroker_segment_unmap(struct shmbroker_segment *segment)
{
    if (segment->map != NULL)
        munmap(segment->map, segment->total_bytes);
    segment->map = NULL;
}

/* --- channels ----------------------------------------------------------------------------------------------------------------------------- */

/* Where channel area `index`, below channel_count, begins. */
static inline uint64_t shmbroker_channel_offset(const struct shmbroker_segment *segment, uint32_t index)
{
    return segment->channels_offset + index * segment->channel_bytes;
}

/* A channel area as new: before it is opened, by the client alone. */
static inline void shmbroker_clear_channel(struct shmbroker_segment *segment, uint32_t index)
{
    size_t statistics = sizeof(struct shmbroker_channel_statistics);
    memset(segment->map + shmbroker_channel_offset(segment, index), 0, segment->channel_bytes);
    memset(segment->map + sizeof(struct shmbroker_segment_header) + index * statistics, 0, statistics);
}

/* An end of the submission queue of a channel: the client sends, the worker receives. */
static inline bool shmbroker_open_submissions(struct shmbroker_queue *queue, const struct shmbroker_segment *segment, uint32_t index)
{
    uint64_t area = shmbroker_channel_offset(segment, index);
    return index < segment->channel_count
           && shmbroker_queue_open(queue, segment->map, segment->total_bytes, area + sizeof(struct shmbroker_channel_header),
                                   sizeof(struct shmbroker_submission_frame), segment->depth,
                                   area + offsetof(struct shmbroker_channel_header, submissions_taken));
}

/* An end of its completion queue: the worker sends, the client receives. */
static inline bool shmbroker_open_completions(struct shmbroker_queue *queue, const struct shmbroker_segment *segment, uint32_t index)
{
    uint64_t area = shmbroker_channel_offset(segment, index), submissions = segment->depth * sizeof(struct shmbroker_submission_frame);
    return index < segment->channel_count
           && shmbroker_queue_open(queue, segment->map, segment->total_bytes, area + sizeof(struct shmbroker_channel_header) + submissions,
                                   sizeof(struct shmbroker_completion_frame), segment->depth,
                                   area + offsetof(struct shmbroker_channel_header, completions_taken));
}

/* The word that the client puts up before it sleeps, whichever channel it waits for. */
static inline shmbroker_word *shmbroker_client_sleeping(const struct shmbroker_segment *segment)
{
    return shmbroker_word_at(segment->map + offsetof(struct shmbroker_segment_header, client_sleeping));
}

/* The word that the worker puts up before it sleeps, in each channel that it waits for; `index` is below channel_count. */
static inline shmbroker_word *shmbroker_worker_sleeping(const struct shmbroker_segment *segment, uint32_t index)
{
    return shmbroker_word_at(segment->map + shmbroker_channel_offset(segment, index) + offsetof(struct shmbroker_channel_header, worker_sleeping));
}

#endif
