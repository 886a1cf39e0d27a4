/* Looks at page bytes, and fetches them out of another process. */
#define _GNU_SOURCE
#include "pagenet.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

/* The first 8 bytes are zero, and each byte equals the one 8 before it: memcmp runs at memory
 * speed, and a page that is not zero is nearly always known by its first word. */
static bool is_zero(const char *page, uint64_t size) {
    uint64_t word;
    memcpy(&word, page, sizeof word);
    return !word && !memcmp(page, page + sizeof word, size - sizeof word);
}

uint64_t pn_zero_run(const void *buffer, uint64_t pages, uint64_t page_size, int *zero) {
    const char *page = buffer;
    *zero = is_zero(page, page_size);
    uint64_t alike = 1;
    while (alike < pages && is_zero(page + alike * page_size, page_size) == *zero)
        alike++;
    return alike;
}

/* In pieces: the page may be a huge one. */
static int is_zero_in_file(int fd, uint64_t offset, uint64_t size) {
    char piece[4096];
    for (uint64_t at = 0; at < size; at += sizeof piece) {
        ssize_t got = pread(fd, piece, sizeof piece, (off_t)(offset + at));
        if (got != (ssize_t)sizeof piece)
            return got < 0 ? -errno : -ENODATA;
        if (!is_zero(piece, sizeof piece))
            return 0;
    }
    return 1;
}

/* A page that is not zero is nearly always known by its first word, so no more of it is read:
 * copying all of the pages was most of the work of a source over RDMA. */
int64_t pn_zero_map(int fd, uint64_t offset, uint64_t pages, uint64_t page_size, uint8_t *bits) {
    int64_t zeros = 0;
    for (uint64_t i = 0; i < pages; i++, offset += page_size) {
        uint64_t word;
        ssize_t got = pread(fd, &word, sizeof word, (off_t)offset);
        if (got != (ssize_t)sizeof word)
            return got < 0 ? -errno : -ENODATA;
        int zero = word ? 0 : is_zero_in_file(fd, offset, page_size);
        if (zero < 0)
            return zero;
        bits[i / 8] |= (uint8_t)(zero << i % 8);
        zeros += zero;
    }
    return zeros;
}

int pn_read_process(int pid, uint64_t address, void *buffer, uint64_t length) {
    while (length) {
        struct iovec local = {.iov_base = buffer, .iov_len = length};
        struct iovec remote = {.iov_base = (void *)(uintptr_t)address, .iov_len = length};
        ssize_t got = process_vm_readv(pid, &local, 1, &remote, 1, 0);
        if (got <= 0)
            return got < 0 ? -errno : -EFAULT;
        buffer = (char *)buffer + got;
        address += (uint64_t)got;
        length -= (uint64_t)got;
    }
    return 0;
}

int pn_store(uint64_t to, const void *from, uint64_t length) {
    while (length) {
        struct iovec local = {.iov_base = (void *)(uintptr_t)from, .iov_len = length};
        struct iovec remote = {.iov_base = (void *)(uintptr_t)to, .iov_len = length};
        ssize_t put = process_vm_writev(getpid(), &local, 1, &remote, 1, 0);
        if (put <= 0)
            return put < 0 ? -errno : -EFAULT;
        from = (const char *)from + put;
        to += (uint64_t)put;
        length -= (uint64_t)put;
    }
    return 0;
}

void pn_copy(void *to, const void *from, uint64_t length) { memcpy(to, from, length); }

uint64_t pn_map_memory(uint64_t length, int fd, uint64_t offset, uint64_t alignment) {
    /* The pages of a file are reserved where that can be done (hugetlbfs): a lack of pages must
     * show now, and not as SIGBUS later. */
    int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED;
    /* Reserves room to find an aligned start in, puts the mapping on top of it, then gives the rest
     * back. */
    char *room = mmap(NULL, length + alignment, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return (uint64_t)(int64_t)-errno;
    char *start = (char *)(((uintptr_t)room + alignment - 1) & ~(alignment - 1));
    void *mapped =
        mmap(start, length, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, (off_t)offset);
    if (mapped == MAP_FAILED) {
        int error = -errno;
        munmap(room, length + alignment);
        return (uint64_t)(int64_t)error;
    }
    if (start > room)
        munmap(room, (size_t)(start - room));
    if (start < room + alignment)
        munmap(start + length, (size_t)(room + alignment - start));
    return (uint64_t)(uintptr_t)mapped;
}

uint64_t pn_map_file(uint64_t length, int fd, int writable) {
    void *mapped = mmap(NULL, length, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, fd, 0);
    return mapped == MAP_FAILED ? (uint64_t)(int64_t)-errno : (uint64_t)(uintptr_t)mapped;
}

void pn_unmap_memory(uint64_t address, uint64_t length) {
    munmap((void *)(uintptr_t)address, length);
}

int pn_punch(int fd, uint64_t length) {
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)length) ? -errno : 0;
}

int pn_populate(uint64_t address, uint64_t length) {
    return madvise((void *)(uintptr_t)address, length, MADV_POPULATE_WRITE) ? -errno : 0;
}

void pn_map_ahead(uint64_t address, uint64_t length) {
    madvise((void *)(uintptr_t)address, length, MADV_POPULATE_READ);
}

int pn_is_hole(int fd, uint64_t offset, uint64_t size) {
    off_t past = (off_t)(offset + size), data = lseek(fd, (off_t)offset, SEEK_DATA);
    return data >= past || (data < 0 && errno == ENXIO && lseek(fd, 0, SEEK_END) >= past);
}
