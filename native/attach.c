/* Makes descriptors inside another process, which knows nothing of pagenet: stops it, has it call
 * the kernel, and lets it go as it was (x86-64). What matters:
 *
 *   The main thread is in a system call, or anywhere else. The registers are put back in a stop of
 *   the kind that precedes the handling of signals, because only from there does the kernel restart
 *   a system call that the first stop has interrupted. From another kind of stop, the thread would
 *   see -ERESTARTNOHAND, which no program expects.
 *
 *   The thread's signals are blocked meanwhile: a handler would run on registers set here. Signals
 *   that come are pending, and are delivered when the thread is let go.
 *
 *   ptrace knows threads, not processes: one thread of this process does all of it. If that thread
 *   ends early, the kernel lets the other process go, with the registers as they are set here. A
 *   process that runs a guest must not come to that: there, the thread is a child's (pn_borrow).
 */
#define _GNU_SOURCE
#include "pagenet.h"

#include <errno.h>

#ifdef __x86_64__
#include <elf.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef PTRACE_EVENT_STOP
#define PTRACE_EVENT_STOP 128
#endif

enum {
    USER_CODE = 0x33,
    RED_ZONE = 128,
    SCRATCH = 256,
    PATIENCE_MS = 5000,
    SYSCALL_STOP = SIGTRAP | 0x80
};

struct guest {
    int pid;
    int pidfd;
    int memory; /* /proc/PID/mem */
    struct user_regs_struct before;
    uint64_t mask;
    uint64_t instruction; /* a `syscall` */
    uint64_t scratch;
    char kept[SCRATCH]; /* the bytes at scratch before */
    bool at_call;       /* in a stop at a system call, and not in the first stop */
};

/* ---- stops ---- */

/* Waits for its next stop, or its end (-ESRCH). A process that does not stop within PATIENCE_MS is
 * in some driver, and is left alone. */
static int wait_stop(const struct guest *guest, int *status) {
    struct timespec pause = {.tv_nsec = 100000};
    for (int waited = 0; waited < PATIENCE_MS * 10; waited++) {
        int got = waitpid(guest->pid, status, __WALL | WNOHANG);
        if (got < 0)
            return -errno;
        if (got > 0)
            return WIFSTOPPED(*status) ? 0 : -ESRCH;
        nanosleep(&pause, NULL);
    }
    return -ETIMEDOUT;
}

static int go_on(const struct guest *guest, int how, int signal) {
    return ptrace(how, guest->pid, NULL, (void *)(intptr_t)signal) ? -errno : 0;
}

/* Waits for the stop that PTRACE_INTERRUPT asks for. Signals that come before that stop are passed
 * on to the process. */
static int wait_interrupted(const struct guest *guest) {
    int status, error;
    while (!(error = wait_stop(guest, &status))) {
        if (status >> 16 == PTRACE_EVENT_STOP)
            /* Any other signal: it was stopped from elsewhere, as by Ctrl-Z. */
            return WSTOPSIG(status) == SIGTRAP ? 0 : -EBUSY;
        if ((error =
                 go_on(guest, PTRACE_CONT,
                       status >> 16 || WSTOPSIG(status) == SYSCALL_STOP ? 0 : WSTOPSIG(status))))
            return error;
    }
    return error;
}

static int wait_call(const struct guest *guest) {
    int status, error;
    while (!(error = wait_stop(guest, &status))) {
        if (WSTOPSIG(status) == SYSCALL_STOP)
            return 0;
        /* Only SIGSTOP is not blocked. */
        if ((error = go_on(guest, PTRACE_SYSCALL, status >> 16 ? 0 : WSTOPSIG(status))))
            return error;
    }
    return error;
}

/* ---- state ---- */

static int get_registers(const struct guest *guest, struct user_regs_struct *registers) {
    struct iovec all = {.iov_base = registers, .iov_len = sizeof *registers};
    return ptrace(PTRACE_GETREGSET, guest->pid, NT_PRSTATUS, &all) ? -errno : 0;
}

