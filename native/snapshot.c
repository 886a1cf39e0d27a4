/* The index of a snapshot as it was read, checked, and made ready for lookups. Whoever wrote the
 * file is not trusted. */
#define _GNU_SOURCE
#include "pagenet.h"
#include "wire.h"

#include <stdbool.h>

enum { PAGE = 4096, FRAME_PAGES = PN_MAX_LZ4_BYTES / PAGE, CHECKSUM = 8 };

static bool frame_fits(const struct pn_snapshot *snapshot, uint64_t frame) {
    uint32_t object = snapshot->frame_objects[frame], length = snapshot->frame_lengths[frame];
    uint32_t pages = snapshot->frame_pages[frame];
    uint64_t offset = snapshot->frame_offsets[frame];
    if (object >= snapshot->objects || pages < 1 || pages > FRAME_PAGES)
        return false;
    if (length <= CHECKSUM || length > pages * PAGE + CHECKSUM)
        return false;
    uint64_t size = snapshot->object_sizes[object];
    return offset <= size && length <= size - offset;
}

static struct pn_snapshot_flaw flaw(int what, uint64_t at) {
    return (struct pn_snapshot_flaw){.what = what, .at = at};
}

static uint64_t mask(bool set) { return -(uint64_t)set; }

/* Turns the lengths of runs into their first pages, and links each run in front of those of its
 * frame that came before. An index may have millions, and which of them are zeros cannot be
 * foreseen: so there are masks in place of branches, and the last of `frame_runs` is for zeros. */
static struct pn_snapshot_flaw link_runs(const struct pn_snapshot *snapshot) {
    static const uint16_t none;
    uint32_t *restrict starts = snapshot->run_starts, *restrict last = snapshot->frame_runs;
    uint32_t *restrict next = snapshot->next_runs;
    const uint32_t *restrict frames = snapshot->run_frames, zeros = (uint32_t)snapshot->frames;
    const uint16_t *restrict frame_pages = zeros ? snapshot->frame_pages : &none;
    uint64_t first = 0;
    for (uint32_t run = 0; run < snapshot->runs; run++) {
        uint32_t pages = starts[run], frame = frames[run], at = snapshot->run_at[run];
        uint64_t stored = mask(frame < zeros), zero = mask((frame == PN_ZERO_FRAME) & (at == 0));
        uint64_t room = (frame_pages[frame & stored] & stored) | (snapshot->pages & zero);
        if (!pages || at + (uint64_t)pages > room || pages > snapshot->pages - first)
            return flaw(PN_FLAW_RUN, run);
        starts[run] = (uint32_t)first;
        first += pages;
        uint64_t list = (frame & stored) | (zeros & ~stored);
        next[run] = last[list];
        last[list] = run;
    }
    return flaw(first == snapshot->pages ? PN_FLAW_NONE : PN_FLAW_END, snapshot->runs);
}

struct pn_snapshot_flaw pn_snapshot_check(const struct pn_snapshot *snapshot) {
    for (uint64_t frame = 0; frame < snapshot->frames; frame++)
        if (!frame_fits(snapshot, frame))
            return flaw(PN_FLAW_FRAME, frame);
    for (uint64_t frame = 0; frame <= snapshot->frames; frame++)
        snapshot->frame_runs[frame] = PN_NO_RUN;
    struct pn_snapshot_flaw found = link_runs(snapshot);
    for (uint64_t frame = 0; frame < snapshot->frames && !found.what; frame++)
        if (snapshot->frame_runs[frame] == PN_NO_RUN)
            found = flaw(PN_FLAW_UNUSED, frame);
    return found;
}
