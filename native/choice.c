/* Whether to compress. Each connection of a source decides by what its link and its processor
 * really do.
 *
 * A byte of a page takes raw_ns to leave uncompressed, and packed_ns compressed; the lower figure
 * wins. The one that is not in use is not known, and measuring it costs time: over loopback,
 * compressing 16 MiB takes longer than sending 64. So it is predicted first: now and then a small
 * sample is compressed and thrown away, which tells how long that takes and how much is left.
 * Compressing is tried only where the forecast promises a gain. Then the trial's figures count, and
 * not the forecast: the destination may be the slow part, or many connections may share the
 * processor.
 *
 * Times are those in which the connection is busy: it has a request to answer, or bytes that it
 * sent have not reached the peer.
 */
#include "pagenet.h"

#include <stdbool.h>

/* The shortest period that gives a steady figure: in busy time, and in bytes. */
#define PERIOD_NS 20000000u
#define PERIOD_BYTES (1u << 20)
/* A destination's window: until it has been refilled, what is measured belongs to the former
 * choice. */
#define SETTLE_BYTES (4u << 20)
/* What fits into the buffers of a new connection. */
#define FIRST_SETTLE_BYTES (1u << 20)
/* Nothing compresses and sends faster than this: no sample is taken. */
#define SAMPLE_RAW_NS 0.7
/* After a trial that did not pay; doubles each time. */
#define PAUSE_NS 200000000u
#define MAX_PAUSE_NS 60000000000u
/* Where compressing is the limit: how soon the link is tried without it. Doubles each time. */
#define PROBE_NS 250000000u
/* A forecast of less than this share of the raw time is worth a trial. */
#define PROMISE 0.9
/* A trial that took less than this share of the raw time is worth staying with. */
#define WORTHWHILE 0.95
#define HARMFUL 1.05
/* If a larger share of the time than this is spent working, the processor is the limit, and not the
 * link. */
#define LIMITED 0.85
/* Decompressing takes a third of the time that compressing does, and the gain must be worth
 * having. */
#define PROMPT_MARGIN 1.6

enum { RAW, TRIAL, PACKED };
enum { RECENT = sizeof((struct pn_choice *)0)->recent / sizeof(double), BEFORE_TRIAL = 2 };

void pn_choice_init(struct pn_choice *choice) {
    *choice = (struct pn_choice){.settle = FIRST_SETTLE_BYTES, .left = -1};
}

int pn_choice_packs(const struct pn_choice *choice) { return choice->mode != RAW; }

int pn_choice_for_demand(const struct pn_choice *choice) {
    return choice->mode == PACKED &&
           (1 - choice->left) * choice->raw_ns > PROMPT_MARGIN * choice->pack_ns;
}

int pn_choice_wants_sample(const struct pn_choice *choice, uint64_t now) {
    return choice->mode == RAW && !choice->sampled && choice->raw_ns > SAMPLE_RAW_NS &&
           now >= choice->until;
}

static void blend(double *average, double value, double weight) {
    *average += (value - *average) * weight;
}

void pn_choice_tried(struct pn_choice *choice, uint64_t size, uint64_t length, uint64_t ns) {
    double left = length ? (double)length / (double)size : 1, pack_ns = (double)ns / (double)size;
    if (choice->left < 0) {
        choice->left = left;
        choice->pack_ns = pack_ns;
    }
    double weight = choice->mode == RAW ? 1.0 / 4 : 1.0 / 16;
    blend(&choice->left, left, weight);
    blend(&choice->pack_ns, pack_ns, weight);
    choice->sampled = 1;
}

static void begin_period(struct pn_choice *choice) {
    choice->bytes = choice->wire = choice->busy = choice->work = 0;
}

static void change(struct pn_choice *choice, int mode) {
    choice->mode = mode;
    choice->settle = SETTLE_BYTES;
    choice->periods = 0;
}

