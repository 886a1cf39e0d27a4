/* TLS 1.3 by OpenSSL, on the non-blocking socket that a loop drives. One thread at a time uses a
 * connection: the one that shakes hands, then the loop.
 *
 * OpenSSL itself answers records that are no data (tickets, KeyUpdate). It may keep bytes that it
 * has received and not given out, which the socket does not show: a caller that has filled its
 * buffers must ask again before it waits for the socket (pn_sock_receive).
 */
#define _GNU_SOURCE
#include "tls.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/bio.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum {
    RECORD = 16 << 10,     /* the most that a record holds */
    READ_AHEAD = 33 << 10, /* received at a time: more than one record */
    MOST_CHAIN = 8,        /* certificates between a peer's and the authority's */
};

struct pn_tls_context {
    SSL_CTX *ssl;
    bool serves;
    const struct pn_tls_psk *psks; /* those that are accepted, or the first is used */
    uint64_t psk_count;
};

struct pn_tls {
    SSL *ssl;
    struct pn_tls_context *context;
    bool is_open;   /* the handshake is over, and nothing has failed since */
    int64_t failed; /* what the first call that failed to receive returned: 0, or -errno */
    bool ended;     /* one has */
    char psk[PN_TLS_NAME];
    char text[256]; /* why it failed */
    uint8_t record[RECORD];
};

/* ---- why it failed ---- */

/* The oldest error: those behind it are its consequences. */
static void explain(char *text, size_t size, const char *otherwise) {
    unsigned long error = ERR_get_error();
    const char *reason = error ? ERR_reason_error_string(error) : NULL;
    snprintf(text, size, "%s", reason ? reason : otherwise);
    ERR_clear_error();
}

static bool is_end_of_file(void) {
    return ERR_GET_REASON(ERR_peek_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING;
}

/* ---- certificates ---- */

static bool is_current(const X509 *certificate, char *text, size_t size) {
    int begins = X509_cmp_current_time(X509_get0_notBefore(certificate));
    int ends = X509_cmp_current_time(X509_get0_notAfter(certificate));
    if (begins < 0 && ends > 0)
        return true;
    char when[64] = "?";
    BIO *bio = BIO_new(BIO_s_mem());
    ASN1_TIME_print(bio,
                    ends > 0 ? X509_get0_notBefore(certificate) : X509_get0_notAfter(certificate));
    int length = BIO_read(bio, when, sizeof when - 1);
    when[length > 0 ? length : 0] = 0;
    BIO_free(bio);
    snprintf(text, size, ends > 0 ? "is not valid before %s" : "has expired on %s", when);
    return false;
}

static X509 *next_certificate(BIO *bio) {
    X509 *certificate = PEM_read_bio_X509(bio, NULL, NULL, NULL);
    if (!certificate)
        ERR_clear_error(); /* the end of the file */
    return certificate;
}

static bool add_authorities(SSL_CTX *ssl, const char *pem, char *text, size_t size) {
    BIO *bio = BIO_new_mem_buf(pem, -1);
    X509_STORE *store = SSL_CTX_get_cert_store(ssl);
    int count = 0;
    for (X509 *one; (one = next_certificate(bio)); count++) {
        X509_STORE_add_cert(store, one);
        if (SSL_CTX_add_client_CA(ssl, one) != 1)
            ERR_clear_error();
        X509_free(one);
    }
    BIO_free(bio);
    if (!count)
        snprintf(text, size, "has no certificate in it");
    return count;
}

/* One list for each authority. */
static bool add_revoked(SSL_CTX *ssl, const char *pem, char *text, size_t size) {
    X509_STORE *store = SSL_CTX_get_cert_store(ssl);
    BIO *bio = BIO_new_mem_buf(pem, -1);
    int count = 0;
    for (X509_CRL *list; (list = PEM_read_bio_X509_CRL(bio, NULL, NULL, NULL)); count++) {
        X509_STORE_add_crl(store, list);
        X509_CRL_free(list);
    }
    BIO_free(bio);
    if (!count) {
        explain(text, size, "has no revocation list in it");
        return false;
    }
    ERR_clear_error(); /* the end of the file */
    X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK);
    return true;
}

