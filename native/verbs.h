/* The part of libibverbs that moving pages needs, loaded at run time: pagenet is built, and runs,
 * without it.
 *
 * Layouts and numbers are those of the library's ABI, version 1.1, which has not changed since
 * 2006.
 */
#ifndef PAGENET_VERBS_H
#define PAGENET_VERBS_H
#include <stddef.h>
#include <stdint.h>

struct ibv_device;
struct ibv_pd;
struct ibv_context;
struct ibv_cq;
struct ibv_qp;

struct ibv_sge {
    uint64_t addr;
    uint32_t length;
    uint32_t lkey;
};

enum { IBV_WR_RDMA_READ = 4, IBV_SEND_SIGNALED = 2 };
struct ibv_send_wr {
    uint64_t wr_id;
    struct ibv_send_wr *next;
    struct ibv_sge *sg_list;
    int num_sge;
    int opcode;
    unsigned send_flags;
    uint32_t imm_data;
    struct {
        uint64_t remote_addr;
        uint32_t rkey;
    } rdma;
    uint64_t others[9]; /* what other operations take */
};

enum {
    IBV_WC_SUCCESS = 0,
    IBV_WC_WR_FLUSH_ERR = 5,
    IBV_WC_REM_ACCESS_ERR = 10,
    IBV_WC_RETRY_EXC_ERR = 12
};
struct ibv_wc {
    uint64_t wr_id;
    int status;
    int opcode;
    uint32_t vendor_err, byte_len, imm_data, qp_num, src_qp;
    unsigned wc_flags;
    uint16_t pkey_index, slid;
    uint8_t sl, dlid_path_bits;
};

/* The calls on the data path are the device's own functions, whose places in this table are
 * fixed. */
struct ibv_context {
    struct ibv_device *device;
    void *unused[11];
    int (*poll_cq)(struct ibv_cq *cq, int room, struct ibv_wc *wc);
    int (*req_notify_cq)(struct ibv_cq *cq, int solicited_only);
    void *unused2[12];
    int (*post_send)(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad);
    void *unused3[6];
    int cmd_fd, async_fd;
};

enum { IBV_EVENT_DEVICE_FATAL = 8 };
struct ibv_async_event {
    void *element;
    int type;
};

struct ibv_mr {
    struct ibv_context *context;
    struct ibv_pd *pd;
    void *addr;
    size_t length;
    uint32_t handle, lkey, rkey;
};

struct ibv_comp_channel {
    struct ibv_context *context;
    int fd;
};

struct ibv_qp_cap {
    uint32_t max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data;
};

enum { IBV_QPT_RC = 2 };
struct ibv_qp_init_attr {
    void *qp_context;
    struct ibv_cq *send_cq, *recv_cq;
    void *srq;
    struct ibv_qp_cap cap;
    int qp_type;
    int sq_sig_all;
};

struct ibv_qp { /* its beginning */
    struct ibv_context *context;
    void *qp_context;
    struct ibv_pd *pd;
    struct ibv_cq *send_cq, *recv_cq;
    void *srq;
    uint32_t handle, qp_num;
};

struct ibv_ah_attr {
    uint8_t dgid[16] __attribute__((aligned(8)));
    uint32_t flow_label;
    uint8_t sgid_index, hop_limit, traffic_class;
    uint16_t dlid __attribute__((aligned(8)));
    uint8_t sl, src_path_bits, static_rate, is_global, port_num;
};

