/* Frames between two threads, or two processes over a mapped file: core_stress threads|processes calls|stream DEPTH COUNT
 *
 * calls: each is answered, and no more than DEPTH are on their way. stream: frames go one way and nobody counts, so Q1 and Q3 alone protect a slot.
 * Both sides sleep and ring as a client and a worker do, but no wait is cut short by the recheck of D3: one that lasts is a lost wake-up. Each frame is
 * told by its number alone, so that one that comes torn, twice, late or not at all is seen. Ends with 0 and a line, or with 1 and what was wrong.
 */
#define _POSIX_C_SOURCE 200809L

#include <shmbroker.h>

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>

typedef struct shmbroker_submission_frame Submission;
typedef struct shmbroker_completion_frame Completion;

enum { MOST_DEPTH = 64, TENSORS = 5, TEXT = 200, MOST_LOOKS = 200 };
#define FOREVER_NS 120000000000u /* many times what a wait can take here */

/* What both sides map; words that one side writes lie in cache lines of their own, as in a segment. */
struct shared {
    _Alignas(128) uint64_t submissions_taken;
    _Alignas(128) uint64_t completions_taken;
    _Alignas(128) uint64_t client_sleeping;
    _Alignas(128) uint64_t worker_sleeping;
    _Alignas(128) sem_t client_bell;
    _Alignas(128) sem_t worker_bell;
    _Alignas(128) Submission submissions[MOST_DEPTH];
    _Alignas(128) Completion completions[MOST_DEPTH];
};

/* One side. */
struct side {
    struct shared *shared;
    struct shmbroker_queue sends, takes;
    shmbroker_word *own_sleeping, *peer_sleeping;
    struct shmbroker_bell own_bell, peer_bell;
    uint64_t calls, random;
    bool stream;
};

static pid_t child; /* of the process that started one */

static _Noreturn void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    if (child > 0)
        kill(child, SIGKILL);
    _Exit(1);
}

static void open_queue(struct shmbroker_queue *queue, struct shared *shared, const void *slots, uint64_t slot_bytes, uint64_t depth,
                       const uint64_t *taken)
{
    uint64_t offset = (uint64_t)((const char *)slots - (const char *)shared), word = (uint64_t)((const char *)taken - (const char *)shared);
    if (!shmbroker_queue_open(queue, shared, sizeof *shared, offset, slot_bytes, depth, word))
        fail("no queue of %llu slots", (unsigned long long)depth);
}

static void open_side(struct side *side, struct shared *shared, bool client, bool stream, uint64_t depth, uint64_t calls)
{
    struct shmbroker_queue *submissions = client ? &side->sends : &side->takes, *completions = client ? &side->takes : &side->sends;
    open_queue(submissions, shared, shared->submissions, sizeof(Submission), depth, &shared->submissions_taken);
    open_queue(completions, shared, shared->completions, sizeof(Completion), depth, &shared->completions_taken);
    side->shared = shared;
    side->own_sleeping = shmbroker_word_at(client ? &shared->client_sleeping : &shared->worker_sleeping);
    side->peer_sleeping = shmbroker_word_at(client ? &shared->worker_sleeping : &shared->client_sleeping);
    side->own_bell.semaphore = client ? &shared->client_bell : &shared->worker_bell;
    side->peer_bell.semaphore = client ? &shared->worker_bell : &shared->client_bell;
    side->stream = stream;
    side->calls = calls;
    side->random = client ? 1 : 2;
}

/* What lies in byte `i` of frame `number`: a permutation of the two, so that no two frames look alike. */
static uint8_t told(uint64_t number, uint64_t i)
{
    return (uint8_t)((number * 0x9e3779b97f4a7c15u + i * 0xbf58476d1ce4e5b9u) >> 32);
}

static unsigned below(struct side *side, unsigned most)
{
    side->random = side->random * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(side->random >> 33) % most;
}

