/* libibverbs, loaded at run time. */
#define _GNU_SOURCE
#include "verbs.h"
#include "pagenet.h"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>

enum {
    /* A packet that is not acknowledged is sent again after 4.096 us << TIMEOUT, 0.27 s, RETRIES
     * times: a host that is gone is noticed after 1.9 s. To rdma_rxe, seven retries mean: for
     * ever. */
    TIMEOUT = 16,
    RETRIES = 6,
};

static const char *const NAMES[] = {
    "ibv_get_device_list",
    "ibv_free_device_list",
    "ibv_get_device_name",
    "ibv_open_device",
    "ibv_close_device",
    "ibv_alloc_pd",
    "ibv_dealloc_pd",
    "ibv_reg_mr",
    "ibv_dereg_mr",
    "ibv_create_comp_channel",
    "ibv_destroy_comp_channel",
    "ibv_create_cq",
    "ibv_destroy_cq",
    "ibv_get_cq_event",
    "ibv_ack_cq_events",
    "ibv_get_async_event",
    "ibv_ack_async_event",
    "ibv_create_qp",
    "ibv_modify_qp",
    "ibv_destroy_qp",
    "ibv_wc_status_str",
};
enum { FUNCTIONS = sizeof NAMES / sizeof NAMES[0] };
_Static_assert(sizeof(struct pn_verbs) == (1 + FUNCTIONS) * sizeof(void *),
               "a name for each function");

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

struct ibv_qp *pn_verbs_make_pair(const struct pn_verbs *verbs, struct ibv_pd *pd,
                                  struct ibv_cq *queue, uint32_t room, int port, int access) {
    struct ibv_qp_init_attr attributes = {
        .send_cq = queue,
        .recv_cq = queue,
        .cap = {.max_send_wr = room, .max_recv_wr = 1, .max_send_sge = 1, .max_recv_sge = 1},
        .qp_type = IBV_QPT_RC,
    };
    struct ibv_qp *pair = verbs->create_qp(pd, &attributes);
    struct ibv_qp_attr start = {
        .qp_state = IBV_QPS_INIT, .port_num = (uint8_t)port, .qp_access_flags = (unsigned)access};
    int error = !pair ? 0
                      : verbs->modify_qp(pair, &start,
                                         IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT |
                                             IBV_QP_ACCESS_FLAGS);
    if (!error)
        return pair;
    verbs->destroy_qp(pair);
    errno = error;
    return NULL;
}

int pn_verbs_join_pair(const struct pn_verbs *verbs, struct ibv_qp *pair,
                       const struct pn_verbs_join *join, const struct pn_rdma_peer *peer) {
    struct ibv_qp_attr receiving = {
        .qp_state = IBV_QPS_RTR,
        .path_mtu = peer->mtu,
        .dest_qp_num = peer->number,
        .rq_psn = peer->psn,
        .qp_access_flags = (unsigned)join->access,
        .max_dest_rd_atomic = join->reads,
        .min_rnr_timer = 12,
        .ah_attr = {.dlid = peer->lid,
                    .is_global = 1,
                    .port_num = (uint8_t)join->port,
                    .hop_limit = 64,
                    .sgid_index = (uint8_t)join->gid_index},
    };
    memcpy(receiving.ah_attr.dgid, peer->gid, sizeof peer->gid);
    int error = verbs->modify_qp(pair, &receiving,
                                 IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
                                     IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
                                     IBV_QP_MIN_RNR_TIMER | IBV_QP_ACCESS_FLAGS);
    if (error)
        return -error;
    struct ibv_qp_attr sending = {
        .qp_state = IBV_QPS_RTS,
        .sq_psn = join->psn,
        .timeout = TIMEOUT,
        .retry_cnt = RETRIES,
        .rnr_retry = RETRIES,
        .max_rd_atomic = peer->reads,
    };
    return -verbs->modify_qp(pair, &sending,
                             IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                                 IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
}
