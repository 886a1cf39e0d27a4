/* Work for the devices of the guest, each in a thread of its own that verifies what it has done:
 * - wl_net=1: frames go out, and the peer on the network sends them back.
 * - wl_disk=N: N blocks of 4 KiB at the beginning of the disk are read, verified and written again,
 *   past the page cache.
 * - wl_screen=1: a picture of 640x480. Its upper half stays; rows of the lower half are drawn again
 *   all the time.
 * - wl_churn=N: N MiB of memory are allocated, written, verified and given back, over and over.
 *
 * The drivers are modules, in the initrd as /modules/0, 1... in the order in which they must be
 * loaded. */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { BAD_LINES = 20, PAUSE_US = 2000, BUFFERS = 256, PAGES_PER_MIB = 256 };
enum { ETHERTYPE_EXPERIMENT = 0x88b5, FRAME_WORDS = 180, ANSWER_MS = 20 };
enum { WIDTH = 640, HEIGHT = 480, ROW_WORDS = WIDTH / 2 };
enum {
    VGA_INDEX = 0x1ce,
    VGA_DATA = 0x1cf,
    VGA_XRES = 1,
    VGA_YRES = 2,
    VGA_DEPTH = 3,
    VGA_ENABLE = 4,
    VGA_LINEAR = 0x41
};

struct frame {
    struct ethhdr header;
    uint16_t unused;
    uint64_t seq, words[FRAME_WORDS];
};

struct device_work device_work;

static void wrong(const char *what, uint64_t number) {
    if (device_work.bad++ < BAD_LINES)
        say("BAD %s=%" PRIu64 "\n", what, number);
}

static uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static void load_modules(void) {
    char path[32];
    for (unsigned number = 0;; number++) {
        snprintf(path, sizeof path, "/modules/%u", number);
        int fd = open(path, O_RDONLY);
        if (fd < 0)
            return;
        if (syscall(SYS_finit_module, fd, "", 0))
            fail(path);
        close(fd);
    }
}

/* Opens the file once it exists: a driver finds its device some time after it was loaded. */
static int open_soon(const char *path, int flags) {
    for (unsigned tries = 0; tries < 200; tries++) {
        int fd = open(path, flags);
        if (fd >= 0)
            return fd;
        usleep(20000);
    }
    fail(path);
}

/* ---- the disk ---- */

static _Noreturn void *use_disk(void *unused) {
    (void)unused;
    uint64_t blocks = option("wl_disk", 0), random = 1, turn = 0;
    uint64_t *counters = calloc(blocks, sizeof *counters);
    struct page *buffers =
        memory(BUFFERS * PAGE); /* many: some have not come yet when the device writes to them */
    int fd = open_soon("/dev/vda", O_RDWR | O_DIRECT);
    for (uint64_t index = 0; index < blocks; index++) {
        write_page(buffers, index, 0);
        if (pwrite(fd, buffers, PAGE, index * PAGE) != PAGE)
            fail("write to the disk");
    }
    for (;; usleep(PAUSE_US)) {
        uint64_t index = next_random(&random) % blocks;
        struct page *in = &buffers[turn++ % BUFFERS], *out = &buffers[turn++ % BUFFERS];
        if (pread(fd, in, PAGE, index * PAGE) != PAGE)
            fail("read from the disk");
        if (!is_right(in, index, counters[index]))
            wrong("block", index);
        write_page(out, index, ++counters[index]);
        if (pwrite(fd, out, PAGE, index * PAGE) != PAGE)
            fail("write to the disk");
        device_work.blocks++;
    }
}

/* ---- the network ---- */

static int open_network(struct sockaddr_ll *address) {
    struct ifreq request = {.ifr_name = "eth0"};
    int fd = socket(AF_PACKET, SOCK_RAW, htons(ETHERTYPE_EXPERIMENT));
    for (unsigned tries = 0; ioctl(fd, SIOCGIFINDEX, &request); tries++) {
        if (tries == 200)
            fail("eth0");
        usleep(20000);
    }
    *address = (struct sockaddr_ll){.sll_family = AF_PACKET,
                                    .sll_protocol = htons(ETHERTYPE_EXPERIMENT),
                                    .sll_ifindex = request.ifr_ifindex};
    request.ifr_flags = IFF_UP;
    if (ioctl(fd, SIOCSIFFLAGS, &request) || bind(fd, (struct sockaddr *)address, sizeof *address))
        fail("eth0");
    return fd;
}

static void fill_frame(struct frame *frame, uint64_t seq) {
    memset(frame->header.h_dest, 0xff, ETH_ALEN);
    memset(frame->header.h_source, 0x52, ETH_ALEN);
    frame->header.h_proto = htons(ETHERTYPE_EXPERIMENT);
    frame->unused = 0;
    frame->seq = seq;
    for (unsigned i = 0; i < FRAME_WORDS; i++)
        frame->words[i] = seed(seq, i);
}

