/* The core alone: what a call is below all Python. Two processes hand blocks of one segment over by offset only, and spin.
 *
 *   core_floor worker SEGMENT          answers each submission with a completion, until whoever started it is gone
 *   core_floor client SEGMENT NBYTES   says "ready"; for each line with a number of seconds on its standard input it calls for so long, and writes how many
 *                                      calls it made, a line end, and so many 8-byte numbers: the nanoseconds of each
 *
 * SEGMENT is the path of one whose channel area 0 is new, with room for two blocks of NBYTES. Nobody sleeps, so nobody is rung for; whether somebody does is
 * asked after each frame, as every end has to (D1).
 */
#define _GNU_SOURCE
#include <shmbroker.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

enum {
    AREA = 0,
    LOOKS_BETWEEN_CLOCKS = 1 << 20, /* some milliseconds, in which nothing came */
    GIVE_UP_SECONDS = 30,
    MOST_CALLS = 1 << 22, /* of one line: half a second's at 8 million a second */
};

static _Noreturn void fail(const char *what)
{
    fprintf(stderr, "core_floor: %s\n", what);
    exit(1);
}

static uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Look until there is a frame: its slot. NULL: whoever started this process is gone, or nothing has come for too long. */
static const uint8_t *next(const struct shmbroker_queue *queue, pid_t parent, uint64_t seconds)
{
    uint64_t until = clock_ns() + seconds * 1000000000u;
    for (;;) {
        for (int look = 0; look < LOOKS_BETWEEN_CLOCKS; look++) {
            const uint8_t *slot = shmbroker_peek(queue);
            if (slot != NULL)
                return slot;
            relax();
        }
        if (getppid() != parent || (seconds && clock_ns() > until))
            return NULL;
    }
}

static void work(const struct shmbroker_segment *segment, struct shmbroker_queue *submissions, struct shmbroker_queue *completions)
{
    struct shmbroker_submission_frame frame;
    const uint8_t *slot;
    pid_t parent = getppid();
    while ((slot = next(submissions, parent, 0)) != NULL) {
        shmbroker_copy_constant(slot, &frame);
        shmbroker_advance(submissions);
        for (size_t i = 0; i < shmbroker_tensors_in(&frame); i++)
            if (frame.tensors[i].offset < segment->arena_offset || frame.tensors[i].nbytes > segment->total_bytes - frame.tensors[i].offset)
                fail("a block lies outside of the arena");
        uint8_t *answer = shmbroker_claim(completions);
        if (answer == NULL)
            fail("the client has left its queue full");
        shmbroker_fill_completion(answer, frame.call_id, SHMBROKER_STATUS_OK, 0, 0, NULL, 0);
        shmbroker_commit(completions, answer);
        if (shmbroker_must_ring(shmbroker_client_sleeping(segment)))
            fail("a client that spins is said to sleep");
    }
}

static void call(const struct shmbroker_segment *segment, struct shmbroker_queue *submissions, struct shmbroker_queue *completions, uint64_t nbytes)
{
    static uint64_t samples[MOST_CALLS];
    struct shmbroker_submission_frame frame = {.op_id = 1, .input_count = 1, .output_count = 1};
    struct shmbroker_completion_frame completion;
    uint64_t call_id = 0, room = (nbytes + SHMBROKER_ALIGNMENT - 1) / SHMBROKER_ALIGNMENT * SHMBROKER_ALIGNMENT;
    double seconds;
    pid_t parent = getppid();
    if (2 * room > segment->arena_bytes)
        fail("the segment has no room for two blocks");
    for (int i = 0; i < 2; i++)
        shmbroker_describe(&frame.tensors[i], SHMBROKER_DTYPE_UINT8, 1, segment->arena_offset + (uint64_t)i * room, 1, &(int64_t){(int64_t)nbytes});
    const uint8_t *packed = (const uint8_t *)&frame + SHMBROKER_SEQUENCE_BYTES;
    size_t packed_bytes = shmbroker_packed_bytes(&frame);
    while (scanf("%lf", &seconds) == 1) {
        uint64_t count = 0, begun = clock_ns(), until = begun + (uint64_t)(seconds * 1e9), before = begun, after;
        do {
            uint8_t *slot = shmbroker_claim(submissions);
            if (slot == NULL)
                fail("the worker leaves frames lying");
            shmbroker_fill_submission(slot, packed, packed_bytes, ++call_id, 0, before);
            for (int i = 0; i < 2; i++)
                shmbroker_fill_tensor(slot, i, segment->arena_offset + (uint64_t)i * room, (uint32_t)call_id | 1);
            shmbroker_commit(submissions, slot);
            if (shmbroker_must_ring(shmbroker_worker_sleeping(segment, AREA)))
                fail("a worker that spins is said to sleep");
            const uint8_t *answer = next(completions, parent, GIVE_UP_SECONDS);
            if (answer == NULL)
                fail("the worker does not answer");
            bool whole = shmbroker_copy_completion(answer, &completion);
            shmbroker_advance(completions);
            if (!whole || completion.call_id != call_id || completion.status != SHMBROKER_STATUS_OK)
                fail("the worker completed what was not called");
            after = clock_ns();
            samples[count++] = after - before;
            before = after;
        } while (after < until && count < MOST_CALLS);
        printf("%" PRIu64 "\n", count);
        fwrite(samples, sizeof *samples, count, stdout);
        fflush(stdout);
    }
}

int main(int count, char **arguments)
{
    struct shmbroker_segment segment;
    struct shmbroker_queue submissions, completions;
    if (count < 3)
        fail("usage: core_floor worker SEGMENT | core_floor client SEGMENT NBYTES");
    int fd = open(arguments[2], O_RDWR | O_CLOEXEC);
    const char *wrong = fd < 0 ? "the segment cannot be opened" : shmbroker_segment_map(&segment, fd);
    if (wrong != NULL)
        fail(wrong);
    if (!shmbroker_open_submissions(&submissions, &segment, AREA) || !shmbroker_open_completions(&completions, &segment, AREA))
        fail("the segment has no channel");
    puts("ready");
    fflush(stdout);
    if (count == 4)
        call(&segment, &submissions, &completions, strtoull(arguments[3], NULL, 10));
    else
        work(&segment, &submissions, &completions);
    return 0;
}
