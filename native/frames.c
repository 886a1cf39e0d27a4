/* A snapshot's frames, unpacked into a file that is laid out as the memory is, each when a page of
 * it is first wanted.
 *
 * All pages of a frame are placed at once, wherever they belong, so each frame is read and unpacked
 * once, in whatever order pages are wanted. In a snapshot of many layers, pages side by side may be
 * of hundreds of frames: were there only a cache of unpacked frames, each page could cost a frame.
 *
 * Nothing is mapped, as somebody may truncate or change the objects meanwhile: a read fails then,
 * or the checksum does. */
#define _GNU_SOURCE
#include "pagenet.h"
#include "wire.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PAGE = 4096, CHECKSUM = 8, NAME = 64 };
enum { ABSENT, COMING, THERE }; /* a frame */

/* One thread's room for one frame. Fresh memory costs as much as unpacking into it: it is kept. */
struct desk {
    struct desk *next;
    uint8_t stored[PN_MAX_LZ4_BYTES + CHECKSUM];
    uint8_t pages[PN_MAX_LZ4_BYTES];
};

struct pn_frames {
    struct pn_snapshot index;
    const uint8_t *names;
    int objects, file;
    char *name, *place;
    pthread_mutex_t lock; /* what follows, but `states` may be read without */
    pthread_cond_t came;
    _Atomic uint8_t *states;
    struct desk *desks;
};

struct pn_frames *pn_frames_new(const struct pn_snapshot *snapshot, const uint8_t *names,
                                int objects, int file, const char *name, const char *place) {
    struct pn_frames *frames = calloc(1, sizeof *frames);
    if (!frames)
        return NULL;
    frames->index = *snapshot;
    frames->names = names;
    frames->objects = objects;
    frames->file = file;
    frames->name = strdup(name);
    frames->place = strdup(place);
    frames->states = calloc(snapshot->frames + 1, sizeof *frames->states);
    pthread_mutex_init(&frames->lock, NULL);
    pthread_cond_init(&frames->came, NULL);
    if (frames->name && frames->place && frames->states)
        return frames;
    pn_frames_free(frames);
    return NULL;
}

void pn_frames_free(struct pn_frames *frames) {
    for (struct desk *desk = frames->desks, *next; desk; desk = next) {
        next = desk->next;
        free(desk);
    }
    pthread_cond_destroy(&frames->came);
    pthread_mutex_destroy(&frames->lock);
    free((void *)frames->states);
    free(frames->name);
    free(frames->place);
    free(frames);
}

int pn_frames_are_brought(const struct pn_frames *frames) { return frames->objects < 0; }

/* ---- the runs of a stretch of memory ---- */

static uint64_t run_of(const struct pn_snapshot *index, uint64_t page) {
    uint64_t low = 0, high = index->runs;
    while (high - low > 1) {
        uint64_t middle = (low + high) / 2;
        *(index->run_starts[middle] <= page ? &low : &high) = middle;
    }
    return low;
}

static uint64_t end_of_run(const struct pn_snapshot *index, uint64_t run) {
    return run + 1 < index->runs ? index->run_starts[run + 1] : index->pages;
}

static bool is_there(const struct pn_frames *frames, uint32_t frame) {
    return frame == PN_ZERO_FRAME ||
           atomic_load_explicit(&frames->states[frame], memory_order_acquire) == THERE;
}

/* Goes over the runs of a stretch of memory. */
struct walk {
    const struct pn_snapshot *index;
    uint64_t run, end; /* end: a page */
};

static struct walk walk_over(const struct pn_frames *frames, uint64_t offset, uint64_t size) {
    return (struct walk){&frames->index, run_of(&frames->index, offset / PAGE),
                         (offset + size + PAGE - 1) / PAGE};
}

static bool next_frame(struct walk *walk, uint32_t *frame) {
    if (walk->run >= walk->index->runs || walk->index->run_starts[walk->run] >= walk->end)
        return false;
    *frame = walk->index->run_frames[walk->run++];
    return true;
}

int pn_frames_are_there(const struct pn_frames *frames, uint64_t offset, uint64_t size) {
    uint32_t frame;
    for (struct walk walk = walk_over(frames, offset, size); next_frame(&walk, &frame);)
        if (!is_there(frames, frame))
            return 0;
    return 1;
}