static void take_frame(const struct frame *frame, size_t length, uint64_t sent) {
    struct frame expected;
    fill_frame(&expected, frame->seq);
    if (length < sizeof *frame || frame->seq > sent ||
        memcmp(frame->words, expected.words, sizeof expected.words))
        wrong("frame", frame->seq);
    device_work.frames++;
}

/* Frames get lost when the machine moves, as on any network; those that come must be right. */
static _Noreturn void *use_network(void *unused) {
    (void)unused;
    struct sockaddr_ll address;
    int fd = open_network(&address);
    for (uint64_t seq = 0;; seq++) {
        struct frame frame;
        fill_frame(&frame, seq);
        send(fd, &frame, sizeof frame, 0);
        struct pollfd wanted = {.fd = fd, .events = POLLIN};
        while (poll(&wanted, 1, ANSWER_MS) > 0) {
            ssize_t length = recv(fd, &frame, sizeof frame, MSG_DONTWAIT);
            if (length > 0)
                take_frame(&frame, length, seq);
            if (length > 0 && frame.seq == seq)
                break;
        }
        usleep(PAUSE_US);
    }
}

/* ---- the screen ---- */

static bool is_display(const char *directory) {
    char path[128], class[16] = "";
    snprintf(path, sizeof path, "%s/class", directory);
    int fd = open(path, O_RDONLY);
    bool is = fd >= 0 && read(fd, class, sizeof class - 1) > 0 && !strncmp(class, "0x0300", 6);
    close(fd);
    return is;
}

/* The first region of the display's PCI device is its memory. */
static uint64_t *map_screen(void) {
    glob_t found;
    char path[128] = "no display";
    if (!glob("/sys/bus/pci/devices/*", 0, NULL, &found))
        for (size_t i = 0; i < found.gl_pathc; i++)
            if (is_display(found.gl_pathv[i]))
                snprintf(path, sizeof path, "%s/resource0", found.gl_pathv[i]);
    int fd = open(path, O_RDWR);
    void *pixels = mmap(NULL, WIDTH * HEIGHT * 4, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd < 0 || pixels == MAP_FAILED)
        fail(path);
    return pixels;
}

static void set_vga(unsigned index, unsigned value) {
    outw(index, VGA_INDEX);
    outw(value, VGA_DATA);
}

static void set_mode(void) {
    if (iopl(3))
        fail("iopl");
    set_vga(VGA_ENABLE, 0);
    set_vga(VGA_XRES, WIDTH);
    set_vga(VGA_YRES, HEIGHT);
    set_vga(VGA_DEPTH, 32);
    set_vga(VGA_ENABLE, VGA_LINEAR);
}

static void draw_row(uint64_t *pixels, uint64_t row, uint64_t counter) {
    for (unsigned i = 0; i < ROW_WORDS; i++)
        pixels[row * ROW_WORDS + i] = seed(row * ROW_WORDS + i, counter);
}

static void verify_row(const uint64_t *pixels, uint64_t row, uint64_t counter) {
    for (unsigned i = 0; i < ROW_WORDS; i++)
        if (pixels[row * ROW_WORDS + i] != seed(row * ROW_WORDS + i, counter))
            return wrong("row", row);
}

static _Noreturn void *use_screen(void *unused) {
    (void)unused;
    static uint64_t counters[HEIGHT], random = 1;
    uint64_t *pixels = map_screen();
    set_mode();
    for (unsigned row = 0; row < HEIGHT; row++)
        draw_row(pixels, row, 0);
    for (;; usleep(PAUSE_US)) {
        uint64_t row = next_random(&random) % HEIGHT;
        verify_row(pixels, row, counters[row]);
        if (row >= HEIGHT / 2)
            draw_row(pixels, row, ++counters[row]);
        device_work.rows++;
    }
}

/* ---- memory that comes and goes ---- */

static _Noreturn void *use_memory(void *unused) {
    (void)unused;
    uint64_t count = option("wl_churn", 0) * PAGES_PER_MIB;
    for (uint64_t round = 0;; round++) {
        struct page *pages = memory(count * PAGE);
        for (uint64_t index = 0; index < count; index++) {
            if (pages[index].magic || pages[index].words[WORDS - 1])
                wrong("fresh", index);
            write_page(&pages[index], index, round);
        }
        for (uint64_t index = 0; index < count; index++)
            if (!is_right(&pages[index], index, round))
                wrong("churned", index);
        munmap(pages, count * PAGE);
        device_work.rounds++;
    }
}

static void start(void *(*work)(void *)) {
    pthread_t thread;
    if ((errno = pthread_create(&thread, NULL, work, NULL)))
        fail("thread");
}

bool start_devices(void) {
    bool disk = option("wl_disk", 0), network = option("wl_net", 0),
         screen = option("wl_screen", 0);
    bool churn = option("wl_churn", 0);
    if (!disk && !network && !screen && !churn)
        return false;
    load_modules();
    if (mount("dev", "/dev", "devtmpfs", 0, NULL) || mount("sys", "/sys", "sysfs", 0, NULL))
        fail("mount");
    if (disk)
        start(use_disk);
    if (network)
        start(use_network);
    if (screen)
        start(use_screen);
    if (churn)
        start(use_memory);
    return true;
}
