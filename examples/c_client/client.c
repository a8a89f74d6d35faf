/* A client in C: calls one op of a worker on shared memory.   client SERVICE OP NUMBER...
 *
 * The numbers become a float32 tensor in this process's own segment, the op (of one input, with one output like it, as `double` in README.md) writes its
 * result beside it, and the result is printed. Nothing is copied between the processes. The broker is found as Python's clients find it, by
 * $SHMBROKER_INSTANCE and $SHMBROKER_RUNTIME_DIR, on its unix socket, with segments in /dev/shm. Ends with 0, or with 1 and one line that says why.
 */
#define _GNU_SOURCE
#include <shmbroker.h>

#include "control.h"

#include <poll.h>
#include <sys/file.h>
#include <sys/random.h>

enum { DEPTH = 4, ARENA_BYTES = 1 << 20, AREA = 0, CALL_ID = 1 };

static uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now); /* that of deadline_ns and submitted_ns */
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The folder of the broker's socket: as runtime_dir() of shmbroker/control/endpoint.py, but for a file of settings. */
static void find_folder(char folder[TEXT])
{
    const char *told = getenv("SHMBROKER_RUNTIME_DIR"), *user = getenv("XDG_RUNTIME_DIR");
    if (told != NULL)
        snprintf(folder, TEXT, "%s", told);
    else if (geteuid() == 0 || access("/run/shmbroker", R_OK | X_OK) == 0)
        snprintf(folder, TEXT, "/run/shmbroker");
    else if (user != NULL && access(user, W_OK) == 0)
        snprintf(folder, TEXT, "%s/shmbroker", user);
    else
        snprintf(folder, TEXT, "/tmp/shmbroker-%u", (unsigned)geteuid());
}

/* Hold an object for life (H1): a shared lock on its file, which the kernel drops when this process ends, however it does. */
static int held(const char *prefix, const char *name)
{
    char path[2 * TEXT];
    struct stat found;
    snprintf(path, sizeof path, "/dev/shm/%s%s", prefix, name + 1);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || flock(fd, LOCK_SH) < 0 || fstat(fd, &found) < 0 || found.st_nlink == 0)
        fail("%s cannot be held: %s", path, strerror(errno));
    return fd;
}

/* Wait for the completion of the one call there is: its slot. `worker`: its control socket, which the kernel closes when the worker ends. */
static const uint8_t *completed(const struct shmbroker_queue *completions, shmbroker_word *sleeping, struct shmbroker_bell *bell, int worker)
{
    const uint8_t *slot;
    for (uint64_t until = clock_ns() + SECONDS * 1000000000ull;;) {
        shmbroker_before_sleep(sleeping);
        slot = shmbroker_peek(completions);
        if (slot == NULL)
            shmbroker_bell_wait(bell, SHMBROKER_RECHECK_NS);
        shmbroker_after_sleep(sleeping);
        struct pollfd socket = {.fd = worker, .events = POLLRDHUP};
        bool gone = poll(&socket, 1, 0) > 0; /* asked first: what it answered before it died is answered */
        if (slot != NULL || (slot = shmbroker_peek(completions)) != NULL)
            return slot;
        if (gone)
            fail("the worker died before it answered");
        if (clock_ns() > until)
            fail("the worker did not answer within %d s", SECONDS);
    }
}

