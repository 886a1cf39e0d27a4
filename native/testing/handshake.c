#define _GNU_SOURCE
#include "handshake.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { MOST_DESCRIPTORS = 3 };

int connect_to(const char *path) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof to.sun_path)
        return -ENAMETOOLONG;
    strcpy(to.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    if (!connect(fd, (struct sockaddr *)&to, sizeof to))
        return fd;
    int error = -errno;
    close(fd);
    return error;
}

static void attach_descriptors(struct msghdr *message, void *control, const int *fds,
                               size_t count) {
    message->msg_control = control;
    message->msg_controllen = CMSG_SPACE(count * sizeof *fds);
    struct cmsghdr *header = CMSG_FIRSTHDR(message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(count * sizeof *fds);
    memcpy(CMSG_DATA(header), fds, count * sizeof *fds);
}

int send_with(int sock, const char *text, const int *fds, size_t count) {
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(MOST_DESCRIPTORS * sizeof(int))] = {0};
    struct iovec bytes = {.iov_base = (void *)text, .iov_len = strlen(text)};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1};
    if (count > MOST_DESCRIPTORS)
        return -EINVAL;
    if (count)
        attach_descriptors(&message, control, fds, count);
    ssize_t sent = sendmsg(sock, &message, MSG_NOSIGNAL);
    if (sent < 0)
        return -errno;
    return (size_t)sent < bytes.iov_len ? -EPIPE : 0;
}

/* A descriptor that comes with a line of text, or -errno. */
static int receive_descriptor(int sock) {
    char line[256];
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    struct iovec bytes = {.iov_base = line, .iov_len = sizeof line};
    struct msghdr message = {.msg_iov = &bytes,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    ssize_t got = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
    if (got <= 0)
        return got ? -errno : -EPIPE;
    const struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (!header || header->cmsg_type != SCM_RIGHTS || line[got - 1] != '\n')
        return -EPROTO;
    int fd;
    memcpy(&fd, CMSG_DATA(header), sizeof fd);
    return fd;
}

int want_file(int sock) {
    int error = send_with(sock, "{\"want\": \"file\"}", NULL, 0);
    return error ? error : receive_descriptor(sock);
}