int pn_frames_are_zero(const struct pn_frames *frames, uint64_t offset, uint64_t size) {
    uint32_t frame;
    for (struct walk walk = walk_over(frames, offset, size); next_frame(&walk, &frame);)
        if (frame != PN_ZERO_FRAME)
            return 0;
    return 1;
}

int pn_frames_lacking(const struct pn_frames *frames, uint64_t offset, uint64_t size,
                      uint32_t *numbers, int room, uint64_t *end) {
    uint32_t frame;
    int count = 0;
    *end = offset + size;
    for (struct walk walk = walk_over(frames, offset, size); next_frame(&walk, &frame);) {
        if (is_there(frames, frame) || (count && numbers[count - 1] == frame))
            continue;
        if (count == room) {
            *end = (uint64_t)frames->index.run_starts[walk.run - 1] * PAGE;
            break;
        }
        numbers[count++] = frame;
    }
    return count;
}

/* ---- one frame ---- */

/* Where the reason of a failure goes. */
struct reason {
    char *text;
    int room;
};

static int failed(const struct pn_frames *frames, const struct reason *reason, const char *format,
                  ...) {
    char why[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why, sizeof why, format, arguments);
    va_end(arguments);
    snprintf(reason->text, (size_t)reason->room, "snapshot %.512s cannot be read: %s", frames->name,
             why);
    return -1;
}

static int no_room(const struct pn_frames *frames, const struct reason *reason, int error) {
    return failed(frames, reason, "no room for its pages in %.128s (TMPDIR): %s", frames->place,
                  strerror(error));
}

static struct desk *take_desk(struct pn_frames *frames) {
    pthread_mutex_lock(&frames->lock);
    struct desk *desk = frames->desks;
    if (desk)
        frames->desks = desk->next;
    pthread_mutex_unlock(&frames->lock);
    return desk ? desk : malloc(sizeof *desk);
}

static void give_back(struct pn_frames *frames, struct desk *desk) {
    pthread_mutex_lock(&frames->lock);
    desk->next = frames->desks;
    frames->desks = desk;
    pthread_mutex_unlock(&frames->lock);
}

static const uint8_t *name_of(const struct pn_frames *frames, uint64_t frame) {
    return frames->names + (uint64_t)frames->index.frame_objects[frame] * NAME;
}

