/* Layout of a shmbroker segment, version 4. Generated; see docs/memory-layout.md. Little-endian. */
#ifndef SHMBROKER_LAYOUT_H
#define SHMBROKER_LAYOUT_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#define SHMBROKER_MAGIC "SHMBROKR"
#define SHMBROKER_LAYOUT_VERSION 4
#define SHMBROKER_BYTE_ORDER_MARK 16909060
#define SHMBROKER_ALIGNMENT 256
#define SHMBROKER_MAX_DIMS 8
#define SHMBROKER_MAX_TENSORS 12
#define SHMBROKER_METADATA_BYTES 128
#define SHMBROKER_TEXT_BYTES 960
#define SHMBROKER_BUCKETS 64
#define SHMBROKER_FIRST_BUCKET 19
#define SHMBROKER_PICTURED_BLOCKS 64

enum shmbroker_dtype {
    SHMBROKER_DTYPE_FLOAT32 = 1,
    SHMBROKER_DTYPE_FLOAT64 = 2,
    SHMBROKER_DTYPE_FLOAT16 = 3,
    SHMBROKER_DTYPE_BFLOAT16 = 4,
    SHMBROKER_DTYPE_INT8 = 5,
    SHMBROKER_DTYPE_INT16 = 6,
    SHMBROKER_DTYPE_INT32 = 7,
    SHMBROKER_DTYPE_INT64 = 8,
    SHMBROKER_DTYPE_UINT8 = 9,
    SHMBROKER_DTYPE_BOOL = 10,
    SHMBROKER_DTYPE_FLOAT8_E4M3FN = 11,
    SHMBROKER_DTYPE_FLOAT8_E5M2 = 12,
    SHMBROKER_DTYPE_UINT16 = 13,
    SHMBROKER_DTYPE_UINT32 = 14,
    SHMBROKER_DTYPE_UINT64 = 15,
    SHMBROKER_DTYPE_COMPLEX64 = 16,
    SHMBROKER_DTYPE_COMPLEX128 = 17,
};

enum shmbroker_space {
    SHMBROKER_SPACE_SEGMENT = 0,
    SHMBROKER_SPACE_DEVICE = 1,
    SHMBROKER_SPACE_KEPT = 2,
};

enum shmbroker_status {
    SHMBROKER_STATUS_OK = 0,
    SHMBROKER_STATUS_OP_ERROR = 1,
    SHMBROKER_STATUS_BAD_FRAME = 2,
    SHMBROKER_STATUS_EXPIRED = 3,
    SHMBROKER_STATUS_DRAINING = 4,
    SHMBROKER_STATUS_BUSY = 5,
};

struct shmbroker_pictured_block {
    uint64_t offset;                                        /* 0 */
    uint64_t nbytes;                                        /* 8 */
    uint64_t placed_ns;                                     /* 16 */
};
static_assert(sizeof(struct shmbroker_pictured_block) == 24, "size of PicturedBlock");

struct shmbroker_arena_statistics {
    uint64_t revision;                                      /* 0 */
    uint64_t published_ns;                                  /* 8 */
    uint64_t held_bytes;                                    /* 16 */
    uint64_t held_blocks;                                   /* 24 */
    uint64_t high_water_bytes;                              /* 32 */
    uint64_t largest_free_bytes;                            /* 40 */
    uint64_t placed_blocks;                                 /* 48 */
    uint64_t waits;                                         /* 56 */
    uint64_t full;                                          /* 64 */
    uint64_t copied_bytes;                                  /* 72 */
    uint64_t cursor;                                        /* 80 */
    uint64_t block_count;                                   /* 88 */
    struct shmbroker_pictured_block blocks[64];             /* 96 */
};
static_assert(sizeof(struct shmbroker_arena_statistics) == 1632, "size of ArenaStatistics");

struct shmbroker_segment_header {
    char magic[8];                                          /* 0 */
    uint32_t version;                                       /* 8 */
    uint32_t byte_order;                                    /* 12 */
    uint64_t total_bytes;                                   /* 16 */
    uint64_t arena_offset;                                  /* 24 */
    uint64_t arena_bytes;                                   /* 32 */
    uint64_t channels_offset;                               /* 40 */
    uint64_t channel_bytes;                                 /* 48 */
    uint32_t channel_count;                                 /* 56 */
    uint32_t alignment;                                     /* 60 */
    uint32_t submission_depth;                              /* 64 */
    uint32_t submission_slot_bytes;                         /* 68 */
    uint32_t completion_depth;                              /* 72 */
    uint32_t completion_slot_bytes;                         /* 76 */
    char instance[32];                                      /* 80 */
    char owner[32];                                         /* 112 */
    uint32_t maker_pid;                                     /* 144 */
    uint32_t owner_pid;                                     /* 148 */
    uint64_t made_at_ns;                                    /* 152 */
    uint64_t statistics_offset;                             /* 160 */
    uint64_t statistics_bytes;                              /* 168 */
    uint8_t reserved0[80];                                  /* 176 */
    uint64_t client_sleeping;                               /* 256 */
    uint8_t reserved1[248];                                 /* 264 */
    struct shmbroker_arena_statistics arena;                /* 512 */
    uint8_t reserved2[1952];                                /* 2144 */
};
static_assert(sizeof(struct shmbroker_segment_header) == 4096, "size of SegmentHeader");

