/**
 * @file  comm/bootstrap.h
 * @brief Processes of one job find each other over TCP, exchange a few bytes, and then watch each
 *        other. Internal to comm/.
 *
 * A star round rank 0. After the exchange each connection carries heartbeats: a process that dies,
 * is cut off or frozen is noticed by rank 0 (or, if that is the one, by all) and everybody is told.
 * Nothing is encrypted or authenticated: for the network of one job.
 */
#ifndef RA_COMM_BOOTSTRAP_H
#define RA_COMM_BOOTSTRAP_H

#include "comm/launch.h"
#include <stdint.h>

/** Silence after which a process counts as dead. */
#define RA_BOOTSTRAP_SILENCE_S 20

typedef struct ra_bootstrap ra_bootstrap_t;

/**
 * Meet all processes and exchange: every rank gives @a bytes (the same number), all gets those of
 * rank 0, rank 1, ...
 * @retval RA_ERR_PEER     a process went away meanwhile; RA_ERR_TIMEOUT  not all came in time.
 */
ra_status_t ra_bootstrap_open(const ra_launch_t *launch, double patience_s, const void *mine,
                              int32_t bytes, void *all, ra_bootstrap_t **bootstrap_p);
/**
 * From now on a thread of its own watches. @a func is called at most once, from that thread, when a
 * process is lost (RA_ERR_PEER) or called ra_bootstrap_abort() (its cause).
 */
ra_status_t ra_bootstrap_watch(ra_bootstrap_t *bootstrap,
                               void (*func)(void *arg, ra_status_t cause), void *arg);
/** Tell all others. Any thread; only the first call counts. */
void ra_bootstrap_abort(ra_bootstrap_t *bootstrap, ra_status_t cause);
/** Stop watching and leave: the others go on. Accepts NULL. */
void ra_bootstrap_close(ra_bootstrap_t *bootstrap);

#endif
