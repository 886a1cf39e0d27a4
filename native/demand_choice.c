/* Whether pages that threads wait for come compressed. A demand lane decides that by how long the
 * pages take.
 *
 * One page at a time keeps no link full, so it does not tell what a byte takes on the link. But
 * that is not the question: a compressed page is there sooner or it is not, and the destination
 * sees which. So the lane tries, with a block of pages, and stays with what was better by a tenth.
 * The cost is bounded: compressing and decompressing a page take 10 us, nothing is tried where an
 * uncompressed page takes less than 60 us, and after each trial that shows nothing, the next one is
 * twice as far away.
 *
 * Blocks follow each other; the two ways do not alternate page by page: where many pages are in
 * flight, each waits for those before it.
 */
#include "pagenet.h"

enum {
    /* Pages at the start of a block that do not count: they waited for those asked for before, or
     * their threads came back all at once. */
    SETTLE = 32,
    SAMPLES = sizeof((struct pn_demand_choice *)0)->samples / sizeof(uint64_t),
    /* The fastest samples: the others waited for a processor. */
    COUNTED = SAMPLES * 3 / 4,
    /* Pages: what was found in the first moments, or while the machine was busy, is soon looked at
     * again. */
    FIRST_PAUSE = 256,
    MOST_PAUSE = 65536,
    /* For 4 KiB, of a huge page too. Less is loopback, or a fast network, where nothing is to be
     * gained. */
    WORTH_NS = 60000,
};
#define BETTER 0.9

void pn_demand_choice_init(struct pn_demand_choice *choice) {
    *choice = (struct pn_demand_choice){.pause = FIRST_PAUSE};
}

int pn_demand_choice_packs(const struct pn_demand_choice *choice) { return choice->packs; }

/* The mean of the block's fastest samples, in ns. */
static double mean(struct pn_demand_choice *choice) {
    uint64_t *samples = choice->samples, sum = 0;
    for (int i = 1; i < SAMPLES; i++)
        for (int at = i; at && samples[at] < samples[at - 1]; at--) {
            uint64_t sample = samples[at];
            samples[at] = samples[at - 1];
            samples[at - 1] = sample;
        }
    for (int i = 0; i < COUNTED; i++)
        sum += samples[i];
    return (double)sum / COUNTED;
}

static void change(struct pn_demand_choice *choice) {
    choice->packs = !choice->packs;
    choice->settled = 0;
}

static void judge_trial(struct pn_demand_choice *choice, double seen) {
    choice->is_trial = 0;
    if (seen < BETTER * choice->before) {
        choice->pause = FIRST_PAUSE;
    } else {
        change(choice);
        choice->pause = choice->pause < MOST_PAUSE ? 2 * choice->pause : MOST_PAUSE;
    }
    choice->left = choice->pause;
}

static void judge(struct pn_demand_choice *choice, double seen) {
    choice->left -= choice->left < SAMPLES ? choice->left : SAMPLES;
    if (choice->left || (!choice->packs && seen < WORTH_NS))
        return;
    choice->is_trial = 1;
    choice->before = seen;
    change(choice);
}

void pn_demand_choice_came(struct pn_demand_choice *choice, int packs, uint64_t ns) {
    /* It was asked for before the last change, or just after it. */
    if (packs != choice->packs || choice->settled++ < SETTLE)
        return;
    choice->samples[choice->count++] = ns;
    if (choice->count < SAMPLES)
        return;
    choice->count = 0;
    if (choice->is_trial)
        judge_trial(choice, mean(choice));
    else
        judge(choice, mean(choice));
}
