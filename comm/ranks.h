/**
 * @file  comm/ranks.h
 * @brief Run one function on every rank of a world, over a transport of the table.
 */
#ifndef RA_COMM_RANKS_H
#define RA_COMM_RANKS_H

#include "comm/comm.h"

/** Body of one rank. A return other than RA_OK aborts the others, whose waits return RA_ERR_PEER.
 */
typedef ra_status_t (*ra_rank_func_t)(ra_comm_t *comm, void *arg);

/**
 * Run @a func on ranks 0 .. ranks-1 and wait for all. Ranks are threads of this process; rank 0
 * runs on the calling thread when ranks is 1. Where a launcher started as many processes as ranks,
 * and the transport connects processes (nccl), this process is one of them and runs its own rank
 * only.
 * @return RA_OK, or the status of the first rank that failed for a reason of its own (not
 * RA_ERR_PEER); ra_last_error() of the caller then holds that rank's text.
 * @retval RA_ERR_USAGE  unknown transport (the message lists the rows), ranks < 1 or > 4096.
 */
ra_status_t ra_ranks_run(const char *transport, int ranks, ra_rank_func_t func, void *arg);

/** The row that @a name means for ranks with devices of @a kind: on GPUs "auto" is peer, or nccl
 * where a launcher started several processes. Other names are returned as they are. */
const char *ra_transport_choose(const char *name, ra_device_kind_t kind);

/** For listing: row @a index of the transport table, false past the end. */
bool ra_transport_list(int index, const char **name_p, const char **doc_p);

#endif
