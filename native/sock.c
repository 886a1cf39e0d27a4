/* Sending and receiving, over a plain socket or one with TLS. */
#define _GNU_SOURCE
#include "sock.h"
#include "tls.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>

static ssize_t with_errno(ssize_t result) {
    if (result >= 0)
        return result;
    errno = (int)-result;
    return -1;
}

ssize_t pn_sock_send(struct sock *sock, struct iovec *parts, int count, bool more) {
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)count};
    ssize_t sent;
    if (sock->tls)
        return with_errno(pn_tls_send(sock->tls, parts, count));
    do {
        sent = sendmsg(sock->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL | (more ? MSG_MORE : 0));
    } while (sent < 0 && errno == EINTR);
    return sent;
}

ssize_t pn_sock_send_file(struct sock *sock, int file, off_t *at, size_t size) {
    ssize_t sent;
    if (sock->tls) {
        sent = with_errno(pn_tls_sendfile(sock->tls, file, *at, size));
        *at += sent > 0 ? sent : 0;
        return sent;
    }
    do {
        sent = sendfile(sock->fd, file, at, size);
    } while (sent < 0 && errno == EINTR);
    return sent;
}

ssize_t pn_sock_receive(struct sock *sock, struct iovec *parts, int count) {
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)count};
    ssize_t got;
    if (sock->tls) {
        int full;
        got = with_errno(pn_tls_receive(sock->tls, parts, count, &full));
        sock->pending = full;
        return got;
    }
    do {
        got = recvmsg(sock->fd, &message, MSG_DONTWAIT);
    } while (got < 0 && errno == EINTR);
    return got;
}

ssize_t pn_sock_receive_some(struct sock *sock, void *to, size_t size) {
    struct iovec part = {to, size};
    return pn_sock_receive(sock, &part, 1);
}

bool pn_sock_sends_files(const struct sock *sock) {
    return !sock->tls || pn_tls_kernel(sock->tls) & PN_TLS_SENDS;
}

bool pn_sock_end(const struct sock *sock, struct pn_end *end) {
    bool is_tls = sock->tls && errno == EPROTO;
    if (errno == EAGAIN)
        return false;
    end->kind = is_tls ? PN_END_PROTOCOL : PN_END_BROKEN;
    end->error = is_tls ? 0 : errno;
    snprintf(end->text, sizeof end->text, "%s%s", is_tls ? "TLS: " : "",
             is_tls ? pn_tls_text(sock->tls) : strerror(errno));
    return true;
}
