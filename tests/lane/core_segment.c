/* What the core finds in a segment: core_segment FILE INDEX. Prints where the parts of channel area INDEX lie; or what is wrong, and ends with 1. */
#include <shmbroker.h>

#include <stdio.h>
#include <stdlib.h>

int main(int count, char **arguments)
{
    struct shmbroker_segment segment;
    struct shmbroker_queue submissions, completions;
    uint32_t index = count == 3 ? (uint32_t)strtoul(arguments[2], NULL, 10) : 0;
    int fd = count == 3 ? open(arguments[1], O_RDWR) : -1;
    const char *wrong = fd < 0 ? "no such file" : shmbroker_segment_map(&segment, fd);
    if (wrong == NULL && !(shmbroker_open_submissions(&submissions, &segment, index) && shmbroker_open_completions(&completions, &segment, index)))
        wrong = "no such channel area";
    if (wrong != NULL) {
        puts(wrong);
        return 1;
    }
    const uint8_t *places[] = {submissions.slots,
                               completions.slots,
                               (const uint8_t *)submissions.taken,
                               (const uint8_t *)completions.taken,
                               (const uint8_t *)shmbroker_worker_sleeping(&segment, index),
                               (const uint8_t *)shmbroker_client_sleeping(&segment),
                               segment.map + segment.arena_offset,
                               segment.map + segment.total_bytes};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++)
        printf("%llu ", (unsigned long long)(places[i] - segment.map));
    memset(segment.map + shmbroker_channel_offset(&segment, index), 1, segment.channel_bytes);
    shmbroker_clear_channel(&segment, index);
    uint64_t left = 0;
    for (uint64_t i = 0; i < segment.channel_bytes; i++)
        left += segment.map[shmbroker_channel_offset(&segment, index) + i];
    printf("%llu\n", (unsigned long long)left);
    shmbroker_segment_unmap(&segment);
    return 0;
}
