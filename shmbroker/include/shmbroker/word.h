/* The steps on words that two processes share: each with its memory order, and the rule that it serves.
 *
 * Nothing else in the core touches such a word, so this table is the whole of what has to be true on a processor that reorders. A test reads it, and
 * the functions that use it, and compares both with the model that is checked exhaustively (docs/protocol/weak_memory.py).
 *
 * The rules in a sentence each; queue.py and doorbell.py tell them in full:
 *   Q1  a slot is filled only after the consumer has taken what was in it before
 *   Q2  the sequence number is stored last
 *   Q3  the frame is copied before the consumer says so
 *   D1  between its word and its look (or its frame and its look at the word) each side has a full fence
 *   D4  who rings takes the word down first
 */
#ifndef SHMBROKER_WORD_H
#define SHMBROKER_WORD_H

#include <assert.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a segment is little-endian: docs/memory-layout.md"
#endif

/* As it lies in the segment: 8 bytes at a multiple of 8, and no lock beside it, which another process would not see. */
typedef _Atomic(uint64_t) shmbroker_word;
static_assert(sizeof(shmbroker_word) == 8, "a shared word is as large as the layout says");
static_assert(sizeof(long) == 8 ? ATOMIC_LONG_LOCK_FREE == 2 : ATOMIC_LLONG_LOCK_FREE == 2, "a shared word needs no lock");

/* clang-format off */
/*      the step                              what it is to the processor                                           rule, and what it pairs with */
#define SHMBROKER_PUBLISH(word, value)        atomic_store_explicit((word), (value), memory_order_release)       /* Q2: LOOK sees the frame whole */
#define SHMBROKER_LOOK(word)                  atomic_load_explicit((word), memory_order_acquire)                 /* Q2: PUBLISH */
#define SHMBROKER_SAY_TAKEN(word, value)      atomic_store_explicit((word), (value), memory_order_release)       /* Q3: the copy comes before it */
#define SHMBROKER_ASK_TAKEN(word)             atomic_load_explicit((word), memory_order_acquire)                 /* Q1: SAY_TAKEN */
#define SHMBROKER_FENCE()                     atomic_thread_fence(memory_order_seq_cst)                          /* D1: the FENCE of the other side */
#define SHMBROKER_ASK_SLEEPING(word)          atomic_load_explicit((word), memory_order_relaxed)                 /* D1: behind the FENCE */
#define SHMBROKER_TAKE_DOWN(word)             atomic_store_explicit((word), 0, memory_order_relaxed)             /* D4: before the ring, which releases */
#define SHMBROKER_PUT_UP(word)                atomic_store_explicit((word), 1, memory_order_relaxed)             /* D1: before the FENCE */
#define SHMBROKER_PUT_AWAY(word)              atomic_store_explicit((word), 0, memory_order_relaxed)             /* D2: a late one costs a ring */
#define SHMBROKER_COPIED()                    atomic_signal_fence(memory_order_seq_cst)                          /* F1: the compiler reads the copy */
/* clang-format on */

/* The word at `address`, which lies in shared memory at a multiple of 8. */
static inline shmbroker_word *shmbroker_word_at(void *address)
{
    return (shmbroker_word *)address;
}

#endif