enum { IBV_QPS_INIT = 1, IBV_QPS_RTR = 2, IBV_QPS_RTS = 3 };
enum {
    IBV_QP_STATE = 1 << 0,
    IBV_QP_ACCESS_FLAGS = 1 << 3,
    IBV_QP_PKEY_INDEX = 1 << 4,
    IBV_QP_PORT = 1 << 5,
    IBV_QP_AV = 1 << 7,
    IBV_QP_PATH_MTU = 1 << 8,
    IBV_QP_TIMEOUT = 1 << 9,
    IBV_QP_RETRY_CNT = 1 << 10,
    IBV_QP_RNR_RETRY = 1 << 11,
    IBV_QP_RQ_PSN = 1 << 12,
    IBV_QP_MAX_QP_RD_ATOMIC = 1 << 13,
    IBV_QP_MIN_RNR_TIMER = 1 << 15,
    IBV_QP_SQ_PSN = 1 << 16,
    IBV_QP_MAX_DEST_RD_ATOMIC = 1 << 17,
    IBV_QP_DEST_QPN = 1 << 20,
};
struct ibv_qp_attr {
    int qp_state, cur_qp_state, path_mtu, path_mig_state;
    uint32_t qkey, rq_psn, sq_psn, dest_qp_num;
    unsigned qp_access_flags;
    struct ibv_qp_cap cap;
    struct ibv_ah_attr ah_attr, alt_ah_attr;
    uint16_t pkey_index, alt_pkey_index;
    uint8_t en_sqd_async_notify, sq_draining, max_rd_atomic, max_dest_rd_atomic, min_rnr_timer,
        port_num, timeout, retry_cnt;
    uint8_t rnr_retry, alt_port_num, alt_timeout;
    uint32_t rate_limit;
};

enum { IBV_ACCESS_LOCAL_WRITE = 1, IBV_ACCESS_REMOTE_READ = 4 };

/* The library's functions. */
struct pn_verbs {
    void *library;
    struct ibv_device **(*get_device_list)(int *count);
    void (*free_device_list)(struct ibv_device **list);
    const char *(*get_device_name)(struct ibv_device *device);
    struct ibv_context *(*open_device)(struct ibv_device *device);
    int (*close_device)(struct ibv_context *context);
    struct ibv_pd *(*alloc_pd)(struct ibv_context *context);
    int (*dealloc_pd)(struct ibv_pd *pd);
    struct ibv_mr *(*reg_mr)(struct ibv_pd *pd, void *address, size_t length, int access);
    int (*dereg_mr)(struct ibv_mr *mr);
    struct ibv_comp_channel *(*create_comp_channel)(struct ibv_context *context);
    int (*destroy_comp_channel)(struct ibv_comp_channel *channel);
    struct ibv_cq *(*create_cq)(struct ibv_context *context, int room, void *data,
                                struct ibv_comp_channel *channel, int vector);
    int (*destroy_cq)(struct ibv_cq *cq);
    int (*get_cq_event)(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **data);
    void (*ack_cq_events)(struct ibv_cq *cq, unsigned count);
    int (*get_async_event)(struct ibv_context *context, struct ibv_async_event *event);
    void (*ack_async_event)(struct ibv_async_event *event);
    struct ibv_qp *(*create_qp)(struct ibv_pd *pd, struct ibv_qp_init_attr *attributes);
    int (*modify_qp)(struct ibv_qp *qp, struct ibv_qp_attr *attributes, int mask);
    int (*destroy_qp)(struct ibv_qp *qp);
    const char *(*wc_status_str)(int status);
};

/* 0, or -ENOENT: there is no such library. */
int pn_verbs_load(struct pn_verbs *verbs);
void pn_verbs_unload(struct pn_verbs *verbs);
/* NULL, with errno set, if there is no device of that name or it may not be used. */
struct ibv_context *pn_verbs_open(const struct pn_verbs *verbs, const char *device);

/* Makes a queue pair (RC) that is not joined to another, with room for `room` work requests, whose
 * completions all go to `queue`. access: what its peer may do. NULL, with errno set, if that
 * fails. */
struct ibv_qp *pn_verbs_make_pair(const struct pn_verbs *verbs, struct ibv_pd *pd,
                                  struct ibv_cq *queue, uint32_t room, int port, int access);
/* This side of a connection. reads: READs that the peer may have in flight; access: what the peer
 * may do; psn: the number of this side's first packet. */
struct pn_verbs_join {
    int port, gid_index;
    uint8_t reads;
    int access;
    uint32_t psn;
};
struct pn_rdma_peer;
/* 0 or -errno. */
int pn_verbs_join_pair(const struct pn_verbs *verbs, struct ibv_qp *pair,
                       const struct pn_verbs_join *join, const struct pn_rdma_peer *peer);

#endif
