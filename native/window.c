/* What to ask for around a page that a thread waits for: the one definition of it, for lanes in C
 * and in Trio.
 *
 * A fixed window is a number of pages forward and one backward. The window that adapts knows two
 * things about memory:
 *
 * - Faults follow lines: page after page, either way, or at equal steps. Each fault that continues
 *   a line doubles what is asked for ahead of it.
 * - Faults come in areas (256 KiB): what is used together lies together. How much of an area is
 *   taken at its first fault is learnt from how often an area sees a second fault. The balance is
 *   one in eight: if more areas do, more is taken; if fewer do, the window shrinks, at random
 *   access to nothing.
 *
 * A page that is in place raises no fault, so nothing tells how much of what was prefetched was
 * needed. Therefore the window learns only from the faults that it did not prevent, and shrinks
 * slowly.
 *
 * On the fault path: constant time, no locks, no allocation. Everything but `fixed` belongs to one
 * thread.
 */
#include "pagenet.h"

#include <stdbool.h>
#include <string.h>

enum {
    AREA_BYTES = 256 << 10,
    REACH_BYTES = 1 << 20, /* ahead of a fault, at most */
    MOST_STEPS = 32,       /* of a line with gaps: each step is a request of its own */
    /* Pages: faults that are nearer to each other are on a line without gaps. */
    DENSE = 64,
    SLACK = 64, /* pages of a line that may have come by other ways */
    LEVEL = 16, /* the level of a window of 2^n pages is LEVEL * n */
    FIRST_LEVEL = 3 * LEVEL,
    SECOND_FAULT = LEVEL, /* what a second fault in an area adds to the level */
    FIRST_FAULT = 2,      /* what each first fault takes off it */
};
static const int64_t MOST_STEP_BYTES = 64 << 20;

void pn_window_fix(struct pn_window *window, int fixed, uint32_t forward, uint32_t backward) {
    uint64_t setting = fixed ? 1ull << 63 | (uint64_t)forward << 32 | backward : 0;
    __atomic_store_n(&window->fixed, setting, __ATOMIC_RELAXED);
}

int pn_window_fixed(const struct pn_window *window, uint32_t *forward, uint32_t *backward) {
    uint64_t setting = __atomic_load_n(&window->fixed, __ATOMIC_RELAXED);
    *forward = (uint32_t)(setting >> 32) & 0x7fffffff;
    *backward = (uint32_t)setting;
    return setting != 0;
}

void pn_window_init(struct pn_window *window) {
    memset(window, 0, sizeof *window);
    window->level = FIRST_LEVEL;
}

/* ---- what is wanted: most faults first, then the newest; the oldest is forgotten ---- */

enum {
    RANKS = sizeof((struct pn_window *)0)->wanted / sizeof(struct pn_stack),
    WANTS = sizeof((struct pn_stack *)0)->wants / sizeof(struct pn_want),
};

/* Notes that pages are wanted. faults: seen on their line, or in their area. */
static void want(struct pn_window *window, uint32_t faults, uint64_t first, uint64_t end,
                 uint64_t page_size) {
    struct pn_stack *stack = &window->wanted[(faults < RANKS ? faults : RANKS) - 1];
    if (first >= end)
        return;
    stack->wants[stack->newest++ % WANTS] = (struct pn_want){first, end, page_size};
    if (stack->newest - stack->oldest > WANTS)
        stack->oldest = stack->newest - WANTS;
}

static uint64_t take_from(struct pn_stack *stack, struct pn_map *map, uint64_t bytes,
                          uint64_t *first) {
    while (stack->newest != stack->oldest) {
        struct pn_want *newest = &stack->wants[(stack->newest - 1) % WANTS];
        newest->first = pn_map_find(map, newest->first, newest->end, PN_MISSING);
        uint64_t left = newest->end - newest->first,
                 most = bytes > newest->page_size ? bytes / newest->page_size : 1;
        uint64_t taken =
            pn_map_claim(map, newest->first, left < most ? left : most, PN_MISSING, PN_REQUESTED);
        *first = newest->first;
        /* Another lane may have taken that page since it was found: go past it. */
        newest->first += taken || !left ? taken : 1;
        if (newest->first == newest->end)
            stack->newest--;
        if (taken)
            return taken;
    }
    return 0;
}

uint64_t pn_window_next(struct pn_window *window, struct pn_map *map, uint64_t bytes,
                        uint64_t *first) {
    uint64_t taken = 0;
    for (int rank = RANKS - 1; rank >= 0 && !taken; rank--)
        taken = take_from(&window->wanted[rank], map, bytes, first);
    return taken;
}

/* ---- lines ---- */

/* Pages that one request may name: those of a block. */
struct bounds {
    uint64_t first, end, page_size;
};

static uint64_t lesser(uint64_t one, uint64_t other) { return one < other ? one : other; }

static void want_page(struct pn_window *window, uint32_t faults, const struct bounds *bounds,
                      int64_t page) {
    if (page >= (int64_t)bounds->first && page < (int64_t)bounds->end)
        want(window, faults, (uint64_t)page, (uint64_t)page + 1, bounds->page_size);
}

