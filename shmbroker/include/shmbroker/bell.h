/* The bell that a process sleeps on: a named POSIX semaphore, made by the broker, opened by who rings.
 *
 * Contract of all functions here
 *   Before   The bell was opened. Linked with -pthread where the C library wants that for sem_open.
 *   Who      Any thread.
 *   After    A ring is a hint (D2): who was woken looks at everything again.
 *   Failure  open: false, with errno as sem_open leaves it; EINVAL for a name that no doorbell has. Nothing else fails.
 */
#ifndef SHMBROKER_BELL_H
#define SHMBROKER_BELL_H

#if defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE)
#define _POSIX_C_SOURCE 200809L /* -std=c11 hides POSIX; includes above this one, if any, have to say so before them */
#endif

#include "doorbell.h"

#include <errno.h>
#include <semaphore.h>
#include <string.h>
#include <time.h>

struct shmbroker_bell {
    sem_t *semaphore;
};

/* A peer may tell any name: "/shmbroker." with nothing behind it that could lead elsewhere. */
static inline bool shmbroker_bell_open(struct shmbroker_bell *bell, const char *name)
{
    if (strncmp(name, "/shmbroker.", 11) != 0 || strchr(name + 1, '/') != NULL || strlen(name) > 100) {
        errno = EINVAL;
        return false;
    }
    bell->semaphore = sem_open(name, 0);
    return bell->semaphore != SEM_FAILED;
}

static inline void shmbroker_bell_close(struct shmbroker_bell *bell)
{
    sem_close(bell->semaphore);
}

/* Wake who sleeps on it. One that was rung more often than it can count belongs to somebody who is awake: that is no failure. */
static inline void shmbroker_ring(struct shmbroker_bell *bell)
{
    sem_post(bell->semaphore);
}

/* Block until rung, for so long at most; whether it was. A signal ends the wait too. */
static inline bool shmbroker_bell_wait(struct shmbroker_bell *bell, uint64_t nanoseconds)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until); /* the clock that sem_timedwait takes; set forward or back, D3 is late once */
    uint64_t ns = (uint64_t)until.tv_nsec + nanoseconds;
    until.tv_sec += (time_t)(ns / 1000000000u);
    until.tv_nsec = (long)(ns % 1000000000u);
    return sem_timedwait(bell->semaphore, &until) == 0;
}

#endif