/* Wait for a frame as a process does: look for a while, word up, look again, block, word down. */
static const uint8_t *wait_for(struct side *side)
{
    for (;;) {
        const uint8_t *slot = NULL;
        for (unsigned looks = below(side, MOST_LOOKS); slot == NULL && looks-- > 0;)
            slot = shmbroker_peek(&side->takes);
        if (slot != NULL)
            return slot;
        shmbroker_before_sleep(side->own_sleeping);
        slot = shmbroker_peek(&side->takes);
        if (slot == NULL && !shmbroker_bell_wait(&side->own_bell, FOREVER_NS))
            fail("asleep for ever before frame %llu", (unsigned long long)side->takes.position);
        shmbroker_after_sleep(side->own_sleeping);
        if (slot != NULL)
            return slot;
    }
}

static void publish(struct side *side, uint8_t *slot)
{
    shmbroker_commit(&side->sends, slot);
    if (shmbroker_must_ring(side->peer_sleeping))
        shmbroker_ring(&side->peer_bell);
}

static void submit(struct side *side, uint8_t *slot, uint64_t number)
{
    static _Thread_local Submission packed;
    uint8_t *bytes = (uint8_t *)&packed;
    packed.op_id = (uint32_t)number;
    packed.input_count = (uint16_t)(1 + number % (TENSORS - 1));
    packed.output_count = 1;
    for (uint64_t i = offsetof(Submission, tensors); i < sizeof packed; i++)
        bytes[i] = told(number, i);
    shmbroker_fill_submission(slot, bytes + SHMBROKER_SEQUENCE_BYTES, shmbroker_packed_bytes(&packed), number, ~number, number * 3);
    for (int i = 0; i <= packed.input_count; i++)
        shmbroker_fill_tensor(slot, i, number + (uint64_t)i, (uint32_t)(number ^ (unsigned)i));
    publish(side, slot);
}

static void take_call(struct side *side, uint64_t number)
{
    static _Thread_local Submission copy;
    const uint8_t *bytes = (const uint8_t *)&copy;
    shmbroker_copy_submission(wait_for(side), &copy);
    shmbroker_advance(&side->takes);
    size_t constant = shmbroker_constant_bytes(&copy);
    int tensors = shmbroker_packed_tensors(bytes + SHMBROKER_SEQUENCE_BYTES, sizeof copy - SHMBROKER_SEQUENCE_BYTES);
    if (copy.call_id != number || copy.deadline_ns != ~number || copy.submitted_ns != number * 3 || copy.op_id != (uint32_t)number)
        fail("call %llu came where %llu was to", (unsigned long long)copy.call_id, (unsigned long long)number);
    if (tensors != (int)(2 + number % (TENSORS - 1)) || SHMBROKER_CONSTANT_START + constant != offsetof(Submission, tensors[tensors]))
        fail("call %llu has %d tensors", (unsigned long long)number, tensors);
    for (int i = 0; i < tensors; i++) {
        if (copy.tensors[i].offset != number + (uint64_t)i || copy.generations[i] != (uint32_t)(number ^ (unsigned)i))
            fail("tensor %d of call %llu is another's", i, (unsigned long long)number);
        for (uint64_t at = offsetof(Submission, tensors[i].nbytes); at < offsetof(Submission, tensors[i + 1]); at++)
            if (bytes[at] != told(number, at))
                fail("call %llu is torn at byte %llu", (unsigned long long)number, (unsigned long long)at);
    }
}

static void complete(struct side *side, uint64_t number)
{
    uint8_t text[TEXT], *slot = shmbroker_claim(&side->sends);
    uint32_t text_bytes = (uint32_t)(number % TEXT);
    if (slot == NULL) /* the client has at most so many calls on their way */
        fail("the completion queue is full at %llu", (unsigned long long)number);
    for (uint32_t i = 0; i < text_bytes; i++)
        text[i] = told(number, i);
    shmbroker_fill_completion(slot, number, (uint32_t)~number, number * 5, number * 7, text, text_bytes);
    publish(side, slot);
}

