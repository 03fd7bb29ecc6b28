/**
 * @file  comm/ranks.h
 * @brief Worlds of ranks: opened once, kept between calls, each call runs one function on every
 * rank.
 *
 * Ranks are threads of this process; where a launcher started as many processes as ranks, and the
 * transport connects processes (nccl), this process is one of them and runs its own rank only.
 *
 * Threads. Rank r of a world of threads is the same thread in every call, until a call fails. The
 * only rank of a process runs on the calling thread, which may be another one each time: streams
 * it keeps have to be made current again. On a thread of the world every call starts without last
 * error and not quiet, its log lines name the rank.
 *
 * What lives between calls. The communicators, with what was attached and set on them, and whatever
 * the hooks made. A function that returns RA_OK has received what was sent to it and freed every
 * request: nothing is pending between calls. What a failed call left goes with its world.
 *
 * Failure. A rank that returns another status than RA_OK aborts the world: the others' waits return
 * RA_ERR_PEER, the call returns when all ranks have, and by then the world has been left (hooks,
 * connections and threads). The next call connects a new one. So does a call after one in which
 * ra_comm_abort() was called though all returned RA_OK. A call has no deadline of its own:
 * ra_comm_set_timeout() limits the waits in it, ra_comm_abort() from any thread ends them.
 *
 * Processes. With an open hook, in which the rank attaches, a call ends with a barrier: RA_OK means
 * that the function was RA_OK on all ranks, and all connect anew after the same calls. A process
 * that is lost between two calls fails the next one with RA_ERR_PEER.
 */
#ifndef RA_COMM_RANKS_H
#define RA_COMM_RANKS_H

#include "comm/comm.h"

typedef struct ra_ranks ra_ranks_t;

/** Body of one rank. A return other than RA_OK aborts the others, whose waits return RA_ERR_PEER.
 */
typedef ra_status_t (*ra_rank_func_t)(ra_comm_t *comm, void *arg);

/** What a rank keeps between calls, such as a stream and what is attached to it. Both run on the
 * rank's thread. */
typedef struct ra_rank_hooks {
    ra_rank_func_t open; /**< once connected, before the first call; may fail as a call may */
    /** Before the world is left, when open() has returned on every rank, failed ones included. The
     * communicator may be aborted: nothing can be posted. */
    void (*close)(ra_comm_t *comm, void *arg);
    void *arg;
} ra_rank_hooks_t;

/**
 * Prepare a world. It is connected by the first call.
 * @param hooks  Copied; NULL: none.
 * @retval RA_ERR_USAGE  unknown transport (the message lists the rows), ranks < 1 or > 4096, not as
 *                       many ranks as processes.
 */
ra_status_t ra_ranks_open(const char *transport, int ranks, const ra_rank_hooks_t *hooks,
                          ra_ranks_t **ranks_p);
/** Leave the world: never waits for anything but hooks (and, as rank 0 of several processes, for
 * the others to leave). Accepts NULL. */
void ra_ranks_close(ra_ranks_t *ranks);

/**
 * Run @a func on every rank and wait for all. One call at a time, from any thread that is not a
 * rank of this world.
 * @return RA_OK, or the status of the first rank that failed for a reason of its own (not
 * RA_ERR_PEER); ra_last_error() of the caller then holds that rank's text.
 */
ra_status_t ra_ranks_call(ra_ranks_t *ranks, ra_rank_func_t func, void *arg);

/** Open, one call, close: for a function that attaches itself and leaves nothing. */
ra_status_t ra_ranks_run(const char *transport, int ranks, ra_rank_func_t func, void *arg);

/** The row that @a name means for ranks with devices of @a kind: on GPUs "auto" is peer, or nccl
 * where a launcher started several processes. Other names are returned as they are. */
const char *ra_transport_choose(const char *name, ra_device_kind_t kind);

/** For listing: row @a index of the transport table, false past the end. */
bool ra_transport_list(int index, const char **name_p, const char **doc_p);

#endif