static int set_registers(const struct guest *guest, const struct user_regs_struct *registers) {
    struct iovec all = {.iov_base = (void *)(uintptr_t)registers, .iov_len = sizeof *registers};
    return ptrace(PTRACE_SETREGSET, guest->pid, NT_PRSTATUS, &all) ? -errno : 0;
}

static int set_mask(const struct guest *guest, uint64_t mask) {
    return ptrace(PTRACE_SETSIGMASK, guest->pid, sizeof mask, &mask) ? -errno : 0;
}

/* Finds a `syscall` in the vdso, which the kernel maps into every process. */
static int find_instruction(struct guest *guest) {
    static const char code[] = {0x0f, 0x05};
    char path[32], line[512], page[4096];
    uint64_t start, end;
    snprintf(path, sizeof path, "/proc/%d/maps", guest->pid);
    FILE *maps = fopen(path, "re");
    if (!maps)
        return -errno;
    while (fgets(line, sizeof line, maps) && !guest->instruction)
        if (strstr(line, "[vdso]") && sscanf(line, "%" SCNx64 "-%" SCNx64, &start, &end) == 2)
            for (; start < end && !guest->instruction; start += sizeof page) {
                ssize_t got = pread(guest->memory, page, sizeof page, (off_t)start);
                char *found = got > 0 ? memmem(page, (size_t)got, code, sizeof code) : NULL;
                guest->instruction = found ? start + (uint64_t)(found - page) : 0;
            }
    fclose(maps);
    return guest->instruction ? 0 : -ENOEXEC;
}

static int read_scratch(const struct guest *guest, char *into) {
    return pread(guest->memory, into, SCRATCH, (off_t)guest->scratch) == SCRATCH ? 0 : -EFAULT;
}

static int write_scratch(const struct guest *guest, const char *from) {
    return pwrite(guest->memory, from, SCRATCH, (off_t)guest->scratch) == SCRATCH ? 0 : -EFAULT;
}

static int look(struct guest *guest) {
    int error = get_registers(guest, &guest->before);
    if (!error && guest->before.cs != USER_CODE)
        error = -ENOEXEC;
    if (!error)
        error = find_instruction(guest);
    /* The ABI leaves the stack below the red zone free. */
    guest->scratch = (guest->before.rsp - RED_ZONE - SCRATCH) & ~15ull;
    if (!error)
        error = read_scratch(guest, guest->kept);
    if (!error && ptrace(PTRACE_GETSIGMASK, guest->pid, sizeof guest->mask, &guest->mask))
        error = -errno;
    return error;
}

/* ---- in and out ---- */

static int open_memory(const struct guest *guest) {
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/mem", guest->pid);
    int memory = open(path, O_RDWR | O_CLOEXEC);
    return memory < 0 ? -errno : memory;
}

/* The pid cannot become another process's while its process is there: the process that is traced is
 * the one behind the pidfd. */
static int check_alive(const struct guest *guest) {
    struct pollfd gone = {.fd = guest->pidfd, .events = POLLIN};
    return poll(&gone, 1, 0) ? -ESRCH : 0;
}

static int enter(struct guest *guest) {
    if (ptrace(PTRACE_SEIZE, guest->pid, NULL, (void *)PTRACE_O_TRACESYSGOOD))
        return -errno;
    int error = check_alive(guest);
    if (!error)
        error = ptrace(PTRACE_INTERRUPT, guest->pid, NULL, NULL) ? -errno : wait_interrupted(guest);
    if (!error && (guest->memory = open_memory(guest)) < 0)
        error = guest->memory;
    if (!error)
        error = look(guest);
    if (!error)
        error = set_mask(guest, ~0ull);
    if (error)
        ptrace(PTRACE_DETACH, guest->pid, NULL, NULL);
    return error;
}

