#include "comm/bootstrap.h"

#include "base/clock.h"
#include <errno.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAGIC = 0x52413031, RETRY_NS = 20000000, HEARTBEAT_S = 2, HELLO_S = 5 };

/* One 8-byte message on an established connection. */
typedef enum message_kind { MESSAGE_BEAT = 1, MESSAGE_ABORT, MESSAGE_BYE } message_kind_t;

typedef struct message {
    int32_t kind, value;
} message_t;

typedef struct hello {
    uint32_t magic;
    int32_t rank, size, bytes;
} hello_t;

typedef struct link {
    int fd;           /* -1 once closed or said goodbye */
    int64_t heard_ns; /* last message */
    char partial[sizeof(message_t)];
    size_t have;
} link_t;

struct ra_bootstrap {
    int rank, size;
    int count;    /* links: size - 1 on rank 0, else 1 */
    link_t *link; /* rank 0: link[r - 1] of rank r */
    pthread_mutex_t sending;
    pthread_t watcher;
    bool watching;
    int wake[2];      /* pipe that ends the watcher */
    atomic_int open;  /* links that have not said goodbye */
    atomic_int cause; /* first status other than RA_OK that was sent or received */
    void (*func)(void *arg, ra_status_t cause);
    void *arg;
};

static int wait_fd(int fd, short events, int64_t deadline_ns)
{
    int64_t left_ms = (deadline_ns - ra_clock_ns()) / 1000000;
    struct pollfd one = {.fd = fd, .events = events};
    return left_ms < 0 ? 0 : poll(&one, 1, left_ms >= INT_MAX ? INT_MAX : (int)left_ms + 1);
}

static bool send_all(int fd, const void *data, size_t bytes, int64_t deadline_ns)
{
    const char *at = data;
    while (bytes > 0) {
        ssize_t sent = send(fd, at, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0) {
            at += sent;
            bytes -= (size_t)sent;
        } else if (errno != EINTR && (errno != EAGAIN || wait_fd(fd, POLLOUT, deadline_ns) == 0)) {
            return false;
        }
    }
    return true;
}

static bool receive_all(int fd, void *data, size_t bytes, int64_t deadline_ns)
{
    char *at = data;
    while (bytes > 0) {
        ssize_t got = recv(fd, at, bytes, MSG_DONTWAIT);
        if (got > 0) {
            at += got;
            bytes -= (size_t)got;
        } else if (got == 0 ||
                   (errno != EINTR && (errno != EAGAIN || wait_fd(fd, POLLIN, deadline_ns) == 0))) {
            return false;
        }
    }
    return true;
}

static ra_status_t resolve(const ra_launch_t *launch, struct addrinfo **list_p)
{
    char port[16];
    snprintf(port, sizeof(port), "%d", launch->port);
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
    int error = getaddrinfo(launch->address, port, &hints, list_p);
    if (error != 0) {
        return ra_fail(RA_ERR_USAGE, "comm", "MASTER_ADDR '%s': %s", launch->address,
                       gai_strerror(error));
    }
    return RA_OK;
}

static ra_status_t listen_at(const ra_launch_t *launch, int *fd_p)
{
    struct addrinfo *list = NULL;
    RA_TRY(resolve(launch, &list));
    int fd = -1, one = 1;
    for (struct addrinfo *a = list; a != NULL && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0) {
            continue;
        }
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
        if (bind(fd, a->ai_addr, a->ai_addrlen) != 0 || listen(fd, 1024) != 0) {
            close(fd);
            fd = -1;
        }
    }
    freeaddrinfo(list);
    if (fd < 0) {
        return ra_fail(RA_ERR_USAGE, "comm", "rank 0 cannot listen at %s:%d: %s; set MASTER_PORT",
                       launch->address, launch->port, strerror(errno));
    }
    *fd_p = fd;
    return RA_OK;
}

static void link_open(link_t *link, int fd)
{
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    *link = (link_t){.fd = fd, .heard_ns = ra_clock_ns()};
}

/* A stranger, or a process of another job, is turned away. */
static void take_hello(ra_bootstrap_t *b, int fd, int32_t bytes, char *all, int *missing)
{
    hello_t hello;
    int64_t deadline_ns = ra_deadline_in(HELLO_S);
    if (receive_all(fd, &hello, sizeof(hello), deadline_ns) && hello.magic == MAGIC &&
        hello.size == b->size && hello.bytes == bytes && hello.rank > 0 && hello.rank < b->size &&
        b->link[hello.rank - 1].fd < 0 &&
        receive_all(fd, all + (int64_t)hello.rank * bytes, (size_t)bytes, deadline_ns)) {
        link_open(&b->link[hello.rank - 1], fd);
        --*missing;
    } else {
        close(fd);
    }
}