int main(int count, char **arguments)
{
    const char *instance = getenv("SHMBROKER_INSTANCE") != NULL ? getenv("SHMBROKER_INSTANCE") : "default", *wrong;
    char folder[TEXT], path[2 * TEXT], id[17], segment_name[TEXT], bell_name[TEXT], service[TEXT], worker_bell_name[TEXT];
    uint64_t number;
    uint32_t numbers = (uint32_t)(count - 3);
    if (count < 4 || numbers * 2 * sizeof(float) > ARENA_BYTES - SHMBROKER_ALIGNMENT)
        fail("usage: client SERVICE OP NUMBER...");
    if (getrandom(&number, sizeof number, 0) != sizeof number)
        fail("no random number for an id");
    snprintf(id, sizeof id, "%016" PRIx64, number);

    /* Join: a segment and a doorbell, made by the broker, held here. */
    find_folder(folder);
    snprintf(path, sizeof path, "%s/%s.sock", folder, instance);
    int broker = connected(path);
    text_of(ask(broker, "Made", "MakeSegment", "speer", id, "pprocess", 0, "narena_bytes", (uint64_t)ARENA_BYTES, "nchannel_count", (uint64_t)1,
                "ndepth", (uint64_t)DEPTH, NULL),
            "name", segment_name);
    int segment_hold = held("", segment_name);
    text_of(ask(broker, "Made", "MakeBell", "speer", id, "pprocess", 0, NULL), "name", bell_name);
    int bell_hold = held("sem.", bell_name);
    struct shmbroker_segment segment;
    struct shmbroker_bell bell, worker_bell;
    if ((wrong = shmbroker_segment_map(&segment, segment_hold)) != NULL)
        fail("%s: %s", segment_name, wrong);
    if (!shmbroker_bell_open(&bell, bell_name))
        fail("%s cannot be opened: %s", bell_name, strerror(errno));
    ask(broker, "Welcome", "Hello", "srole", "client", "speer", id, "pprocess", 0, "sname", "c_client", "sversion", "C", "ssegment", segment_name,
        NULL);

    /* Find a worker of the service, open a channel to it, and bind the op. */
    const uint8_t *at = find(ask(broker, "Found", "FindService", "sservice", arguments[1], NULL), "workers", 'a', &number);
    if (number == 0)
        fail("no worker offers service %s on instance %s", arguments[1], instance);
    text_of(at, "endpoint", service); /* of the first one, which was there before the others */
    if (strncmp(service, "ipc://", 6) != 0)
        fail("the worker takes control requests at %s, which is no unix socket", service);
    int worker = connected(service + 6);
    shmbroker_clear_channel(&segment, AREA);
    at = ask(worker, "ChannelOpened", "OpenChannel", "sclient", id, "sclient_name", "c_client", "pprocess", 0, "ssegment", segment_name, "nindex",
             (uint64_t)AREA, "sservice", arguments[1], "slane", "shm", "sdoorbell", "sem", "sbell", bell_name, NULL);
    uint64_t channel = number_of(at, "channel");
    text_of(at, "bell", worker_bell_name);
    if (!shmbroker_bell_open(&worker_bell, worker_bell_name))
        fail("%s cannot be opened: %s", worker_bell_name, strerror(errno));
    at = ask(worker, "Bound", "Bind", "nchannel", channel, "sop", arguments[2], "estatic", 0, NULL);

    /* Place the input and room for the output; this client's books are that it has one of each. */
    struct shmbroker_submission_frame frame = {.op_id = (uint32_t)number_of(at, "op_id"), .input_count = 1, .output_count = 1};
    uint64_t input = segment.arena_offset, output = input + (numbers * sizeof(float) + SHMBROKER_ALIGNMENT) / SHMBROKER_ALIGNMENT * SHMBROKER_ALIGNMENT;
    float *values = (float *)(segment.map + input), *results = (float *)(segment.map + output);
    for (uint32_t i = 0; i < numbers; i++)
        values[i] = strtof(arguments[3 + i], NULL);
    shmbroker_describe(&frame.tensors[0], SHMBROKER_DTYPE_FLOAT32, sizeof(float), input, 1, &(int64_t){numbers});
    shmbroker_describe(&frame.tensors[1], SHMBROKER_DTYPE_FLOAT32, sizeof(float), output, 1, &(int64_t){numbers});
    frame.generations[0] = frame.generations[1] = 1;

    /* Call: fill a slot, publish it, ring if the worker sleeps, wait. */
    struct shmbroker_queue submissions, completions;
    struct shmbroker_completion_frame completion;
    uint8_t *slot = NULL;
    if (shmbroker_open_submissions(&submissions, &segment, AREA) && shmbroker_open_completions(&completions, &segment, AREA))
        slot = shmbroker_claim(&submissions);
    if (slot == NULL) /* which cannot be: the segment was checked, and this is its first call */
        fail("%s has no room for a call", segment_name);
    uint64_t now = clock_ns();
    shmbroker_fill_submission(slot, (uint8_t *)&frame + SHMBROKER_SEQUENCE_BYTES, shmbroker_packed_bytes(&frame), CALL_ID,
                              now + SECONDS * 1000000000ull, now);
    shmbroker_commit(&submissions, slot);
    if (shmbroker_must_ring(shmbroker_worker_sleeping(&segment, AREA)))
        shmbroker_ring(&worker_bell);
    bool whole = shmbroker_copy_completion(completed(&completions, shmbroker_client_sleeping(&segment), &bell, worker), &completion);
    shmbroker_advance(&completions);
    if (!whole || completion.call_id != CALL_ID)
        fail("the worker completed what was not called");
    if (completion.status != SHMBROKER_STATUS_OK) /* of an op's error: its type, a line end, its text, and behind a 0 byte its traceback */
        fail("op %s failed (status %u): %.*s", arguments[2], completion.status, (int)completion.text_bytes, (const char *)completion.body);
    for (uint32_t i = 0; i < numbers; i++)
        printf("%g%c", (double)results[i], i + 1 < numbers ? ' ' : '\n');

    /* Leave in good order: nobody writes here any more, then the names go, then the broker is told. */
    ask(worker, "ChannelClosed", "CloseChannel", "nchannel", channel, NULL);
    shmbroker_segment_unmap(&segment);
    shmbroker_bell_close(&worker_bell);
    shmbroker_bell_close(&bell);
    close(segment_hold);
    close(bell_hold);
    shm_unlink(segment_name);
    sem_unlink(bell_name);
    ask(broker, NULL, "Goodbye", "speer", id, NULL);
    return 0;
}