static int leave(struct guest *guest) {
    int error = 0;
    if (guest->at_call) {
        error = ptrace(PTRACE_INTERRUPT, guest->pid, NULL, NULL) ? -errno
                                                                 : go_on(guest, PTRACE_CONT, 0);
        if (!error)
            error = wait_interrupted(guest);
    }
    write_scratch(guest, guest->kept);
    set_registers(guest, &guest->before);
    set_mask(guest, guest->mask);
    ptrace(PTRACE_DETACH, guest->pid, NULL, NULL);
    return error == -EBUSY ? 0 : error;
}

/* Has it make a system call. Returns the kernel's answer; *error: why the call could not be
 * made. */
static long call(struct guest *guest, int *error, long number, uint64_t first, uint64_t second,
                 uint64_t third) {
    struct user_regs_struct registers = guest->before;
    registers.rip = guest->instruction;
    registers.rax = (uint64_t)number;
    registers.orig_rax = ~0ull; /* in no system call: nothing to restart */
    registers.rdi = first;
    registers.rsi = second;
    registers.rdx = third;
    registers.r10 = 0;
    if (*error || (*error = set_registers(guest, &registers)))
        return -1;
    for (int stop = 0; stop < 2 && !*error; stop++) /* at its entry, and at its exit */
        if (!(*error = go_on(guest, PTRACE_SYSCALL, 0)) && !(*error = wait_call(guest)))
            guest->at_call = true;
    if (!*error)
        *error = get_registers(guest, &registers);
    return *error ? -1 : (long)registers.rax;
}

static uint64_t text(const struct guest *guest, int *error, const char *words) {
    char scratch[SCRATCH] = "";
    strncpy(scratch, words, sizeof scratch - 1);
    if (!*error)
        *error = write_scratch(guest, scratch);
    return guest->scratch;
}

/* ---- what is wanted ---- */

struct task {
    struct guest guest;
    const char *device;
    struct pn_planted *planted;
    bool remove;
    int result;
};

static long open_uffd(struct guest *guest, int *error, const char *device) {
    long uffd = call(guest, error, SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK, 0, 0);
    if (*error || (uffd != -EPERM && uffd != -EACCES))
        return uffd;
    uint64_t path = text(guest, error, device);
    long node = call(guest, error, SYS_openat, (uint64_t)AT_FDCWD, path, O_RDWR | O_CLOEXEC);
    if (*error || node < 0)
        return uffd;
    long opened =
        call(guest, error, SYS_ioctl, (uint64_t)node, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    call(guest, error, SYS_close, (uint64_t)node, 0, 0);
    return opened;
}

static void plant(struct task *task) {
    struct guest *guest = &task->guest;
    int error = 0;
    long uffd = open_uffd(guest, &error, task->device), map = -1;
    if (!error && uffd >= 0) {
        uint64_t name = text(guest, &error, PN_MAP_NAME);
        map = call(guest, &error, SYS_memfd_create, name, MFD_CLOEXEC | MFD_ALLOW_SEALING, 0);
        if (!error && map < 0)
            call(guest, &error, SYS_close, (uint64_t)uffd, 0, 0);
    }
    *task->planted = (struct pn_planted){
        .uffd = (int)uffd, .map = (int)map, .refused = uffd < 0 ? (int)uffd : 0};
    if (uffd >= 0 && map < 0)
        task->planted->refused = (int)map;
    task->result = error;
}

static void uproot(struct task *task) {
    int error = 0;
    call(&task->guest, &error, SYS_close, (uint64_t)task->planted->uffd, 0, 0);
    call(&task->guest, &error, SYS_close, (uint64_t)task->planted->map, 0, 0);
    task->result = error;
}

static void *run(void *argument) {
    struct task *task = argument;
    task->result = enter(&task->guest);
    if (!task->result) {
        (task->remove ? uproot : plant)(task);
        int error = leave(&task->guest);
        task->result = task->result ? task->result : error;
    }
    if (task->guest.memory >= 0)
        close(task->guest.memory);
    return NULL;
}

static int run_task(struct task *task) {
    pthread_t thread;
    int error = -pthread_create(&thread, NULL, run, task);
    if (error)
        return error;
    pthread_join(thread, NULL);
    return task->result;
}

int pn_plant(int pid, int pidfd, const char *device, struct pn_planted *planted) {
    struct task task = {
        .guest = {.pid = pid, .pidfd = pidfd, .memory = -1}, .device = device, .planted = planted};
    return run_task(&task);
}

int pn_uproot(int pid, int pidfd, const struct pn_planted *planted) {
    struct pn_planted copy = *planted;
    struct task task = {
        .guest = {.pid = pid, .pidfd = pidfd, .memory = -1}, .planted = &copy, .remove = true};
    return run_task(&task);
}

/* ---- a userfaultfd that is made there, and kept here ---- */

struct answer {
    int error;
    int refused;
};

static void send_answer(int sock, struct answer *answer, int fd) {
    union {
        char bytes[CMSG_SPACE(sizeof fd)];
        struct cmsghdr align;
    } control = {0};
    struct iovec words = {.iov_base = answer, .iov_len = sizeof *answer};
    struct msghdr message = {.msg_iov = &words, .msg_iovlen = 1};
    if (fd >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        *CMSG_FIRSTHDR(&message) = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), &fd, sizeof fd);
    }
    while (sendmsg(sock, &message, MSG_NOSIGNAL) < 0 && errno == EINTR)
        ;
}