static bool use_certificate(SSL_CTX *ssl, const char *pem, char *text, size_t size) {
    BIO *bio = BIO_new_mem_buf(pem, -1);
    X509 *own = next_certificate(bio);
    bool good = own && is_current(own, text, size) && SSL_CTX_use_certificate(ssl, own) == 1;
    if (!own)
        snprintf(text, size, "has no certificate in it");
    else if (!good && !*text)
        explain(text, size, "cannot be used");
    for (X509 *more; good && (more = next_certificate(bio));)
        SSL_CTX_add0_chain_cert(ssl, more);
    X509_free(own);
    BIO_free(bio);
    return good;
}

/* A key behind a passphrase is refused: there is nobody to ask. */
static int no_passphrase(char *buffer, int size, int writes, void *data) { return 0; }

static bool use_key(SSL_CTX *ssl, const char *pem, char *text, size_t size) {
    BIO *bio = BIO_new_mem_buf(pem, -1);
    EVP_PKEY *key = PEM_read_bio_PrivateKey(bio, NULL, no_passphrase, NULL);
    BIO_free(bio);
    if (!key)
        snprintf(text, size, "has no private key in it that can be read without a passphrase");
    else if (SSL_CTX_use_PrivateKey(ssl, key) != 1 || SSL_CTX_check_private_key(ssl) != 1)
        snprintf(text, size, "is the key of another certificate");
    EVP_PKEY_free(key);
    ERR_clear_error();
    return !*text;
}

/* ---- keys that both sides have ---- */

static unsigned find_psk(SSL *ssl, const char *name, unsigned char *key, unsigned most) {
    struct pn_tls *tls = SSL_get_app_data(ssl);
    const struct pn_tls_context *context = tls->context;
    for (uint64_t i = 0; i < context->psk_count; i++) {
        const struct pn_tls_psk *psk = &context->psks[i];
        if (strcmp(psk->name, name) || psk->length > most)
            continue;
        memcpy(key, psk->key, psk->length);
        snprintf(tls->psk, sizeof tls->psk, "%s", name);
        return psk->length;
    }
    return 0;
}

static unsigned use_psk(SSL *ssl, const char *hint, char *name, unsigned most_name,
                        unsigned char *key, unsigned most) {
    struct pn_tls *tls = SSL_get_app_data(ssl);
    const struct pn_tls_psk *psk = tls->context->psks;
    if (strlen(psk->name) >= most_name || psk->length > most)
        return 0;
    strcpy(name, psk->name);
    memcpy(key, psk->key, psk->length);
    snprintf(tls->psk, sizeof tls->psk, "%s", psk->name);
    return psk->length;
}

/* ---- contexts ---- */

/* Keys that both sides have go with the hash of the first of these alone, which is also the fastest
 * where a processor has instructions for AES, and one that kernels know. */
#define CIPHERS "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"

