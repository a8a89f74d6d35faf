/* One end of a queue of the core after the other, in private memory: what it gives, refuses and clamps. Ends with 0, or names the line that failed. */
#include <shmbroker.h>

#include <stdio.h>
#include <stdlib.h>

#define CHECK(what)                                                                                                                        \
    do {                                                                                                                                   \
        if (!(what)) {                                                                                                                     \
            fprintf(stderr, "line %d: %s\n", __LINE__, #what);                                                                             \
            exit(1);                                                                                                                       \
        }                                                                                                                                  \
    } while (0)

enum { DEPTH = 4, SLOT_BYTES = sizeof(struct shmbroker_completion_frame), SLOTS = 64, TAKEN = 8, SLEEPING = 16 };

static uint64_t memory[(SLOTS + DEPTH * SLOT_BYTES) / 8];

static struct shmbroker_queue opened(void)
{
    struct shmbroker_queue queue;
    CHECK(shmbroker_queue_open(&queue, memory, sizeof memory, SLOTS, SLOT_BYTES, DEPTH, TAKEN));
    return queue;
}

static void what_does_not_lie_in_the_memory_is_refused(void)
{
    struct shmbroker_queue queue;
    CHECK(!shmbroker_queue_open(&queue, memory, sizeof memory - 1, SLOTS, SLOT_BYTES, DEPTH, TAKEN));
    CHECK(!shmbroker_queue_open(&queue, memory, sizeof memory, SLOTS + 8, SLOT_BYTES, DEPTH, TAKEN));
    CHECK(!shmbroker_queue_open(&queue, memory, sizeof memory, UINT64_MAX - 7, SLOT_BYTES, DEPTH, TAKEN));
    CHECK(!shmbroker_queue_open(&queue, memory, sizeof memory, SLOTS, SLOT_BYTES, UINT64_MAX / 2 + 1, TAKEN));
    CHECK(!shmbroker_queue_open(&queue, memory, sizeof memory, SLOTS, SLOT_BYTES, 3, TAKEN));
    CHECK(!shmbroker_queue_open(&queue, memory, sizeof memory, SLOTS, SLOT_BYTES, 0, TAKEN));
    CHECK(!shmbroker_queue_open(&queue, memory, sizeof memory, SLOTS, SLOT_BYTES, DEPTH, TAKEN + 1));
    CHECK(!shmbroker_queue_open(&queue, memory, sizeof memory, SLOTS, SLOT_BYTES, DEPTH, sizeof memory));
    CHECK(!shmbroker_queue_open(&queue, memory, sizeof memory, SLOTS, SLOT_BYTES, DEPTH, UINT64_MAX - 7));
    CHECK(!shmbroker_queue_open(&queue, memory, sizeof memory, SLOTS, 4, DEPTH, TAKEN));
}

static void frames_come_in_order_and_no_more_than_there_is_room_for(void)
{
    struct shmbroker_queue sender = opened(), receiver = opened();
    struct shmbroker_completion_frame copy;
    uint64_t sent = 0, taken = 0;
    CHECK(shmbroker_peek(&receiver) == NULL);
    for (int round = 0; round < 10; round++) {
        uint8_t *slot;
        while ((slot = shmbroker_claim(&sender)) != NULL) {
            CHECK(shmbroker_claim(&sender) == slot); /* not committed: the same again */
            CHECK(sent - taken < DEPTH);
            shmbroker_fill_completion(slot, sent, SHMBROKER_STATUS_OK, 0, 0, "text", (uint32_t)(sent % 5));
            shmbroker_commit(&sender, slot);
            sent++;
        }
        CHECK(sent - taken == DEPTH);
        for (int i = 0; i < 1 + round % DEPTH; i++) {
            const uint8_t *there = shmbroker_peek(&receiver);
            CHECK(there != NULL && shmbroker_peek(&receiver) == there);
            CHECK(shmbroker_copy_completion(there, &copy));
            CHECK(copy.call_id == taken && copy.text_bytes == taken % 5 && memcmp(copy.body, "text", copy.text_bytes) == 0);
            shmbroker_advance(&receiver);
            taken++;
        }
    }
    CHECK(memory[TAKEN / 8] == taken);
}

static void a_receiver_that_writes_nonsense_loses_its_own_frames_alone(void)
{
    struct shmbroker_queue sender = opened();
    uint8_t *slot;
    memory[TAKEN / 8] = UINT64_MAX; /* more than was ever sent: as if all of it had been taken, and no more */
    for (int i = 0; i < 3 * DEPTH; i++) {
        slot = shmbroker_claim(&sender);
        CHECK(slot == (uint8_t *)memory + SLOTS + i % DEPTH * SLOT_BYTES);
        shmbroker_commit(&sender, slot);
        CHECK(sender.known_taken <= sender.position);
    }
    memory[TAKEN / 8] = 0; /* it has taken nothing after all: full, for ever */
    while ((slot = shmbroker_claim(&sender)) != NULL)
        shmbroker_commit(&sender, slot);
    CHECK(sender.position <= 4 * DEPTH && shmbroker_claim(&sender) == NULL);
}

static void who_sleeps_is_rung_for_once(void)
{
    shmbroker_word *word = shmbroker_word_at(memory + SLEEPING / 8);
    CHECK(!shmbroker_must_ring(word) && !shmbroker_nudge(word));
    shmbroker_before_sleep(word);
    CHECK(shmbroker_must_ring(word) && !shmbroker_must_ring(word));
    shmbroker_before_sleep(word);
    CHECK(shmbroker_nudge(word) && !shmbroker_must_ring(word));
    shmbroker_before_sleep(word);
    shmbroker_after_sleep(word);
    CHECK(!shmbroker_must_ring(word));
}

static void counts_of_a_frame_are_clamped(void)
{
    static struct shmbroker_submission_frame frame;
    static struct shmbroker_completion_frame completion, copy;
    uint8_t *packed = (uint8_t *)&frame + SHMBROKER_SEQUENCE_BYTES;
    size_t whole = sizeof frame - SHMBROKER_SEQUENCE_BYTES, head = offsetof(struct shmbroker_submission_frame, tensors);
    frame.input_count = 0xffff;
    frame.output_count = 0xffff;
    CHECK(SHMBROKER_CONSTANT_START + shmbroker_constant_bytes(&frame) == offsetof(struct shmbroker_submission_frame, metadata));
    CHECK(shmbroker_packed_tensors(packed, whole) == -1 && shmbroker_packed_bytes(&frame) == whole);
    frame.input_count = 2;
    frame.output_count = 1;
    CHECK(shmbroker_packed_bytes(&frame) == head - SHMBROKER_SEQUENCE_BYTES + 3 * sizeof *frame.tensors);
    CHECK(shmbroker_packed_tensors(packed, shmbroker_packed_bytes(&frame)) == 3);
    CHECK(shmbroker_packed_tensors(packed, shmbroker_packed_bytes(&frame) - 1) == -1);
    CHECK(shmbroker_packed_tensors(packed, head - SHMBROKER_SEQUENCE_BYTES - 1) == -1 && shmbroker_packed_tensors(packed, whole + 1) == -1);
    completion.text_bytes = SHMBROKER_TEXT_BYTES + 1;
    CHECK(!shmbroker_copy_completion((const uint8_t *)&completion, &copy));
    completion.text_bytes = SHMBROKER_TEXT_BYTES;
    CHECK(shmbroker_copy_completion((const uint8_t *)&completion, &copy));
}

static void a_tensor_is_described_as_python_describes_it(void)
{
    struct shmbroker_tensor_descriptor tensor;
    int64_t shape[9] = {2, 3, 1, 5}, none[2] = {3, 0}, negative[1] = {-1};
    CHECK(shmbroker_describe(&tensor, SHMBROKER_DTYPE_FLOAT32, 4, 4096, 4, shape));
    CHECK(tensor.nbytes == 120 && tensor.ndim == 4 && tensor.offset == 4096 && tensor.dtype == 1);
    CHECK(tensor.strides[0] == 15 && tensor.strides[1] == 5 && tensor.strides[2] == 5 && tensor.strides[3] == 1 && tensor.strides[4] == 0);
    CHECK(shmbroker_describe(&tensor, SHMBROKER_DTYPE_FLOAT32, 4, 0, 0, NULL) && tensor.nbytes == 4);
    CHECK(shmbroker_describe(&tensor, SHMBROKER_DTYPE_FLOAT32, 4, 0, 2, none) && tensor.nbytes == 0);
    CHECK(!shmbroker_describe(&tensor, SHMBROKER_DTYPE_FLOAT32, 4, 0, 1, negative));
    CHECK(!shmbroker_describe(&tensor, SHMBROKER_DTYPE_FLOAT32, 4, 0, 9, shape));
}

static void a_bell_has_a_name_of_ours(void)
{
    struct shmbroker_bell bell;
    CHECK(!shmbroker_bell_open(&bell, "/another") && errno == EINVAL);
    CHECK(!shmbroker_bell_open(&bell, "/shmbroker./../x") && errno == EINVAL);
    CHECK(!shmbroker_bell_open(&bell, "") && errno == EINVAL);
    CHECK(!shmbroker_bell_open(&bell, "/shmbroker.nobody.bell.0123456789abcdef") && errno == ENOENT);
}

int main(void)
{
    what_does_not_lie_in_the_memory_is_refused();
    frames_come_in_order_and_no_more_than_there_is_room_for();
    memset(memory, 0, sizeof memory);
    a_receiver_that_writes_nonsense_loses_its_own_frames_alone();
    who_sleeps_is_rung_for_once();
    counts_of_a_frame_are_clamped();
    a_tensor_is_described_as_python_describes_it();
    a_bell_has_a_name_of_ours();
    puts("all well");
    return 0;
}
