/* The socket that a loop drives, plain or with TLS: nothing else in a loop knows which. */
#ifndef PAGENET_SOCK_H
#define PAGENET_SOCK_H
#include <stdbool.h>
#include <sys/types.h>
#include <sys/uio.h>

struct pn_end;
struct pn_tls;

struct sock {
    int fd;             /* non-blocking */
    struct pn_tls *tls; /* NULL: plain */
    /* There may be more to receive, which epoll does not report: the loop must come back. */
    bool pending;
};

/* Each returns the number of bytes, or -1 with errno: EAGAIN where the socket is not ready. What
 * was not sent must be sent next. more: other bytes follow at once. */
ssize_t pn_sock_send(struct sock *sock, struct iovec *parts, int count, bool more);
ssize_t pn_sock_send_file(struct sock *sock, int file, off_t *at, size_t size);
/* 0: the peer has closed. */
ssize_t pn_sock_receive(struct sock *sock, struct iovec *parts, int count);
/* The same for one buffer. */
ssize_t pn_sock_receive_some(struct sock *sock, void *to, size_t size);
/* Whether the kernel sends files over it. */
bool pn_sock_sends_files(const struct sock *sock);
/* After a call that has failed, with errno: how that ends the connection. False: not at all, since
 * the socket was only not ready. */
bool pn_sock_end(const struct sock *sock, struct pn_end *end);

#endif