static void set_up(struct pn_tls_context *context) {
    SSL_CTX *ssl = context->ssl;
    SSL_CTX_set_min_proto_version(ssl, TLS1_3_VERSION);
    SSL_CTX_set_ciphersuites(ssl, CIPHERS);
    SSL_CTX_set_options(ssl, SSL_OP_ENABLE_KTLS | SSL_OP_NO_TICKET | SSL_OP_NO_COMPRESSION);
    SSL_CTX_set_num_tickets(ssl, 0);
    /* A key that both sides have counts as a session from before, which a server takes only if it
     * has a name for its sessions. */
    if (context->serves)
        SSL_CTX_set_session_id_context(ssl, (const uint8_t *)"pagenet", 7);
    SSL_CTX_set_session_cache_mode(ssl, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_mode(ssl, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    /* Or a record that is no data would end a call, and what has come behind it would wait in
     * OpenSSL, where the socket does not show it. */
    SSL_CTX_set_mode(ssl, SSL_MODE_AUTO_RETRY);
    /* Since 3.2, what was read ahead of a KeyUpdate may stay in OpenSSL until more comes. */
    if (OpenSSL_version_num() < 0x30200000L) {
        SSL_CTX_set_read_ahead(ssl, 1);
        SSL_CTX_set_default_read_buffer_len(ssl, READ_AHEAD);
    }
    SSL_CTX_set_verify_depth(ssl, MOST_CHAIN);
    SSL_CTX_set_verify(ssl, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
}

static void set_psks(struct pn_tls_context *context) {
    /* A side with such keys takes nothing else. */
    SSL_CTX_set_ciphersuites(context->ssl, "TLS_AES_128_GCM_SHA256");
    if (context->serves)
        SSL_CTX_set_psk_server_callback(context->ssl, find_psk);
    else
        SSL_CTX_set_psk_client_callback(context->ssl, use_psk);
}

static bool load(struct pn_tls_context *context, const struct pn_tls_config *config, int *which,
                 char *text, size_t size) {
    SSL_CTX *ssl = context->ssl;
    *text = 0;
    if (context->psk_count) {
        set_psks(context);
        return true;
    }
    *which = PN_TLS_AUTHORITIES;
    if (!add_authorities(ssl, config->authorities, text, size))
        return false;
    *which = PN_TLS_REVOKED;
    if (config->revoked && !add_revoked(ssl, config->revoked, text, size))
        return false;
    *which = PN_TLS_CERTIFICATE;
    if (!use_certificate(ssl, config->certificate, text, size))
        return false;
    *which = PN_TLS_KEY;
    return use_key(ssl, config->key, text, size);
}

struct pn_tls_context *pn_tls_context_new(const struct pn_tls_config *config, int *which,
                                          char *text, uint64_t size) {
    struct pn_tls_context *context = calloc(1, sizeof *context);
    *which = PN_TLS_MEMORY;
    snprintf(text, size, "no memory");
    if (!context)
        return NULL;
    *context = (struct pn_tls_context){
        .serves = config->serves, .psks = config->psks, .psk_count = config->psk_count};
    context->ssl = SSL_CTX_new(config->serves ? TLS_server_method() : TLS_client_method());
    if (context->ssl)
        set_up(context);
    if (context->ssl && load(context, config, which, text, size))
        return context;
    ERR_clear_error();
    pn_tls_context_free(context);
    return NULL;
}

void pn_tls_context_free(struct pn_tls_context *context) {
    SSL_CTX_free(context->ssl);
    free(context);
}

/* ---- connections ---- */

static bool expect(SSL *ssl, const char *host) {
    X509_VERIFY_PARAM *wanted = SSL_get0_param(ssl);
    if (X509_VERIFY_PARAM_set1_ip_asc(wanted, host) == 1)
        return true;
    SSL_set_hostflags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    return SSL_set1_host(ssl, host) == 1 && SSL_set_tlsext_host_name(ssl, host) == 1;
}

struct pn_tls *pn_tls_new(struct pn_tls_context *context, int sock, const char *host) {
    struct pn_tls *tls = calloc(1, sizeof *tls);
    if (!tls)
        return NULL;
    tls->context = context;
    tls->ssl = SSL_new(context->ssl);
    if (!tls->ssl || SSL_set_fd(tls->ssl, sock) != 1 || (host && !expect(tls->ssl, host))) {
        ERR_clear_error();
        SSL_free(tls->ssl);
        free(tls);
        return NULL;
    }
    SSL_set_app_data(tls->ssl, tls);
    (context->serves ? SSL_set_accept_state : SSL_set_connect_state)(tls->ssl);
    return tls;
}

/* Says farewell, if the socket takes it: an end without it is that of a process that was killed, or
 * of a connection that somebody cut. */
void pn_tls_free(struct pn_tls *tls, int farewell) {
    ERR_clear_error();
    if (farewell && tls->is_open)
        SSL_shutdown(tls->ssl);
    ERR_clear_error();
    SSL_free(tls->ssl);
    free(tls);
}

const char *pn_tls_text(const struct pn_tls *tls) { return tls->text; }

static void explain_failure(struct pn_tls *tls) {
    long verified = SSL_get_verify_result(tls->ssl);
    if (verified != X509_V_OK)
        snprintf(tls->text, sizeof tls->text, "%s", X509_verify_cert_error_string(verified));
    else
        explain(tls->text, sizeof tls->text, "TLS failed");
}

static int64_t failure(struct pn_tls *tls, int error, int number) {
    if (error == SSL_ERROR_ZERO_RETURN)
        return 0;
    if ((error == SSL_ERROR_SYSCALL && !number) || is_end_of_file()) {
        snprintf(tls->text, sizeof tls->text, "the peer ended without a farewell");
        return -ECONNRESET;
    }
    if (error == SSL_ERROR_SYSCALL)
        return -number;
    explain_failure(tls);
    return -EPROTO;
}

/* Why a call of OpenSSL did not go on: 0, where the peer has closed, or -errno. After a failure
 * nothing more can be said over this connection. */
static int64_t refusal(struct pn_tls *tls, int result) {
    int number = errno, error = SSL_get_error(tls->ssl, result);
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE)
        return -EAGAIN;
    int64_t why = failure(tls, error, number);
    tls->is_open = tls->is_open && !why;
    ERR_clear_error();
    return why;
}

/* The same of a call that receives: from then on every other one fails likewise. (After one that
 * sends, there may be an alert to receive, which says why the peer has closed.) */
static int64_t end_of_input(struct pn_tls *tls, int result) {
    int64_t why = refusal(tls, result);
    tls->ended = why != -EAGAIN;
    tls->failed = why;
    return why;
}

/* To be called before each call of OpenSSL: errors that other connections have left in this thread
 * are none of this one's. */
static void forget_errors(void) {
    ERR_clear_error();
    errno = 0;
}

int64_t pn_tls_handshake(struct pn_tls *tls) {
    forget_errors();
    int done = SSL_do_handshake(tls->ssl);
    tls->is_open = done == 1;
    if (tls->is_open)
        return 0;
    int64_t error = refusal(tls, done);
    return error ? error : -ECONNRESET;
}

int pn_tls_wants_to_send(const struct pn_tls *tls) { return SSL_want_write(tls->ssl); }

/* What follows the first `skip` bytes of the parts, for one record: where they are, if they are
 * together, or else gathered. */
static const void *next_record(struct pn_tls *tls, const struct iovec *parts, int count,
                               size_t skip, size_t *size) {
    *size = 0;
    for (int i = 0; i < count && *size < RECORD; i++) {
        size_t from = skip < parts[i].iov_len ? skip : parts[i].iov_len;
        const uint8_t *bytes = (const uint8_t *)parts[i].iov_base + from;
        size_t here = parts[i].iov_len - from;
        skip -= from;
        if (!*size && (here >= RECORD || (here && i == count - 1))) {
            *size = here < RECORD ? here : RECORD;
            return bytes;
        }
        here = here < RECORD - *size ? here : RECORD - *size;
        memcpy(tls->record + *size, bytes, here);
        *size += here;
    }
    return tls->record;
}

/* Many records go as one, not each in a packet of its own. */
static void cork(const struct pn_tls *tls, int on) {
    setsockopt(SSL_get_wfd(tls->ssl), IPPROTO_TCP, TCP_CORK, &on, sizeof on);
}

static ssize_t send_records(struct pn_tls *tls, const struct iovec *parts, int count) {
    size_t sent = 0, size, went;
    const void *bytes;
    while ((bytes = next_record(tls, parts, count, sent, &size), size)) {
        forget_errors();
        int done = SSL_write_ex(tls->ssl, bytes, size, &went);
        if (done != 1) {
            int64_t error = refusal(tls, done);
            return sent ? (ssize_t)sent : error ? error : -EPIPE;
        }
        sent += went;
    }
    return (ssize_t)sent;
}

ssize_t pn_tls_send(struct pn_tls *tls, const struct iovec *parts, int count) {
    size_t size = 0;
    for (int i = 0; i < count; i++)
        size += parts[i].iov_len;
    if (size > RECORD)
        cork(tls, 1);
    ssize_t sent = send_records(tls, parts, count);
    if (size > RECORD)
        cork(tls, 0);
    return sent;
}

ssize_t pn_tls_receive(struct pn_tls *tls, const struct iovec *parts, int count, int *full) {
    size_t received = 0, got;
    *full = 0;
    if (tls->ended)
        return tls->failed;
    for (int i = 0; i < count; i++)
        for (size_t at = 0; at < parts[i].iov_len; at += got, received += got) {
            forget_errors();
            int done = SSL_read_ex(tls->ssl, (uint8_t *)parts[i].iov_base + at,
                                   parts[i].iov_len - at, &got);
            if (done != 1) {
                int64_t error = end_of_input(tls, done);
                return received ? (ssize_t)received : error;
            }
        }
    *full = 1;
    return (ssize_t)received;
}

ssize_t pn_tls_sendfile(struct pn_tls *tls, int file, off_t at, size_t size) {
    forget_errors();
    ossl_ssize_t sent = SSL_sendfile(tls->ssl, file, at, size, 0);
    return sent >= 0 ? (ssize_t)sent : refusal(tls, (int)sent);
}

int pn_tls_kernel(const struct pn_tls *tls) {
    return (BIO_get_ktls_send(SSL_get_wbio(tls->ssl)) ? PN_TLS_SENDS : 0) |
           (BIO_get_ktls_recv(SSL_get_rbio(tls->ssl)) ? PN_TLS_RECEIVES : 0);
}

int64_t pn_tls_send_bytes(struct pn_tls *tls, const void *bytes, uint64_t size) {
    struct iovec part = {.iov_base = (void *)bytes, .iov_len = size};
    return pn_tls_send(tls, &part, 1);
}

/* At most what one record has: the caller asks again. */
int64_t pn_tls_receive_bytes(struct pn_tls *tls, void *bytes, uint64_t size) {
    size_t got;
    if (tls->ended)
        return tls->failed;
    forget_errors();
    int done = SSL_read_ex(tls->ssl, bytes, size, &got);
    return done == 1 ? (int64_t)got : end_of_input(tls, done);
}

/* ---- who the peer is ---- */

struct names {
    char *text;
    uint64_t size, used;
    bool whole;
};

/* A name with a zero in it, or one that is too long, is no name: what is checked must be what was
 * signed. */
static void add_name(struct names *names, const char *kind, const ASN1_STRING *name) {
    int length = ASN1_STRING_length(name);
    const char *bytes = (const char *)ASN1_STRING_get0_data(name);
    uint64_t more = strlen(kind) + (uint64_t)length + 1;
    if (length <= 0 || memchr(bytes, 0, (size_t)length) || memchr(bytes, '\n', (size_t)length))
        return;
    if (names->used + more + 1 > names->size) {
        names->whole = false;
        return;
    }
    names->used += (uint64_t)snprintf(names->text + names->used, names->size - names->used,
                                      "%s%.*s\n", kind, length, bytes);
}

static void add_common_name(struct names *names, const X509 *certificate) {
    const X509_NAME *subject = X509_get_subject_name(certificate);
    int at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
    unsigned char *text = NULL;
    if (at < 0)
        return;
    int length =
        ASN1_STRING_to_UTF8(&text, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at)));
    ASN1_STRING *name = length >= 0 ? ASN1_STRING_new() : NULL;
    if (name && ASN1_STRING_set(name, text, length))
        add_name(names, "CN:", name);
    ASN1_STRING_free(name);
    OPENSSL_free(text);
}

static void add_other_names(struct names *names, const X509 *certificate) {
    GENERAL_NAMES *others = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
    for (int i = 0; others && i < sk_GENERAL_NAME_num(others); i++) {
        const GENERAL_NAME *name = sk_GENERAL_NAME_value(others, i);
        if (name->type == GEN_DNS)
            add_name(names, "DNS:", name->d.dNSName);
        else if (name->type == GEN_URI)
            add_name(names, "URI:", name->d.uniformResourceIdentifier);
    }
    GENERAL_NAMES_free(others);
}

int pn_tls_names(const struct pn_tls *tls, char *text, uint64_t size) {
    struct names names = {.text = text, .size = size, .whole = true};
    *text = 0;
    if (*tls->psk) {
        snprintf(text, size, "PSK:%s\n", tls->psk);
        return 1;
    }
    X509 *certificate = SSL_get1_peer_certificate(tls->ssl);
    if (!certificate)
        return 0;
    add_common_name(&names, certificate);
    add_other_names(&names, certificate);
    X509_free(certificate);
    ERR_clear_error();
    return names.whole;
}

const char *pn_tls_cipher(const struct pn_tls *tls) { return SSL_get_cipher_name(tls->ssl); }
