/* An owner in the manner of Firecracker: a guest's memory in two regions, which it hands over with
 * its userfaultfd and then uses at once. Any VMM in C can do the same.
 *
 *     cc -o firecracker_owner firecracker_owner.c && ./firecracker_owner /run/owner.sock SIZE
 *
 * SIZE is the source's, in bytes. It adds up all bytes of its memory, gives up one page, as a
 * balloon does, and prints the sum and what that page holds then, which is 0.
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

#define PAGE 4096ul
#define REGIONS 2 /* below and above the hole that a PC has for its devices */

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

/* EVENT_REMOVE: the destination has to know which pages are given up, and reads as zeros. */
static int open_userfaultfd(void) {
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE};
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
        fail("userfaultfd");
    return uffd;
}

static unsigned char *map_region(int uffd, unsigned long size) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct uffdio_register range = {
        .range = {(uintptr_t)memory, size},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    if (memory == MAP_FAILED || ioctl(uffd, UFFDIO_REGISTER, &range))
        fail("the guest's memory");
    return memory;
}

static int describe(char *text, size_t room, unsigned char *const memory[], unsigned long size) {
    int length = 0;
    for (unsigned long i = 0; i < REGIONS; i++)
        length +=
            snprintf(text + length, room - (size_t)length,
                     "%s{\"base_host_virt_addr\": %lu, \"size\": %lu, \"offset\": %lu,"
                     " \"page_size\": %lu}",
                     i ? ", " : "[", (unsigned long)(uintptr_t)memory[i], size, i * size, PAGE);
    return length + snprintf(text + length, room - (size_t)length, "]");
}

/* One message: the mappings as JSON, with the userfaultfd. */
static void hand_over(int sock, int uffd, unsigned char *const memory[], unsigned long size) {
    char text[512];
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {0};
    int length = describe(text, sizeof text, memory, size);
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
    unsigned long sum = 0, size = argc == 3 ? strtoul(argv[2], NULL, 10) / REGIONS : 0;
    if (size == 0 || size % PAGE) {
        fprintf(stderr, "usage: %s SOCKET SIZE\nSIZE: a multiple of %lu\n", argv[0],
                REGIONS * PAGE);
        return 2;
    }
    int sock = connect_to(argv[1]); /* kept for as long as the memory is in use */
    int uffd = open_userfaultfd();
    unsigned char *memory[REGIONS];
    for (int i = 0; i < REGIONS; i++)
        memory[i] = map_region(uffd, size);
    hand_over(sock, uffd, memory, size);
    /* uffd stays open: without it, missing pages are zeros if the destination dies. */
    for (int i = 0; i < REGIONS; i++)
        for (unsigned long at = 0; at < size; at++)
            sum += memory[i][at];
    if (madvise(memory[0], PAGE, MADV_DONTNEED))
        fail("madvise");
    printf("%lu %d\n", sum, memory[0][0]);
    return 0;
}
