/* Preloaded (LD_PRELOAD) into a VMM that knows nothing of pagenet. When the VMM maps the files that
 * back its guest's RAM, the memory is put under a userfaultfd, and handed to pagenet by
 * Firecracker's handshake. Of the C library, only mmap is replaced. The launcher sets:
 *
 *   PAGENET_UFFD_SOCKET   the unix socket on which pagenet waits for owners
 *   PAGENET_UFFD_FILES    DEV:INO[,DEV:INO...]: the files, in order of the region's flat offsets
 *   PAGENET_UFFD_DEVICE   a userfaultfd device node to use instead of /dev/userfaultfd
 *
 * A guest whose memory is never filled reads zeros, and breaks without a message. So whatever goes
 * wrong here ends the VMM, with one line that gives the reason. The VMM keeps the userfaultfd as
 * long as it lives: if pagenet is lost, the guest waits. It also keeps the map of its pages, an
 * empty memfd that pagenet fills: the next pagenet finds there which pages have come.
 */
/* It would give mmap and mmap64 the same name; offsets have 64 bits anyway: see below. */
#undef _FILE_OFFSET_BITS
#define _GNU_SOURCE
#include "pagenet.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <unistd.h>

_Static_assert(sizeof(off_t) == 8 && sizeof(void *) == 8,
               "mmap's system call is another one on 32-bit machines");

#define DEVICE "/dev/userfaultfd"
#define EXPORTED __attribute__((visibility("default"))) /* the rest is hidden from the VMM */

enum { MAX_FILES = 64, ENTRY_ROOM = 160, PATIENCE_S = 5, UNSUPPORTED = 7 };

/* All but the first two are 0 until the file is mapped. */
struct file {
    uint64_t device, inode;
    uint64_t size, address, length, offset, page_size;
};

/* The lock guards everything below but `idle`. idle: nothing is left to do, ever. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_bool idle;
static struct file files[MAX_FILES];
static size_t file_count, mapped_count;
static const char *socket_path;
static int uffd = -1;

__attribute__((noreturn, format(printf, 1, 2))) static void give_up(const char *format, ...) {
    char line[1024] = "pagenet: ";
    size_t start = strlen(line), room = sizeof line - start - 1;
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line + start, room, format, arguments);
    va_end(arguments);
    size_t end = start + ((size_t)length < room ? (size_t)length : room - 1);
    line[end] = '\n';
    ssize_t unheeded = write(STDERR_FILENO, line, end + 1);
    (void)unheeded;
    _exit(UNSUPPORTED);
}

/* ---- which files ---- */

static struct file *find_file(uint64_t device, uint64_t inode) {
    for (size_t i = 0; i < file_count; i++)
        if (files[i].device == device && files[i].inode == inode)
            return &files[i];
    return NULL;
}

/* Returns where the number ends, or NULL if `end` does not follow it. */
static const char *read_number(const char *at, char end, uint64_t *number) {
    char *past;
    if (!isdigit((unsigned char)*at))
        return NULL; /* strtoull would take signs and spaces */
    errno = 0;
    *number = strtoull(at, &past, 10);
    return !errno && *past == end ? past : NULL;
}

/* Reads an entry of the list. Returns where it ends, or NULL: it is wrong, or one too many. */
static const char *read_file(const char *at) {
    struct file file = {0};
    const char *past = read_number(at, ':', &file.device);
    if (!past)
        return NULL;
    at = past + 1;
    if (!(past = read_number(at, ',', &file.inode)))
        past = read_number(at, '\0', &file.inode);
    if (!past || file_count == MAX_FILES || find_file(file.device, file.inode))
        return NULL;
    files[file_count++] = file;
    return past;
}

static void read_environment(void) {
    const char *list = getenv("PAGENET_UFFD_FILES"), *at = list;
    socket_path = getenv("PAGENET_UFFD_SOCKET");
    if (!socket_path || !list) {
        atomic_store(&idle, true);
        return;
    }
    while (at && *at) {
        at = read_file(at);
        if (at && *at == ',' && !*++at)
            at = NULL; /* nothing after the comma */
    }
    if (!at || !file_count)
        give_up("PAGENET_UFFD_FILES is '%s', not up to %d different files as DEV:INO,DEV:INO...: "
                "the launcher must set it right",
                list, MAX_FILES);
}