/* Returns the descriptor, or -errno. */
static int receive_answer(int sock, int *refused) {
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct answer answer = {0};
    struct iovec words = {.iov_base = &answer, .iov_len = sizeof answer};
    struct msghdr message = {.msg_iov = &words,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    ssize_t got;
    do
        got = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    *refused = answer.refused;
    if (got != sizeof answer)
        return got < 0 ? -errno : -ECHILD; /* it was killed */
    int fd = -1;
    if (CMSG_FIRSTHDR(&message))
        memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return answer.error ? answer.error : answer.refused ? 0 : fd >= 0 ? fd : -EMFILE;
}

/* Returns the descriptor, or -1. */
static int take_new(struct guest *guest, struct answer *answer) {
    long uffd = call(guest, &answer->error, SYS_userfaultfd,
                     O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY, 0, 0);
    if (answer->error)
        return -1;
    if (uffd < 0) {
        answer->refused = (int)uffd;
        return -1;
    }
    int taken = pn_take_descriptor(guest->pidfd, (int)uffd);
    call(guest, &answer->error, SYS_close, (uint64_t)uffd, 0, 0);
    if (taken < 0 && !answer->error)
        answer->error = taken;
    return taken;
}

/* In a session of its own, what kills the group of the process that asked spares it. */
static void lend(struct guest *guest, int sock) {
    int taken = -1;
    setsid();
    struct answer answer = {.error = enter(guest)};
    if (!answer.error) {
        taken = take_new(guest, &answer);
        int error = leave(guest);
        answer.error = answer.error ? answer.error : error;
    }
    send_answer(sock, &answer, answer.error ? -1 : taken);
    _exit(0);
}

/* No handler of ours runs in the child. */
static int start_lending(struct guest *guest, const int *pair) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int child = fork();
    if (!child)
        lend(guest, pair[1]);
    child = child < 0 ? -errno : child;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return child;
}

int pn_borrow(int pid, int pidfd, int *refused) {
    struct guest guest = {.pid = pid, .pidfd = pidfd, .memory = -1};
    int pair[2];
    *refused = 0;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return -errno;
    int child = start_lending(&guest, pair);
    close(pair[1]);
    int result = child < 0 ? child : receive_answer(pair[0], refused);
    close(pair[0]);
    while (child > 0 && waitpid(child, NULL, 0) < 0 && errno == EINTR)
        ;
    return result;
}

#else

int pn_borrow(int pid, int pidfd, int *refused) { return -ENOSYS; }
int pn_plant(int pid, int pidfd, const char *device, struct pn_planted *planted) { return -ENOSYS; }
int pn_uproot(int pid, int pidfd, const struct pn_planted *planted) { return -ENOSYS; }

#endif
