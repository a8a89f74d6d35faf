/* The two queues of a channel, the doorbells and the adaptive sleep, for SPIN. README.md tells what is modelled and what is not.
 *
 * The code is in shmbroker/lane: queue.py (rules Q1..Q3), doorbell.py (D1..D4), ends.py, _ends.c and waiter.py; completions.py and channel.py
 * for what a client does when its peer dies.
 *
 * Configurations, by macros:
 *   DEPTH=n, CALLS=n   slots of each queue; calls that the client makes
 *   STREAM             no completions, and nobody counts what is outstanding: the client stops at a full queue only
 *   TIMEOUTS           a wait may end by itself, at any time (D3)
 *   DEATHS             one of the two may die, before any of its steps
 * Planted bugs have macros too; check.sh has the list, with what each must be found by.
 */

#ifndef DEPTH
#define DEPTH 2
#endif
#ifndef CALLS
#define CALLS 4
#endif
#ifndef STORES
#define STORES 6 /* entries of a store buffer; an assertion tells when more are needed, so no order of stores is left out */
#endif

#ifdef NO_FENCE
#define NO_FENCE_IN_WAIT
#define NO_FENCE_IN_PUBLISH
#endif
#if defined(NO_FENCE_IN_WAIT) || defined(NO_FENCE_IN_PUBLISH)
#define UNFENCED /* a buffer may be full: the processor waits */
#endif

#define CLIENT 0
#define WORKER 1
#define PEER(me) (1 - (me))

/* Shared words. Queue CLIENT holds submissions, queue WORKER completions: a queue is named after its producer. */
#define SEQUENCE 0
#define FIRST 1
#define SECOND 2
#define SLOT(queue, position, part) (3 * (DEPTH * (queue) + (position) % DEPTH) + (part))
#define TAKEN(queue) (6 * DEPTH + (queue))
#define SLEEPING(process) (6 * DEPTH + 2 + (process))
#define WORDS (6 * DEPTH + 4)

byte memory[WORDS];
chan stores[2] = [STORES] of { byte, byte }; /* word and value: what a processor has stored and the other does not see yet */
byte bell[2];                                /* counting semaphores, each named after who sleeps on it */
bool dead[2];
bool ended[2];

/* Counted privately in the code: global here, for LOST_WAKE_UP and the claim to see. */
byte written[2], taken[2]; /* by queue */
bool publishing[2];        /* from the first word of a frame until the ring, if any */
bool blocked[2];           /* on its bell */

#define PUBLISHED(queue) (memory[SLOT(queue, taken[queue], SEQUENCE)] == taken[queue] + 1)

/* The producer of `queue` is done, its frame is not taken, and nothing will wake the one to take it. */
#define LOST_WAKE_UP(queue) \
    (blocked[PEER(queue)] && bell[PEER(queue)] == 0 && !publishing[queue] && written[queue] > taken[queue])

/* --- x86-TSO: stores become visible in order and late, a locked instruction waits until all have ---------------------------------------- */

inline store(me, word, value) {
    atomic {
#ifndef UNFENCED
        assert(nfull(stores[me]));
#endif
        stores[me]!word, value
    }
}

proctype StoreBuffer(byte me) {
    byte word, value;
end:
    do
    :: d_step { stores[me]?word, value -> memory[word] = value; word = 0; value = 0 }
    od
}

inline fence(me) {
    empty(stores[me])
}

/* A word that this processor may have stored to itself is looked for in its buffer first. All such stores are of 0: whichever is met will do. */
inline load_sleeping(me) {
    d_step {
        if
        :: stores[me]??[eval(SLEEPING(PEER(me))), 0] -> seen = 0
        :: else -> seen = memory[SLEEPING(PEER(me))]
        fi
    }
}

/* --- doorbell ---------------------------------------------------------------------------------------------------------------------------- */

/* Posting a semaphore is a locked instruction: what was stored before is visible before the sleeper can wake. */
inline ring(me) {
#ifndef RING_UNORDERED
    d_step { empty(stores[me]) -> bell[PEER(me)]++ }
#else
    bell[PEER(me)]++
#endif
}

inline wake(me) {
    load_sleeping(me);
    if
    :: seen ->
        seen = 0;
#ifdef RING_FIRST
        ring(me);
        store(me, SLEEPING(PEER(me)), 0)
#else
        store(me, SLEEPING(PEER(me)), 0); /* D4: who rings takes the word down, before it rings */
        ring(me)
#endif
    :: else
    fi
}

/* Waiter.wait: looks, then blocks on the bell; `found` is what the last look saw. `over`: a wait may end without ring or time-out. */
inline wait(me, over) {
    found = PUBLISHED(PEER(me)); /* spinning: many such looks, of which the last one matters */
    if
    :: found
    :: else ->
        store(me, SLEEPING(me), 1);
#ifndef NO_FENCE_IN_WAIT
        fence(me); /* D1: between the word and the look */
#endif
#ifndef NO_RECHECK
        found = PUBLISHED(PEER(me));
#endif
        if
        :: found
        :: else ->
            d_step { blocked[me] = 1; assert(!LOST_WAKE_UP(PEER(me))) };
            if
            :: d_step { bell[me] > 0 -> bell[me]--; blocked[me] = 0 }
            :: d_step { over -> blocked[me] = 0 }
#ifdef TIMEOUTS
            :: blocked[me] = 0 /* D3: no wait lasts for ever */
#endif
            fi
        fi;
        store(me, SLEEPING(me), 0);
        found = PUBLISHED(PEER(me)) /* D2: a ring is a hint, the state is read again */
    fi
}