static int read_stored(const struct pn_frames *frames, uint64_t frame, int fd, uint64_t at,
                       uint8_t *into, const struct reason *reason) {
    for (size_t size = frames->index.frame_lengths[frame]; size;) {
        ssize_t got = pread(fd, into, size, (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return failed(frames, reason, "object %.64s: %s", name_of(frames, frame),
                          strerror(errno));
        if (got == 0)
            return failed(frames, reason, "object %.64s ends at byte %llu", name_of(frames, frame),
                          (unsigned long long)at);
        into += got;
        at += (uint64_t)got;
        size -= (size_t)got;
    }
    return 0;
}

/* The pages of a frame, or NULL if the bytes are not what was written. */
static const uint8_t *unpack(const struct pn_snapshot *index, uint64_t frame, struct desk *desk) {
    uint64_t length = index->frame_lengths[frame],
             size = (uint64_t)index->frame_pages[frame] * PAGE;
    uint64_t sum;
    if (length != size + CHECKSUM)
        return pn_unpack(desk->stored, length, desk->pages, size) ? NULL : desk->pages;
    memcpy(&sum, desk->stored, sizeof sum);
    return pn_checksum(desk->stored + CHECKSUM, size) == sum ? desk->stored + CHECKSUM : NULL;
}

static int write_all(int fd, const uint8_t *from, uint64_t size, uint64_t at) {
    while (size) {
        ssize_t put = pwrite(fd, from, size, (off_t)at);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return put ? -errno : -ENOSPC;
        from += put;
        at += (uint64_t)put;
        size -= (uint64_t)put;
    }
    return 0;
}

/* Writes all pages of a frame where they belong. */
static int scatter(const struct pn_frames *frames, uint64_t frame, const uint8_t *pages) {
    const struct pn_snapshot *index = &frames->index;
    int error = 0;
    for (uint32_t run = index->frame_runs[frame]; run != PN_NO_RUN && !error;
         run = index->next_runs[run]) {
        uint64_t first = index->run_starts[run], count = end_of_run(index, run) - first;
        const uint8_t *from = pages + (uint64_t)index->run_at[run] * PAGE;
        error = write_all(frames->file, from, count * PAGE, first * PAGE);
    }
    return error;
}

static int put_frame(struct pn_frames *frames, uint64_t frame, int fd, uint64_t at,
                     const struct reason *reason) {
    struct desk *desk = take_desk(frames);
    if (!desk)
        return failed(frames, reason, "no memory");
    int result = read_stored(frames, frame, fd, at, desk->stored, reason), error;
    const uint8_t *pages = result ? NULL : unpack(&frames->index, frame, desk);
    if (!result && !pages)
        result = failed(frames, reason,
                        "bytes %llu to %llu of object %.64s are not what was "
                        "written",
                        (unsigned long long)frames->index.frame_offsets[frame],
                        (unsigned long long)(frames->index.frame_offsets[frame] +
                                             frames->index.frame_lengths[frame]),
                        name_of(frames, frame));
    if (!result && (error = scatter(frames, frame, pages)))
        result = no_room(frames, reason, -error);
    give_back(frames, desk);
    return result;
}

/* Whether it is for the caller to bring the frame; if another does, waits until it has. */
static bool begin(struct pn_frames *frames, uint64_t frame) {
    pthread_mutex_lock(&frames->lock);
    while (frames->states[frame] == COMING)
        pthread_cond_wait(&frames->came, &frames->lock);
    bool ours = frames->states[frame] == ABSENT;
    if (ours)
        frames->states[frame] = COMING;
    pthread_mutex_unlock(&frames->lock);
    return ours;
}

static void end(struct pn_frames *frames, uint64_t frame, bool is_there) {
    pthread_mutex_lock(&frames->lock);
    frames->states[frame] = is_there ? THERE : ABSENT;
    pthread_cond_broadcast(&frames->came);
    pthread_mutex_unlock(&frames->lock);
}

int pn_frames_put(struct pn_frames *frames, uint64_t frame, const uint8_t *pages, char *text,
                  int room) {
    struct reason reason = {text, room};
    if (!begin(frames, frame))
        return 0;
    int error = scatter(frames, frame, pages);
    int result = error ? no_room(frames, &reason, -error) : 0;
    end(frames, frame, !result);
    return result;
}

int pn_frames_place(struct pn_frames *frames, uint64_t frame, int fd, uint64_t at, char *text,
                    int room) {
    struct reason reason = {text, room};
    if (!begin(frames, frame))
        return 0;
    int result = put_frame(frames, frame, fd, at, &reason);
    end(frames, frame, !result);
    return result;
}

/* ---- out of a directory ---- */

/* An object is opened for each of its frames: there may be more objects than descriptors.
 * Non-blocking: opening a FIFO would wait for its writer. */
static int open_object(const struct pn_frames *frames, uint64_t frame,
                       const struct reason *reason) {
    char name[NAME + 1] = {0};
    memcpy(name, name_of(frames, frame), NAME);
    struct stat status;
    int fd = openat(frames->objects, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        return errno == ENOENT ? failed(frames, reason, "object %s is missing", name)
                               : failed(frames, reason, "object %s: %s", name, strerror(errno));
    if (!fstat(fd, &status) && S_ISREG(status.st_mode))
        return fd;
    close(fd);
    return failed(frames, reason, "object %s: it is not a regular file", name);
}

static int fetch(struct pn_frames *frames, uint64_t frame, const struct reason *reason) {
    int fd = open_object(frames, frame, reason), result = -1;
    if (fd >= 0) {
        result = pn_frames_place(frames, frame, fd, frames->index.frame_offsets[frame],
                                 reason->text, reason->room);
        close(fd);
    }
    return result;
}

int pn_frames_need(struct pn_frames *frames, uint64_t offset, uint64_t size, char *text, int room) {
    struct reason reason = {text, room};
    uint32_t frame;
    int result = 0;
    struct walk walk = walk_over(frames, offset, size);
    while (!result && next_frame(&walk, &frame))
        if (!is_there(frames, frame))
            result = frames->objects < 0 ? failed(frames, &reason, "a frame was not brought")
                                         : fetch(frames, frame, &reason);
    return result;
}
