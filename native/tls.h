/* What loops in C need of a connection with TLS; the rest is in pagenet.h. */
#ifndef PAGENET_TLS_H
#define PAGENET_TLS_H
#include "pagenet.h"

#include <sys/types.h>
#include <sys/uio.h>

/* Sends the parts, as far as the socket takes them. Returns how many bytes went, or -errno. After
 * -EAGAIN, and after fewer bytes than there are, the caller must come back with the bytes that did
 * not go, before any others: the first record of them is made already. */
ssize_t pn_tls_send(struct pn_tls *tls, const struct iovec *parts, int count);
/* Receives into the parts, in order. Returns how many bytes came; 0: the peer has closed; or
 * -errno (-ECONNRESET: it ended without a farewell; -EPROTO: pn_tls_text() has the reason). *full:
 * whether the parts are full, and there may be more that the socket does not show. The parts must
 * be memory of this process alone: OpenSSL stores to it. */
ssize_t pn_tls_receive(struct pn_tls *tls, const struct iovec *parts, int count, int *full);
/* Has the kernel send part of a file. Only if pn_tls_kernel() says that it sends. */
ssize_t pn_tls_sendfile(struct pn_tls *tls, int file, off_t at, size_t size);

#endif