/* The listed file behind fd that has not been mapped yet, or NULL. */
static struct file *awaited_file(int fd) {
    struct stat status;
    if (!file_count && !atomic_load(&idle))
        read_environment();
    if (atomic_load(&idle) || fstat(fd, &status))
        return NULL;
    struct file *file = find_file(status.st_dev, status.st_ino);
    if (!file || file->length)
        return NULL;
    file->size = (uint64_t)status.st_size;
    return file;
}

/* ---- userfaultfd ---- */

/* The VMM may put its own files at 0, 1 and 2 later (QEMU does with -daemonize), which would close
 * descriptors of ours there. */
static int above_stdio(int fd) {
    if (fd < 0 || fd > STDERR_FILENO)
        return fd;
    int moved = fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
    close(fd);
    return moved < 0 ? -EMFILE : moved;
}

/* Opens it not only for faults in user mode, which every user could have: KVM and the VMM's own
 * system calls touch the memory, too. */
static void open_uffd(void) {
    const char *device = getenv("PAGENET_UFFD_DEVICE");
    device = device ? device : DEVICE;
    int opened = above_stdio(pn_uffd_open(device, 0));
    if (opened == -EPERM || opened == -EACCES)
        give_up("may not use userfaultfd: run as root, give this user access to %s (setfacl -m "
                "u:%u:rw %s, of "
                "Debian's package acl), or set vm.unprivileged_userfaultfd (sysctl "
                "vm.unprivileged_userfaultfd=1)",
                device, geteuid(), device);
    if (opened < 0)
        give_up("cannot open a userfaultfd: %s: the kernel needs CONFIG_USERFAULTFD",
                strerror(-opened));
    uint64_t features;
    int error = pn_uffd_api(opened, UFFD_FEATURE_EVENT_REMOVE, &features);
    if (error == -EINVAL)
        error = pn_uffd_api(opened, 0, &features); /* older than 4.11 */
    if (error)
        give_up("cannot use userfaultfd: %s: the kernel is too old", strerror(-error));
    uffd = opened;
}

static int open_map(void) {
    int map = above_stdio(memfd_create(PN_MAP_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (map < 0)
        give_up("cannot make the map of guest RAM's pages: %s: lift the limit that forbids it",
                strerror(errno));
    return map;
}

static void watch(const struct file *file) {
    uint64_t ioctls;
    int error =
        pn_uffd_register(uffd, file->address, file->length, UFFDIO_REGISTER_MODE_MISSING, &ioctls);
    if (error)
        give_up("cannot watch file %" PRIu64 ":%" PRIu64
                " of guest RAM: %s: put it on tmpfs (/dev/shm) or hugetlbfs",
                file->device, file->inode, strerror(-error));
}

/* ---- the handshake ---- */

static size_t write_mappings(char *text, size_t room) {
    uint64_t flat = 0; /* where the file begins in the region */
    size_t length = 0;
    for (size_t i = 0; i < file_count; flat += files[i++].size)
        length += (size_t)snprintf(text + length, room - length,
                                   "%c{\"base_host_virt_addr\":%" PRIu64 ",\"size\":%" PRIu64
                                   ",\"offset\":%" PRIu64 ",\"page_size\":%" PRIu64 "}",
                                   i ? ',' : '[', files[i].address, files[i].length,
                                   flat + files[i].offset, files[i].page_size);
    text[length++] = ']';
    return length;
}

static int connect_to_pagenet(void) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    if (strlen(socket_path) >= sizeof to.sun_path)
        give_up("PAGENET_UFFD_SOCKET is longer than the kernel's %zu bytes: choose a shorter path",
                sizeof to.sun_path - 1);
    strcpy(to.sun_path, socket_path);
    int fd = above_stdio(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    struct timeval patience = {.tv_sec = PATIENCE_S}; /* with a listener that does not accept */
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) ||
        TEMP_FAILURE_RETRY(connect(fd, (struct sockaddr *)&to, sizeof to)))
        give_up("cannot reach pagenet on %s: %s: start pagenet first, as the same user",
                socket_path, strerror(errno));
    return fd;
}

/* The kernel sends duplicates. The socket stays open, as the uffd does: nothing here closes
 * either. */