static ra_status_t meet_as_first(ra_bootstrap_t *b, const ra_launch_t *launch, int64_t deadline_ns,
                                 int32_t bytes, char *all)
{
    int listener = -1, missing = b->size - 1;
    RA_TRY(listen_at(launch, &listener));
    while (missing > 0 && ra_clock_ns() < deadline_ns) {
        int fd = -1;
        if (wait_fd(listener, POLLIN, deadline_ns) > 0) {
            fd = accept(listener, NULL, NULL);
        }
        if (fd >= 0) {
            take_hello(b, fd, bytes, all, &missing);
        }
    }
    close(listener);
    if (missing > 0) {
        return ra_fail(RA_ERR_TIMEOUT, "comm", "%d of %d processes did not come to %s:%d", missing,
                       b->size, launch->address, launch->port);
    }
    for (int i = 0; i < b->count; i++) {
        if (!send_all(b->link[i].fd, all, (size_t)b->size * (size_t)bytes, deadline_ns)) {
            return ra_fail(RA_ERR_PEER, "comm", "the process of rank %d went away at the start",
                           i + 1);
        }
    }
    return RA_OK;
}

static int connect_once(const struct addrinfo *list)
{
    for (const struct addrinfo *a = list; a != NULL; a = a->ai_next) {
        int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen) == 0) {
            return fd;
        }
        if (fd >= 0) {
            close(fd);
        }
    }
    return -1;
}

static ra_status_t meet_first(ra_bootstrap_t *b, const ra_launch_t *launch, int64_t deadline_ns,
                              const void *mine, int32_t bytes, char *all)
{
    struct addrinfo *list = NULL;
    hello_t hello = {.magic = MAGIC, .rank = b->rank, .size = b->size, .bytes = bytes};
    size_t total = (size_t)b->size * (size_t)bytes;
    RA_TRY(resolve(launch, &list));
    bool met = false;
    while (!met && ra_clock_ns() < deadline_ns) {
        int fd = connect_once(list);
        /* Rank 0 may still be leaving an earlier world: it then closes the connection. */
        met = fd >= 0 && send_all(fd, &hello, sizeof(hello), deadline_ns) &&
              send_all(fd, mine, (size_t)bytes, deadline_ns) &&
              receive_all(fd, all, total, deadline_ns);
        if (met) {
            link_open(&b->link[0], fd);
        } else {
            if (fd >= 0) {
                close(fd);
            }
            nanosleep(&(struct timespec){.tv_nsec = RETRY_NS}, NULL);
        }
    }
    freeaddrinfo(list);
    return met ? RA_OK
               : ra_fail(RA_ERR_TIMEOUT, "comm", "rank %d of %d cannot reach rank 0 at %s:%d",
                         b->rank, b->size, launch->address, launch->port);
}

ra_status_t ra_bootstrap_open(const ra_launch_t *launch, double patience_s, const void *mine,
                              int32_t bytes, void *all, ra_bootstrap_t **bootstrap_p)
{
    ra_bootstrap_t *b = calloc(1, sizeof(*b));
    int count = launch->rank == 0 ? launch->size - 1 : 1;
    link_t *link = calloc((size_t)count + 1, sizeof(link_t));
    if (b == NULL || link == NULL) {
        free(b);
        free(link);
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot allocate %d connections", count);
    }
    *b = (ra_bootstrap_t){
        .rank = launch->rank, .size = launch->size, .count = count, .link = link, .wake = {-1, -1}};
    pthread_mutex_init(&b->sending, NULL);
    for (int i = 0; i < count; i++) {
        link[i].fd = -1;
    }
    memcpy((char *)all + (int64_t)b->rank * bytes, mine, (size_t)bytes);
    int64_t deadline_ns = ra_deadline_in(patience_s);
    ra_status_t status = b->rank == 0 ? meet_as_first(b, launch, deadline_ns, bytes, all)
                                      : meet_first(b, launch, deadline_ns, mine, bytes, all);
    if (status != RA_OK) {
        ra_bootstrap_close(b);
        return status;
    }
    *bootstrap_p = b;
    return RA_OK;
}

static void tell_all(ra_bootstrap_t *b, message_kind_t kind, int value)
{
    message_t message = {.kind = kind, .value = value};
    pthread_mutex_lock(&b->sending);
    for (int i = 0; i < b->count; i++) {
        if (b->link[i].fd >= 0) { /* one that is gone shows when it is read */
            send_all(b->link[i].fd, &message, sizeof(message), ra_deadline_in(1.0));
        }
    }
    pthread_mutex_unlock(&b->sending);
}

static bool first_cause(ra_bootstrap_t *b, ra_status_t cause)
{
    int none = RA_OK;
    return atomic_compare_exchange_strong(&b->cause, &none, (int)cause);
}

void ra_bootstrap_abort(ra_bootstrap_t *bootstrap, ra_status_t cause)
{
    if (first_cause(bootstrap, cause)) {
        tell_all(bootstrap, MESSAGE_ABORT, (int)cause);
    }
}