static uint64_t longer(uint64_t pause, uint64_t least) {
    return pause < least ? least : pause < MAX_PAUSE_NS / 2 ? 2 * pause : MAX_PAUSE_NS;
}

/* What a byte would take compressed: the processor's time or the link's, whichever is longer, since
 * the two go on side by side. What was measured a moment ago is better than a forecast. */
static double foretold(const struct pn_choice *choice) {
    double processor = 1.25 * choice->pack_ns + choice->send_ns,
           link = choice->left * choice->raw_ns;
    if (choice->is_probing)
        return choice->packed_ns;
    return processor > link ? processor : link;
}

/* raw_ns is the lowest of the last few periods: where others want the processors too, a period
 * tells as much about them as about the link. */
static void note_raw(struct pn_choice *choice, double seen) {
    choice->recent[choice->periods++ % RECENT] = seen;
    choice->raw_ns = seen;
    for (uint64_t i = 0; i < choice->periods && i < RECENT; i++)
        if (choice->recent[i] < choice->raw_ns)
            choice->raw_ns = choice->recent[i];
}

static void judge_raw(struct pn_choice *choice, uint64_t now, double seen) {
    note_raw(choice, seen);
    choice->send_ns = (double)choice->work / (double)choice->bytes;
    if (choice->periods < BEFORE_TRIAL)
        return;
    if (choice->left >= 0 && now >= choice->until && foretold(choice) < PROMISE * choice->raw_ns)
        change(choice, TRIAL);
    choice->is_probing = 0;
}

static void judge_trial(struct pn_choice *choice, uint64_t now, double seen) {
    bool had_something_to_gain = (double)choice->wire < PROMISE * (double)choice->bytes;
    if (seen > (had_something_to_gain ? WORTHWHILE : HARMFUL) * choice->raw_ns) {
        change(choice, RAW);
        choice->pause = longer(choice->pause, PAUSE_NS);
        choice->until = now + choice->pause;
    } else if (had_something_to_gain) {
        choice->mode = PACKED;
        choice->until = now + (choice->probe = choice->probe ? choice->probe : PROBE_NS);
    }
}

static void judge_packed(struct pn_choice *choice, uint64_t now) {
    /* The link is kept full, so this is its rate. */
    if ((double)choice->work < LIMITED * (double)choice->busy) {
        choice->raw_ns = (double)choice->busy / (double)choice->wire;
        choice->pause = choice->probe = 0;
        choice->until = now + PROBE_NS;
    } else if (now >= choice->until) {
        change(choice, RAW);
        choice->probe = longer(choice->probe, PROBE_NS);
        choice->until = now;
        choice->is_probing = 1;
    }
}

static void judge(struct pn_choice *choice, uint64_t now) {
    double seen = (double)choice->busy / (double)choice->bytes;
    if (choice->mode == RAW) {
        judge_raw(choice, now, seen);
        return;
    }
    choice->packed_ns = seen;
    if (choice->left > WORTHWHILE) { /* samples will show when that changes */
        change(choice, RAW);
        choice->until = now;
    } else if (choice->mode == TRIAL) {
        judge_trial(choice, now, seen);
    } else {
        judge_packed(choice, now);
    }
}

void pn_choice_resume(struct pn_choice *choice, uint64_t now) { choice->mark = now; }

void pn_choice_answered(struct pn_choice *choice, uint64_t bytes, uint64_t wire, uint64_t began,
                        uint64_t now) {
    if (choice->mark > began || !choice->mark)
        choice->mark = began;
    choice->bytes += bytes;
    choice->wire += wire;
    choice->busy += now - choice->mark;
    choice->work += now - began;
    choice->mark = now;
    if (choice->settle) {
        choice->settle -= bytes < choice->settle ? bytes : choice->settle;
        begin_period(choice);
    } else if (choice->busy >= PERIOD_NS && choice->bytes >= PERIOD_BYTES) {
        judge(choice, now);
        begin_period(choice);
        choice->sampled = 0;
    }
}