static void want_ahead(struct pn_window *window, const struct pn_line *line,
                       const struct bounds *bounds) {
    int64_t page = (int64_t)line->last, steps = line->steps;
    if (line->step == 1)
        want(window, line->faults, line->last + 1,
             lesser(line->last + 1 + (uint64_t)steps, bounds->end), bounds->page_size);
    else if (line->step == -1)
        want(window, line->faults, line->last - lesser((uint64_t)steps, line->last - bounds->first),
             line->last, bounds->page_size);
    else
        for (; steps; steps--) /* the nearest last: it goes first */
            want_page(window, line->faults, bounds, page + steps * line->step);
}

static bool goes_on(const struct pn_line *line, const struct pn_map *map, int64_t distance,
                    const struct bounds *bounds) {
    if (!line->step || distance % line->step)
        return false;
    int64_t steps = distance / line->step;
    if (line->step != 1 && line->step != -1)
        return steps > 0 && steps <= line->steps + 1;
    /* On a line without gaps, the page before this one has come, or is coming. Among scattered
     * faults that is chance. */
    int64_t before = (int64_t)line->last + distance - line->step;
    return steps > 0 && steps <= line->steps + SLACK && before >= (int64_t)bounds->first &&
           before < (int64_t)bounds->end && pn_map_state(map, (uint64_t)before) != PN_MISSING;
}

static void go_on(struct pn_window *window, struct pn_line *line, uint64_t page,
                  const struct bounds *bounds) {
    bool dense = line->step == 1 || line->step == -1;
    int64_t most = (int64_t)(REACH_BYTES / bounds->page_size);
    if (!dense && most > MOST_STEPS)
        most = MOST_STEPS;
    line->steps = line->steps * 2 < most ? line->steps * 2 : most;
    line->last = page;
    line->faults++;
    line->used = ++window->clock;
    want_ahead(window, line, bounds);
}

/* The page may be the second of a line, which then gets its step, or the first of another line. */
static void begin_line(struct pn_window *window, uint64_t page, const struct bounds *bounds) {
    int64_t most = MOST_STEP_BYTES / (int64_t)bounds->page_size, nearest = most + 1;
    struct pn_line *second = NULL, *oldest = &window->lines[0];
    for (struct pn_line *line = window->lines; line < window->lines + 8; line++) {
        int64_t distance = (int64_t)(page - line->last), away = distance < 0 ? -distance : distance;
        if (line->used < oldest->used)
            oldest = line;
        if (line->used && !line->step && away && away < nearest) {
            nearest = away;
            second = line;
        }
    }
    if (second) {
        int64_t distance = (int64_t)(page - second->last);
        bool dense = nearest <= DENSE;
        second->step = dense ? (distance > 0 ? 1 : -1) : distance;
        second->steps = dense ? 8 : 1;
        second->last = page;
        second->faults = 2;
        second->used = ++window->clock;
    }
    if (oldest != second)
        *oldest = (struct pn_line){.last = page, .faults = 1, .used = ++window->clock};
}

static bool follow_line(struct pn_window *window, const struct pn_map *map, uint64_t page,
                        const struct bounds *bounds) {
    for (struct pn_line *line = window->lines; line < window->lines + 8; line++)
        if (goes_on(line, map, (int64_t)(page - line->last), bounds)) {
            go_on(window, line, page, bounds);
            return true;
        }
    begin_line(window, page, bounds);
    return false;
}

/* ---- areas ---- */

enum { AREAS = sizeof((struct pn_window *)0)->areas / sizeof(struct pn_area) };

/* Notes a fault in area `number`. The area's level then tells how many pages to take there: a power
 * of two, whose exponent it is, and `highest` at most. */
static const struct pn_area *note_area(struct pn_window *window, uint64_t number, int32_t highest) {
    struct pn_area *area = &window->areas[number % AREAS];
    bool again = area->number == number + 1;
    window->level += again ? SECOND_FAULT : -FIRST_FAULT;
    if (window->level < 0)
        window->level = 0;
    int32_t most = (highest + 2) * LEVEL; /* beyond `highest`: whole areas are taken for a while */
    if (window->level > most)
        window->level = most;
    int32_t level = window->level / LEVEL < highest ? window->level / LEVEL : highest;
    if (again && level < area->level + 2)
        level = area->level + 2 < highest ? area->level + 2 : highest;
    *area = (struct pn_area){
        .number = number + 1, .level = level, .faults = again ? area->faults + 1 : 1};
    return area;
}

/* Wants the aligned 2^level pages that the page is one of, those behind it first. */
static void want_around(struct pn_window *window, uint64_t page, const struct bounds *bounds) {
    uint64_t pages = AREA_BYTES / bounds->page_size;
    if (pages < 2)
        return;
    uint64_t at = page - bounds->first;
    int32_t highest = 63 - __builtin_clzll(pages);
    const struct pn_area *area = note_area(window, bounds->first / pages + at / pages, highest);
    uint64_t count = 1ull << area->level;
    uint64_t first = bounds->first + at / count * count;
    want(window, area->faults, first, page, bounds->page_size);
    want(window, area->faults, page + 1, lesser(first + count, bounds->end), bounds->page_size);
}

void pn_window_fault(struct pn_window *window, const struct pn_map *map, uint64_t page,
                     uint64_t first, uint64_t end, uint64_t page_size) {
    const struct bounds bounds = {first, end, page_size};
    if (!follow_line(window, map, page, &bounds))
        want_around(window, page, &bounds);
}