static void link_close(ra_bootstrap_t *b, link_t *link)
{
    pthread_mutex_lock(&b->sending);
    close(link->fd);
    link->fd = -1;
    pthread_mutex_unlock(&b->sending);
    atomic_fetch_sub(&b->open, 1);
}

/* The star's centre passes on what one point of it says. */
static void lose(ra_bootstrap_t *b, ra_status_t cause)
{
    if (first_cause(b, cause)) {
        if (b->rank == 0) {
            tell_all(b, MESSAGE_ABORT, (int)cause);
        }
        b->func(b->arg, cause);
    }
}

static void lose_link(ra_bootstrap_t *b, link_t *link, const char *how)
{
    int rank = b->rank == 0 ? (int)(link - b->link) + 1 : 0;
    link_close(b, link);
    lose(b, ra_fail(RA_ERR_PEER, "comm", "the process of rank %d %s", rank, how));
}

static void read_link(ra_bootstrap_t *b, link_t *link)
{
    ssize_t got =
        recv(link->fd, link->partial + link->have, sizeof(message_t) - link->have, MSG_DONTWAIT);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) {
        lose_link(b, link, "has gone");
        return;
    }
    link->have += got > 0 ? (size_t)got : 0;
    link->heard_ns = ra_clock_ns();
    if (link->have < sizeof(message_t)) {
        return;
    }
    message_t message;
    memcpy(&message, link->partial, sizeof(message));
    link->have = 0;
    if (message.kind == MESSAGE_BYE) {
        link_close(b, link);
    } else if (message.kind == MESSAGE_ABORT) {
        lose(b, (ra_status_t)message.value);
    }
}

static void *watch(void *arg)
{
    ra_bootstrap_t *b = arg;
    struct pollfd *polled = calloc((size_t)b->count + 1, sizeof(*polled));
    int64_t beat_ns = ra_clock_ns();
    for (bool over = polled == NULL; !over;) {
        polled[b->count] = (struct pollfd){.fd = b->wake[0], .events = POLLIN};
        for (int i = 0; i < b->count; i++) {
            polled[i] = (struct pollfd){.fd = b->link[i].fd, .events = POLLIN};
        }
        poll(polled, (nfds_t)b->count + 1, HEARTBEAT_S * 500);
        over = polled[b->count].revents != 0;
        int64_t now = ra_clock_ns();
        for (int i = 0; i < b->count && !over; i++) {
            if (polled[i].fd >= 0 && polled[i].revents != 0) {
                read_link(b, &b->link[i]);
            } else if (b->link[i].fd >= 0 &&
                       now - b->link[i].heard_ns > RA_BOOTSTRAP_SILENCE_S * INT64_C(1000000000)) {
                lose_link(b, &b->link[i], "is silent");
            }
        }
        if (!over && now - beat_ns > HEARTBEAT_S * INT64_C(1000000000)) {
            beat_ns = now;
            tell_all(b, MESSAGE_BEAT, 0);
        }
    }
    free(polled);
    return NULL;
}

ra_status_t ra_bootstrap_watch(ra_bootstrap_t *bootstrap,
                               void (*func)(void *arg, ra_status_t cause), void *arg)
{
    bootstrap->func = func;
    bootstrap->arg = arg;
    atomic_store(&bootstrap->open, bootstrap->count);
    if (pipe(bootstrap->wake) != 0 ||
        pthread_create(&bootstrap->watcher, NULL, watch, bootstrap) != 0) {
        return ra_fail(RA_ERR_NOMEM, "comm", "cannot start the thread that watches the others");
    }
    bootstrap->watching = true;
    return RA_OK;
}

void ra_bootstrap_close(ra_bootstrap_t *bootstrap)
{
    if (bootstrap == NULL) {
        return;
    }
    if (bootstrap->watching) {
        /* The centre goes last: it is what tells the others of a loss. */
        while (bootstrap->rank == 0 && atomic_load(&bootstrap->open) > 0 &&
               atomic_load(&bootstrap->cause) == RA_OK) {
            nanosleep(&(struct timespec){.tv_nsec = RETRY_NS / 20}, NULL);
        }
        char byte = 0;
        while (write(bootstrap->wake[1], &byte, 1) < 0 && errno == EINTR) {
        }
        pthread_join(bootstrap->watcher, NULL);
        tell_all(bootstrap, MESSAGE_BYE, 0);
    }
    for (int i = 0; i < bootstrap->count; i++) {
        if (bootstrap->link[i].fd >= 0) {
            close(bootstrap->link[i].fd);
        }
    }
    for (int i = 0; i < 2; i++) {
        if (bootstrap->wake[i] >= 0) {
            close(bootstrap->wake[i]);
        }
    }
    pthread_mutex_destroy(&bootstrap->sending);
    free(bootstrap->link);
    free(bootstrap);
}
