/* Doorbells: who is rung for, and how nobody sleeps while there is a frame (D1 to D4). How a ring sounds is in bell.h.
 *
 *     sleeper   before_sleep; look again; block unless there is something; after_sleep; look again
 *     sender    commit; must_ring, and ring where it says so
 *
 * Contract of all functions here
 *   Before   `sleeping` is the sleeper's word in a segment: client_sleeping of the segment's header, or worker_sleeping of the channel's.
 *   Who      A word goes up by its one sleeper alone; any number of senders may take it down.
 *   After    What must_ring or nudge said true of is rung for, at once: nobody else will.
 *   Failure  None. A peer that puts up nonsense is rung for, or not: no wait lasts longer than 100 ms (D3).
 */
#ifndef SHMBROKER_DOORBELL_H
#define SHMBROKER_DOORBELL_H

#include "word.h"

#define SHMBROKER_RECHECK_NS 100000000 /* D3: after so long everything is looked at again, whoever was rung for or has died */

/* Whether the peer sleeps; if so its word is down now, and has to be rung for (D4). Before a frame that follows in a moment: waking takes longer. */
static inline bool shmbroker_nudge(shmbroker_word *sleeping)
{
    if (!SHMBROKER_ASK_SLEEPING(sleeping))
        return false;
    SHMBROKER_TAKE_DOWN(sleeping);
    return true;
}

/* The same after a frame was published: of the two, this look and the sleeper's last one, one at least sees what the other has done (D1). */
static inline bool shmbroker_must_ring(shmbroker_word *sleeping)
{
    SHMBROKER_FENCE();
    return shmbroker_nudge(sleeping);
}

/* About to sleep: all queues are looked at once more after this, and only then may the sleeper block (D1). */
static inline void shmbroker_before_sleep(shmbroker_word *sleeping)
{
    SHMBROKER_PUT_UP(sleeping);
    SHMBROKER_FENCE();
}

/* Awake, or never asleep: all queues are looked at after this (D2). */
static inline void shmbroker_after_sleep(shmbroker_word *sleeping)
{
    SHMBROKER_PUT_AWAY(sleeping);
}

#endif