/* --- queues ------------------------------------------------------------------------------------------------------------------------------ */

/* Q1: whether the slot's last frame is known to be taken. */
inline claim(me) {
    free = written[me] - known_taken < DEPTH;
    if
    :: free
    :: else ->
        d_step { known_taken = memory[TAKEN(me)]; free = written[me] - known_taken < DEPTH }
    fi
#ifdef NO_CLAIM
    ; free = true
#endif
}

/* The frame of position p is p + 1, twice: a frame that is lost, doubled, out of order or half written cannot be taken for another. */
inline publish(me) {
    publishing[me] = 1;
#ifdef SEQUENCE_FIRST
    store(me, SLOT(me, written[me], SEQUENCE), written[me] + 1);
#endif
    store(me, SLOT(me, written[me], FIRST), written[me] + 1);
    store(me, SLOT(me, written[me], SECOND), written[me] + 1);
#ifndef SEQUENCE_FIRST
    store(me, SLOT(me, written[me], SEQUENCE), written[me] + 1); /* Q2: the sequence number is stored last */
#endif
    written[me]++;
#ifndef NO_FENCE_IN_PUBLISH
    fence(me); /* D1: between the frame and the look at the peer's word */
#endif
    wake(me);
    d_step { publishing[me] = 0; assert(!LOST_WAKE_UP(me)) }
}

inline take(me) {
#ifdef TAKEN_FIRST
    store(me, TAKEN(PEER(me)), taken[PEER(me)] + 1);
#endif
    first = memory[SLOT(PEER(me), taken[PEER(me)], FIRST)];
    second = memory[SLOT(PEER(me), taken[PEER(me)], SECOND)];
#ifndef TAKEN_FIRST
    store(me, TAKEN(PEER(me)), taken[PEER(me)] + 1); /* Q3: copied before it is said to be taken */
#endif
    d_step {
        taken[PEER(me)]++;
        assert(first == taken[PEER(me)] && second == taken[PEER(me)]);
        first = 0;
        second = 0
    }
}

/* A process is seen to be dead after all that it has stored. */
#ifndef DEATH_UNSEEN
#define SEEN_DEAD(me) (dead[PEER(me)] && len(stores[PEER(me)]) == 0)
#else
#define SEEN_DEAD(me) false
#endif

/* --- the two processes ------------------------------------------------------------------------------------------------------------------- */

proctype Client() {
    byte known_taken, first, second;
    bit seen, found, free, nudged, lost;
    {
        do
#ifdef STREAM
        :: written[CLIENT] < CALLS ->
            do
            :: claim(CLIENT);
                if
                :: free -> break
                :: else
                fi
            od;
            free = 0;
            publish(CLIENT)
        :: written[CLIENT] == CALLS -> break
#else
        :: written[CLIENT] < CALLS && !nudged ->
            nudged = 1;
            wake(CLIENT) /* D4: nudge, before the frame is published, or long before */
        :: written[CLIENT] < CALLS && written[CLIENT] - taken[WORKER] < DEPTH ->
            claim(CLIENT);
            assert(free); /* the frame DEPTH positions before was taken, or it would not have been answered */
            free = 0;
            publish(CLIENT);
            nudged = 0
        :: written[CLIENT] > taken[WORKER] ->
            wait(CLIENT, false);
            if
            :: !found && SEEN_DEAD(CLIENT) -> lost = 1
            :: else -> found = 0
            fi;
            if
#ifdef UNREAD_LOST
            :: lost
#endif
            :: else ->
                do
                :: PUBLISHED(WORKER) -> take(CLIENT)
                :: else -> break
                od
            fi;
            if
            :: lost -> assert(!PUBLISHED(WORKER)); break /* what the peer answered before it died is answered, the rest is lost */
            :: else
            fi
        :: taken[WORKER] == CALLS -> break
#endif
        od
    } unless { dead[CLIENT] };
    ended[CLIENT] = 1
}

/* The client, done, closes the channel by a control message, which the model leaves out. */
#define CLOSED (ended[CLIENT] && taken[CLIENT] == CALLS)

proctype Worker() {
    byte known_taken, first, second;
    bit seen, found, free;
    {
        do
        :: PUBLISHED(CLIENT) ->
            take(WORKER);
#ifndef STREAM
            claim(WORKER);
            assert(free); /* calls outstanding are at most DEPTH: the completion queue never overflows */
            free = 0;
            publish(WORKER)
#endif
        :: else ->
            wait(WORKER, CLOSED);
            if
            :: !found && (CLOSED || SEEN_DEAD(WORKER)) -> break
            :: else -> found = 0
            fi
        od
    } unless { dead[WORKER] };
    ended[WORKER] = 1
}

#ifdef DEATHS
proctype Death() {
end:
    if
    :: dead[CLIENT] = 1
    :: dead[WORKER] = 1
    fi
}
#endif

init {
    atomic {
        run StoreBuffer(CLIENT);
        run StoreBuffer(WORKER);
        run Client();
        run Worker();
#ifdef DEATHS
        run Death()
#endif
    }
}

/* Each ends or is dead: a client that ends has all its answers, or was told of the death. Checked with weak fairness. */
ltl progress { <> (ended[CLIENT] && ended[WORKER]) }
