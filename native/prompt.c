/* Whether pages that somebody waits for come compressed: what a demand lane decides by how long they take.
 *
 * One page at a time keeps no link full, so nobody can tell from it what a byte takes there. But that is not the question: a page
 * that is compressed is there sooner, or it is not, and the destination sees which. So it tries, with a block of pages, and stays with
 * what was better by a tenth. What that costs is bounded: compressing and decompressing a page take 10 us, nothing is tried where a
 * page takes less than 60 us as it is, and whenever a trial shows nothing, the next one is twice as far away.
 *
 * Blocks follow each other, and do not alternate page by page: where many pages are on their way, each waits for those before it. */
#include "pagenet.h"

enum {
    SETTLE = 32,        /* pages that waited for those that were asked for before, and threads that came back in a bunch */
    SAMPLES = sizeof ((struct pn_prompt *)0)->samples / sizeof(uint64_t),
    COUNTED = SAMPLES * 3 / 4, /* the fastest: what the others waited for was a processor */
    FIRST_PAUSE = 256,  /* pages: what was found in the first moments, or while the machine was busy, is soon looked at again */
    MOST_PAUSE = 65536,
    WORTH_NS = 60000,   /* for 4 KiB, of a huge page too; less is loopback, or a fast network: nothing to be gained */
};
#define BETTER 0.9

void pn_prompt_init(struct pn_prompt *prompt) { *prompt = (struct pn_prompt){.pause = FIRST_PAUSE}; }

int pn_prompt_packs(const struct pn_prompt *prompt) { return prompt->packs; }

/* Of the block, in ns. */
static double mean(struct pn_prompt *prompt) {
    uint64_t *samples = prompt->samples, sum = 0;
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

static void change(struct pn_prompt *prompt) {
    prompt->packs = !prompt->packs;
    prompt->settled = 0;
}

static void judge_trial(struct pn_prompt *prompt, double seen) {
    prompt->is_trial = 0;
    if (seen < BETTER * prompt->before) {
        prompt->pause = FIRST_PAUSE;
    } else {
        change(prompt);
        prompt->pause = prompt->pause < MOST_PAUSE ? 2 * prompt->pause : MOST_PAUSE;
    }
    prompt->left = prompt->pause;
}

static void judge(struct pn_prompt *prompt, double seen) {
    prompt->left -= prompt->left < SAMPLES ? prompt->left : SAMPLES;
    if (prompt->left || (!prompt->packs && seen < WORTH_NS))
        return;
    prompt->is_trial = 1;
    prompt->before = seen;
    change(prompt);
}

void pn_prompt_came(struct pn_prompt *prompt, int packs, uint64_t ns) {
    if (packs != prompt->packs || prompt->settled++ < SETTLE) /* it was asked for before the last change, or just behind */
        return;
    prompt->samples[prompt->count++] = ns;
    if (prompt->count < SAMPLES)
        return;
    prompt->count = 0;
    if (prompt->is_trial)
        judge_trial(prompt, mean(prompt));
    else
        judge(prompt, mean(prompt));
}