static void hand_over(int file_fd) {
    static char text[MAX_FILES * ENTRY_ROOM];
    int fds[3] = {uffd, open_map(), file_fd};
    /* The third is the file in which flat offsets are file offsets. */
    size_t room = (file_count == 1 ? 3 : 2) * sizeof *fds;
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof fds)] = {0};
    struct iovec bytes = {.iov_base = text, .iov_len = write_mappings(text, sizeof text)};
    struct msghdr message = {.msg_iov = &bytes,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = CMSG_SPACE(room)};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(room);
    memcpy(CMSG_DATA(header), fds, room);
    ssize_t sent = TEMP_FAILURE_RETRY(sendmsg(connect_to_pagenet(), &message, MSG_NOSIGNAL));
    if (sent < 0 || (size_t)sent != bytes.iov_len)
        give_up("cannot hand guest RAM to pagenet on %s: %s: is it pagenet that listens there?",
                socket_path, sent < 0 ? strerror(errno) : "it does not read");
}

/* ---- mmap ---- */

/* Not the next mmap, found by dlsym: dlsym may map memory itself, and may not work yet at the first
 * call. */
static void *map(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    return (void *)syscall(SYS_mmap, address, length, (long)protection, (long)flags, (long)fd,
                           offset);
}

static uint64_t page_size_of(int fd) {
    struct statfs system;
    bool huge = !fstatfs(fd, &system) && system.f_type == HUGETLBFS_MAGIC;
    return huge ? (uint64_t)system.f_bsize : (uint64_t)sysconf(_SC_PAGESIZE);
}

static void note(struct file *file, const void *address, size_t length, int fd, off_t offset) {
    file->page_size = page_size_of(fd);
    file->address = (uintptr_t)address;
    file->length = (length + file->page_size - 1) & -file->page_size;
    file->offset = (uint64_t)offset;
    mapped_count++;
    if (file->offset > file->size || file->length > file->size - file->offset)
        give_up("guest RAM ends past the end of its file %" PRIu64 ":%" PRIu64
                ", which has %" PRIu64 " bytes: give the file "
                "the size of the RAM, in whole pages of %" PRIu64 " bytes",
                file->device, file->inode, file->size, file->page_size);
}

/* The mapping is inaccessible until it is watched: else MAP_POPULATE, mlockall() or another thread
 * would find holes, and fill them with zeros that look like pages that have come. It is watched at
 * once, even if other files are still to be mapped, for the same reason. */
static void *map_watched(struct file *file, void *address, size_t length, int protection, int flags,
                         int fd, off_t offset) {
    void *mapped = map(address, length, PROT_NONE, flags, fd, offset);
    if (mapped == MAP_FAILED)
        return mapped;
    note(file, mapped, length, fd, offset);
    if (uffd < 0)
        open_uffd();
    watch(file);
    if (mprotect(mapped, file->length, protection))
        give_up("cannot make guest RAM accessible: %s: lift the limit that forbids it",
                strerror(errno));
    if (mapped_count == file_count) {
        hand_over(fd);
        atomic_store(&idle, true);
    }
    return mapped;
}

static bool may_be_guest_memory(int protection, int flags, int fd) {
    bool shared = (flags & MAP_TYPE) == MAP_SHARED || (flags & MAP_TYPE) == MAP_SHARED_VALIDATE;
    return fd >= 0 && shared && !(flags & MAP_ANONYMOUS) && (protection & PROT_WRITE) &&
           !atomic_load(&idle);
}

static void *map_any(void *address, size_t length, int protection, int flags, int fd,
                     off_t offset) {
    if (!may_be_guest_memory(protection, flags, fd))
        return map(address, length, protection, flags, fd, offset);
    int before = errno;
    pthread_mutex_lock(&lock);
    struct file *file = awaited_file(fd);
    if (file && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDWR)
        file = NULL; /* the kernel will refuse it */
    void *mapped = file ? map_watched(file, address, length, protection, flags, fd, offset)
                        : map(address, length, protection, flags, fd, offset);
    pthread_mutex_unlock(&lock);
    if (mapped != MAP_FAILED)
        errno = before;
    return mapped;
}

EXPORTED void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    return map_any(address, length, protection, flags, fd, offset);
}

EXPORTED void *mmap64(void *address, size_t length, int protection, int flags, int fd,
                      off64_t offset) {
    return map_any(address, length, protection, flags, fd, offset);
}
