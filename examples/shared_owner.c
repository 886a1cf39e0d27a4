/* An owner that shares the pages of a host cache (pagenet-pull --many): it maps the cache's file
 * privately, so that pages it does not write to are in memory once, however many owners there are.
 *
 *     cc -o shared_owner shared_owner.c && ./shared_owner /run/pages.sock
 *
 * It adds up all bytes of its memory, writes to one page, which stays its own, and prints the sum.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static int connect_to(const char *path) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    snprintf(to.sun_path, sizeof to.sun_path, "%s", path);
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (sock < 0 || connect(sock, (struct sockaddr *)&to, sizeof to))
        fail(path);
    return sock;
}

/* Asks for the file. The answer is a line of JSON, with the file's descriptor. */
static int ask_for_file(int sock, unsigned long *size, unsigned long *page_size) {
    static const char request[] = "{\"want\": \"file\"}";
    char line[256] = "";
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    struct iovec bytes = {line, sizeof line - 1};
    struct msghdr message = {.msg_iov = &bytes,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    if (write(sock, request, sizeof request - 1) < 0 ||
        recvmsg(sock, &message, MSG_CMSG_CLOEXEC) <= 0)
        fail("the request for the file");
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (!header || header->cmsg_type != SCM_RIGHTS ||
        sscanf(line, "{\"size\": %lu, \"page_size\": %lu}", size, page_size) != 2) {
        fprintf(stderr, "no file came: %s\n", line);
        exit(1);
    }
    int file;
    memcpy(&file, CMSG_DATA(header), sizeof file);
    return file;
}

/* MISSING: pages that are not in the file yet. MINOR: pages that are, and are not in our page table
 * yet. Without MINOR a page could be seen while it is being written. */
static int watch(void *memory, unsigned long size) {
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {
        .range = {(uintptr_t)memory, size},
        .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
    };
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &range))
        fail("userfaultfd");
    return uffd;
}

/* Firecracker's handshake: the mappings as JSON, with the userfaultfd. */
static void hand_over(int sock, int uffd, void *memory, unsigned long size,
                      unsigned long page_size) {
    char text[256];
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {0};
    int length = snprintf(text, sizeof text,
                          "[{\"base_host_virt_addr\": %lu, \"size\": %lu, \"offset\": 0,"
                          " \"page_size\": %lu}]",
                          (unsigned long)(uintptr_t)memory, size, page_size);
    struct iovec bytes = {text, (size_t)length};
    struct msghdr message = {.msg_iov = &bytes,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof uffd);
    memcpy(CMSG_DATA(header), &uffd, sizeof uffd);
    if (sendmsg(sock, &message, MSG_NOSIGNAL) != length)
        fail("the handshake");
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s SOCKET\n", argv[0]);
        return 2;
    }
    int sock = connect_to(argv[1]); /* kept for as long as the memory is in use */
    unsigned long size, page_size, sum = 0;
    int file = ask_for_file(sock, &size, &page_size);
    unsigned char *memory =
        mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    hand_over(sock, watch(memory, size), memory, size, page_size);
    for (unsigned long at = 0; at < size; at++)
        sum += memory[at];
    memory[0]++; /* this page is a copy from now on */
    printf("%lu\n", sum);
    return 0;
}
