/* libibverbs, loaded at run time. */
#define _GNU_SOURCE
#include "verbs.h"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>

static const char *const NAMES[] = {
    "ibv_get_device_list", "ibv_free_device_list", "ibv_get_device_name", "ibv_open_device", "ibv_close_device",
    "ibv_alloc_pd", "ibv_dealloc_pd", "ibv_reg_mr", "ibv_dereg_mr", "ibv_create_comp_channel",
    "ibv_destroy_comp_channel", "ibv_create_cq", "ibv_destroy_cq", "ibv_get_cq_event", "ibv_ack_cq_events",
    "ibv_get_async_event", "ibv_ack_async_event",
    "ibv_create_qp", "ibv_modify_qp", "ibv_destroy_qp", "ibv_wc_status_str",
};
enum { FUNCTIONS = sizeof NAMES / sizeof NAMES[0] };
_Static_assert(sizeof(struct pn_verbs) == (1 + FUNCTIONS) * sizeof(void *), "a name for each function");

int pn_verbs_load(struct pn_verbs *verbs) {
    void *symbols[1 + FUNCTIONS];
    symbols[0] = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
    for (int i = 0; symbols[0] && i < FUNCTIONS; i++)
        if (!(symbols[1 + i] = dlsym(symbols[0], NAMES[i]))) {
            dlclose(symbols[0]);
            symbols[0] = NULL;
        }
    if (!symbols[0])
        return -ENOENT;
    memcpy(verbs, symbols, sizeof symbols);
    return 0;
}

void pn_verbs_unload(struct pn_verbs *verbs) {
    if (verbs->library)
        dlclose(verbs->library);
    verbs->library = NULL;
}

struct ibv_context *pn_verbs_open(const struct pn_verbs *verbs, const char *device) {
    struct ibv_device **devices = verbs->get_device_list(NULL);
    struct ibv_context *context = NULL;
    if (!devices)
        return NULL;
    errno = ENODEV;
    for (struct ibv_device **at = devices; *at && !context; at++)
        if (!strcmp(verbs->get_device_name(*at), device))
            context = verbs->open_device(*at);
    verbs->free_device_list(devices);
    return context;
}
