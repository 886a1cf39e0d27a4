/* Bare loops of OpenSSL, that TLS in pagenet is measured against: one ping after the other, and one
 * write after the other, over a blocking socket. Without a directory of certificates: the same
 * without TLS. */
#define _GNU_SOURCE
#include "testing.h"
#include "clock.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ASKED = 24 };

struct end {
    int sock;
    SSL_CTX *context;
    SSL *ssl;
};

static bool load(SSL_CTX *context, const char *directory, const char *side) {
    char certificate[4096], key[4096], authority[4096];
    snprintf(certificate, sizeof certificate, "%s/%s-cert.pem", directory, side);
    snprintf(key, sizeof key, "%s/%s-key.pem", directory, side);
    snprintf(authority, sizeof authority, "%s/ca-cert.pem", directory);
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    return SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) == 1 &&
           SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256") == 1 &&
           SSL_CTX_use_certificate_chain_file(context, certificate) == 1 &&
           SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) == 1 &&
           SSL_CTX_load_verify_locations(context, authority, NULL) == 1;
}

static void close_end(struct end *end) {
    if (end->ssl)
        SSL_shutdown(end->ssl);
    SSL_free(end->ssl);
    SSL_CTX_free(end->context);
    ERR_clear_error();
}

static int open_end(struct end *end, int sock, const char *directory, bool serves) {
    *end = (struct end){.sock = sock};
    if (!directory)
        return 0;
    end->context = SSL_CTX_new(serves ? TLS_server_method() : TLS_client_method());
    if (end->context && load(end->context, directory, serves ? "server" : "client"))
        end->ssl = SSL_new(end->context);
    if (end->ssl && SSL_set_fd(end->ssl, sock) == 1 &&
        (serves ? SSL_accept : SSL_connect)(end->ssl) == 1)
        return 0;
    close_end(end);
    return -EPROTO;
}

static bool put(struct end *end, const char *bytes, size_t size) {
    while (size) {
        ssize_t went = end->ssl ? SSL_write(end->ssl, bytes, (int)size)
                                : send(end->sock, bytes, size, MSG_NOSIGNAL);
        if (went <= 0)
            return false;
        bytes += went;
        size -= (size_t)went;
    }
    return true;
}

static bool get(struct end *end, char *bytes, size_t size) {
    while (size) {
        ssize_t came =
            end->ssl ? SSL_read(end->ssl, bytes, (int)size) : recv(end->sock, bytes, size, 0);
        if (came <= 0)
            return false;
        bytes += came;
        size -= (size_t)came;
    }
    return true;
}

int pn_bench_answer_pings(int sock, const char *directory, uint64_t size) {
    struct end end;
    char asked[ASKED], *answer = calloc(1, size);
    int error = answer ? open_end(&end, sock, directory, true) : -ENOMEM;
    if (!error) {
        while (get(&end, asked, sizeof asked) && put(&end, answer, size))
            ;
        close_end(&end);
    }
    free(answer);
    return error;
}

int pn_bench_ping(int sock, const char *directory, uint64_t size, uint64_t count,
                  uint64_t *latencies) {
    struct end end;
    char asked[ASKED] = {0}, *answer = calloc(1, size);
    int error = answer ? open_end(&end, sock, directory, false) : -ENOMEM;
    for (uint64_t i = 0; i < count && !error; i++) {
        uint64_t began = now();
        if (!put(&end, asked, sizeof asked) || !get(&end, answer, size))
            error = -EPIPE;
        latencies[i] = now() - began;
    }
    if (answer && error != -EPROTO)
        close_end(&end);
    free(answer);
    return error;
}

int pn_bench_tls_send(int sock, const char *directory, uint64_t length, uint64_t chunk) {
    struct end end;
    char *bytes = malloc(chunk), asked[ASKED];
    int error = bytes ? open_end(&end, sock, directory, true) : -ENOMEM;
    if (!error) {
        memset(bytes, 1, chunk);
        bool good = put(&end, bytes, 1) && get(&end, asked, sizeof asked);
        for (uint64_t done = 0; done < length && good; done += chunk)
            good = put(&end, bytes, chunk);
        get(&end, asked, 1); /* until the other end has it all */
        close_end(&end);
    }
    free(bytes);
    return error;
}

int64_t pn_bench_tls_receive(int sock, const char *directory, uint64_t length, uint64_t chunk) {
    struct end end;
    char *bytes = malloc(chunk), asked[ASKED] = {0};
    int64_t took = bytes ? open_end(&end, sock, directory, false) : -ENOMEM;
    if (!took) {
        bool good = get(&end, bytes, 1); /* the other end is ready */
        uint64_t began = now();
        good = good && put(&end, asked, sizeof asked);
        for (uint64_t done = 0; done < length && good; done += chunk)
            good = get(&end, bytes, chunk);
        took = good ? (int64_t)(now() - began) : -EPIPE;
        close_end(&end);
    }
    free(bytes);
    return took;
}
