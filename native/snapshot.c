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

static bool run_fits(const struct pn_snapshot *snapshot, uint64_t run, uint32_t pages) {
    uint32_t frame = snapshot->run_frames[run], at = snapshot->run_at[run];
    if (frame == PN_ZERO_FRAME)
        return at == 0;
    return frame < snapshot->frames && at < snapshot->frame_pages[frame] &&
           pages <= snapshot->frame_pages[frame] - at;
}

/* Puts the run in front of those of its frame that came before. */
static void link_run(const struct pn_snapshot *snapshot, uint32_t run) {
    uint32_t frame = snapshot->run_frames[run];
    if (frame == PN_ZERO_FRAME)
        return;
    snapshot->next_runs[run] = snapshot->frame_runs[frame];
    snapshot->frame_runs[frame] = run;
}

static struct pn_snapshot_flaw flaw(int what, uint64_t at) {
    return (struct pn_snapshot_flaw){.what = what, .at = at};
}

struct pn_snapshot_flaw pn_snapshot_check(const struct pn_snapshot *snapshot) {
    for (uint64_t frame = 0; frame < snapshot->frames; frame++) {
        if (!frame_fits(snapshot, frame))
            return flaw(PN_FLAW_FRAME, frame);
        snapshot->frame_runs[frame] = PN_NO_RUN;
    }
    uint64_t first = 0;
    for (uint64_t run = 0; run < snapshot->runs; run++) {
        uint32_t pages = snapshot->run_starts[run];
        if (!pages || pages > snapshot->pages - first || !run_fits(snapshot, run, pages))
            return flaw(PN_FLAW_RUN, run);
        snapshot->run_starts[run] = (uint32_t)first;
        snapshot->next_runs[run] = PN_NO_RUN;
        link_run(snapshot, (uint32_t)run);
        first += pages;
    }
    if (first != snapshot->pages)
        return flaw(PN_FLAW_END, snapshot->runs);
    for (uint64_t frame = 0; frame < snapshot->frames; frame++)
        if (snapshot->frame_runs[frame] == PN_NO_RUN)
            return flaw(PN_FLAW_UNUSED, frame);
    return flaw(PN_FLAW_NONE, 0);
}