struct shmbroker_channel_statistics {
    uint64_t revision;                                      /* 0 */
    uint64_t published_ns;                                  /* 8 */
    uint64_t opened_ns;                                     /* 16 */
    uint64_t calls;                                         /* 24 */
    uint64_t errors;                                        /* 32 */
    uint64_t sent_bytes;                                    /* 40 */
    uint64_t received_bytes;                                /* 48 */
    uint64_t call_ns;                                       /* 56 */
    uint64_t copied_bytes;                                  /* 64 */
    uint64_t outstanding;                                   /* 72 */
    char lane[8];                                           /* 80 */
    char doorbell[8];                                       /* 88 */
    char worker[32];                                        /* 96 */
    char service[64];                                       /* 128 */
    uint64_t buckets[64];                                   /* 192 */
    char trust[16];                                         /* 704 */
    uint64_t checked;                                       /* 720 */
    uint64_t rejected;                                      /* 728 */
    uint64_t pads_taken;                                    /* 736 */
    uint64_t pads_waited;                                   /* 744 */
    uint8_t reserved0[16];                                  /* 752 */
    uint64_t worker_revision;                               /* 768 */
    uint64_t worker_published_ns;                           /* 776 */
    uint64_t run_calls;                                     /* 784 */
    uint64_t failed_calls;                                  /* 792 */
    uint64_t compute_ns;                                    /* 800 */
    uint64_t queued_ns;                                     /* 808 */
    uint64_t waiting_calls;                                 /* 816 */
    uint64_t share_ppm;                                     /* 824 */
    uint64_t batched_calls;                                 /* 832 */
    uint64_t batched_with;                                  /* 840 */
    uint8_t reserved1[176];                                 /* 848 */
};
static_assert(sizeof(struct shmbroker_channel_statistics) == 1024, "size of ChannelStatistics");

struct shmbroker_channel_header {
    uint8_t reserved0[128];                                 /* 0 */
    uint64_t completions_taken;                             /* 128 */
    uint8_t reserved1[120];                                 /* 136 */
    uint64_t submissions_taken;                             /* 256 */
    uint8_t reserved2[120];                                 /* 264 */
    uint64_t worker_sleeping;                               /* 384 */
    uint8_t reserved3[120];                                 /* 392 */
};
static_assert(sizeof(struct shmbroker_channel_header) == 512, "size of ChannelHeader");

struct shmbroker_tensor_descriptor {
    uint64_t offset;                                        /* 0 */
    uint64_t nbytes;                                        /* 8 */
    uint8_t dtype;                                          /* 16 */
    uint8_t ndim;                                           /* 17 */
    uint8_t space;                                          /* 18 */
    uint8_t flags;                                          /* 19 */
    uint32_t reserved;                                      /* 20 */
    int64_t shape[8];                                       /* 24 */
    int64_t strides[8];                                     /* 88 */
};
static_assert(sizeof(struct shmbroker_tensor_descriptor) == 152, "size of TensorDescriptor");

struct shmbroker_submission_frame {
    uint64_t sequence;                                      /* 0 */
    uint64_t call_id;                                       /* 8 */
    uint64_t deadline_ns;                                   /* 16 */
    uint64_t submitted_ns;                                  /* 24 */
    uint32_t generations[12];                               /* 32 */
    uint32_t op_id;                                         /* 80 */
    uint16_t input_count;                                   /* 84 */
    uint16_t output_count;                                  /* 86 */
    uint32_t flags;                                         /* 88 */
    uint32_t metadata_bytes;                                /* 92 */
    struct shmbroker_tensor_descriptor tensors[12];         /* 96 */
    uint8_t metadata[128];                                  /* 1920 */
};
static_assert(sizeof(struct shmbroker_submission_frame) == 2048, "size of SubmissionFrame");

struct shmbroker_completion_frame {
    uint64_t sequence;                                      /* 0 */
    uint64_t call_id;                                       /* 8 */
    uint32_t status;                                        /* 16 */
    uint32_t reserved0;                                     /* 20 */
    uint32_t text_bytes;                                    /* 24 */
    uint32_t reserved1;                                     /* 28 */
    uint64_t queued_ns;                                     /* 32 */
    uint64_t compute_ns;                                    /* 40 */
    uint8_t reserved2[16];                                  /* 48 */
    uint8_t body[960];                                      /* 64 */
};
static_assert(sizeof(struct shmbroker_completion_frame) == 1024, "size of CompletionFrame");

#endif