static void take_completion(struct side *side, uint64_t number)
{
    Completion copy;
    if (!shmbroker_copy_completion(wait_for(side), &copy))
        fail("completion %llu says that it has %u bytes of text", (unsigned long long)number, copy.text_bytes);
    shmbroker_advance(&side->takes);
    if (copy.call_id != number || copy.status != (uint32_t)~number || copy.queued_ns != number * 5 || copy.compute_ns != number * 7
        || copy.text_bytes != number % TEXT)
        fail("completion %llu came where %llu was to", (unsigned long long)copy.call_id, (unsigned long long)number);
    for (uint32_t i = 0; i < copy.text_bytes; i++)
        if (copy.body[i] != told(number, i))
            fail("completion %llu is torn at byte %u of its text", (unsigned long long)number, i);
}

static void *client(void *argument)
{
    struct side *side = argument;
    uint64_t sent = 0, answered = 0;
    uint8_t *slot;
    while (side->stream && sent < side->calls) {
        while ((slot = shmbroker_claim(&side->sends)) == NULL)
            sched_yield();
        submit(side, slot, sent++);
    }
    while (!side->stream && answered < side->calls) {
        unsigned burst = 1 + below(side, 8);
        for (; burst > 0 && sent < side->calls && sent - answered <= side->sends.mask; burst--) {
            if (below(side, 4) == 0 && shmbroker_nudge(side->peer_sleeping))
                shmbroker_ring(&side->peer_bell);
            slot = shmbroker_claim(&side->sends);
            if (slot == NULL)
                fail("the submission queue is full at %llu", (unsigned long long)sent);
            submit(side, slot, sent++);
        }
        do
            take_completion(side, answered++);
        while (answered < sent && (sent == side->calls || below(side, 2)));
    }
    return NULL;
}

static void *worker(void *argument)
{
    struct side *side = argument;
    for (uint64_t number = 0; number < side->calls; number++) {
        take_call(side, number);
        if (!side->stream)
            complete(side, number);
        if (below(side, 64) == 0)
            sched_yield();
    }
    return NULL;
}

static struct shared *mapped(int file)
{
    struct shared *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared == MAP_FAILED)
        fail("the file cannot be mapped: %s", strerror(errno));
    return shared;
}

int main(int count, char **arguments)
{
    if (count != 5)
        fail("core_stress threads|processes calls|stream DEPTH COUNT");
    bool threads = strcmp(arguments[1], "threads") == 0, stream = strcmp(arguments[2], "stream") == 0;
    uint64_t depth = strtoull(arguments[3], NULL, 10), calls = strtoull(arguments[4], NULL, 10);
    FILE *file = tmpfile();
    if (depth > MOST_DEPTH || file == NULL || ftruncate(fileno(file), (off_t)sizeof(struct shared)) < 0)
        fail("at most %d slots, and a file in the folder for such", MOST_DEPTH);
    struct shared *shared = mapped(fileno(file));
    if (sem_init(&shared->client_bell, 1, 0) < 0 || sem_init(&shared->worker_bell, 1, 0) < 0)
        fail("no semaphore: %s", strerror(errno));
    struct side sides[2];
    if (threads) {
        pthread_t other;
        open_side(&sides[0], shared, true, stream, depth, calls);
        open_side(&sides[1], shared, false, stream, depth, calls);
        if (pthread_create(&other, NULL, worker, &sides[1]) != 0)
            fail("no thread");
        client(&sides[0]);
        pthread_join(other, NULL);
    } else {
        child = fork();
        if (child == 0) {
            open_side(&sides[1], mapped(fileno(file)), false, stream, depth, calls);
            worker(&sides[1]);
            _Exit(0);
        }
        open_side(&sides[0], shared, true, stream, depth, calls);
        int status;
        if (child < 0)
            fail("no process: %s", strerror(errno));
        client(&sides[0]);
        if (waitpid(child, &status, 0) != child || status != 0)
            fail("the worker ended with %d", status);
    }
    printf("%llu frames\n", (unsigned long long)calls);
    return 0;
}
