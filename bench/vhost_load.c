/* A load generator for any vhost-user-blk back-end: a whole front-end in one C11 file.
 *
 *     cc -std=c11 -O2 -o vhost_load vhost_load.c
 *     vhost_load SOCKET --rw randread --bs 4096 --iodepth 32 --seconds 5 [--poll] [--verify] ...      (--help lists all)
 *
 * It drives rings as Linux' virtio_blk does: one indirect table of header, data and status byte a request, avail.idx stored with
 * each, one kick a batch and only if avail_event asks for it, calls off while it takes what is used.  The result is one line of JSON.
 * Exit status: 0 all went well, 1 I/O errors or verify mismatches, 2 it could not run or the back-end did not do its part.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#if !defined(__linux__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a vhost-user front-end needs memfd, eventfd and a little-endian machine"
#endif

enum { RING = 128, QUEUES_MAX = 16, SECTOR = 512, PAGE = 4096, SLOT_BYTES = 128 };

/* linux/virtio_config.h, virtio_ring.h, virtio_blk.h; the vhost-user specification */
#define F_RO (1ull << 5)
#define F_FLUSH (1ull << 9)
#define F_BLK_MQ (1ull << 12)
#define F_INDIRECT_DESC (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_PROTOCOL_FEATURES (1ull << 30)
#define F_VERSION_1 (1ull << 32)
#define PF_MQ (1ull << 0)
#define PF_REPLY_ACK (1ull << 3)
#define PF_CONFIG (1ull << 9)
enum {
    GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10, GET_VRING_BASE = 11, SET_VRING_KICK = 12, SET_VRING_CALL = 13, GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16, GET_QUEUE_NUM = 17, SET_VRING_ENABLE = 18, GET_CONFIG = 24
};
enum { MSG_VERSION = 1, MSG_REPLY = 4, MSG_NEED_REPLY = 8, HEADER_BYTES = 12, PAYLOAD_MAX = 256, CONFIG_BYTES = 60 };
enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4, BLK_T_IN = 0, BLK_T_OUT = 1 };

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct avail { _Atomic uint16_t flags, idx; uint16_t ring[RING]; _Atomic uint16_t used_event; };
struct used_elem { uint32_t id, len; };
struct used { _Atomic uint16_t flags, idx; struct used_elem ring[RING]; _Atomic uint16_t avail_event; };
struct blk_header { uint32_t type, ioprio; uint64_t sector; };
struct slot { struct desc table[3]; struct blk_header header; uint8_t status; };  /* what one request needs beside its data */
_Static_assert(sizeof(struct desc) == 16 && sizeof(struct slot) <= SLOT_BYTES, "layout");
_Static_assert(offsetof(struct used, avail_event) == 4 + 8 * RING, "layout");

struct queue {
    struct desc *desc;
    struct avail *avail;
    struct used *used;
    char *slots, *data;
    uint16_t avail_idx, kicked_idx, last_used_idx;  /* this side's own copies, free running */
    unsigned in_flight;
    int kick, call;
    uint64_t start_ns[RING], block[RING];
    bool is_free[RING], is_write[RING];
};

static struct {
    const char *socket, *rw;
    bool random, write, poll, verify, stay;
    unsigned bs, iodepth, queues;
    double seconds, timeout_s;
    uint64_t ios, size, seed;
} opt = {.rw = "randread", .random = true, .bs = 4096, .iodepth = 32, .queues = 1, .timeout_s = 10, .seed = 1};

static int sock = -1;
static bool reply_ack;
static char *memory;
static size_t memory_bytes;
static struct queue queues[QUEUES_MAX];
static uint64_t blocks, next_block, random_state, timeout_ns, progress_ns;  /* progress: when something was used last */
static uint64_t kicks, calls, errors, mismatches, done;
static uint32_t *written;  /* verify: the counter that each block was last written with, 0 for never */
static uint8_t *busy;      /* verify: a block has at most one request in flight, so what it must hold is known */
static uint32_t counter;

static _Noreturn void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("vhost_load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(2);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* -- vhost-user messages -------------------------------------------------------------------------------------------------- */

static void receive(void *to, size_t length, const char *what)
{
    for (size_t have = 0; have < length;) {
        ssize_t n = recv(sock, (char *)to + have, length - have, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            fail("the back-end does not answer %s within %g s", what, opt.timeout_s);
        if (n <= 0)
            fail("the back-end ended the connection at %s%s%s", what, n ? ": " : "", n ? strerror(errno) : "");
        have += (size_t)n;
    }
}

static void send_message(uint32_t request, const char *what, uint32_t flags, const void *payload, uint32_t size, int fd)
{
    char bytes[HEADER_BYTES + PAYLOAD_MAX];
    uint32_t header[3] = {request, MSG_VERSION | flags, size};
    memcpy(bytes, header, HEADER_BYTES);
    if (size)
        memcpy(bytes + HEADER_BYTES, payload, size);
    struct iovec iov = {bytes, HEADER_BYTES + size};
    union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control = {0};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd >= 0) {
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(c), &fd, sizeof fd);
    }
    ssize_t n = sendmsg(sock, &message, MSG_NOSIGNAL);
    if (n < 0)
        fail("%s cannot be sent: %s", what, errno == EAGAIN ? "the back-end does not read" : strerror(errno));
    if ((size_t)n != iov.iov_len)
        fail("%s was sent in part only", what);
}

/* The reply's payload; exactly ``size`` bytes of it must come. */
static void reply(uint32_t request, const char *what, void *payload, uint32_t size)
{
    uint32_t header[3];
    receive(header, sizeof header, what);
    if (header[0] != request || (header[1] & (3 | MSG_REPLY)) != (MSG_VERSION | MSG_REPLY))
        fail("the answer to %s is request %" PRIu32 " with flags %#" PRIx32, what, header[0], header[1]);
    if (header[2] != size)
        fail("the answer to %s has %" PRIu32 " bytes instead of %" PRIu32, what, header[2], size);
    receive(payload, size, what);
}

#define set(request, payload, size, fd) set_message(request, #request, payload, size, fd)
static void set_message(uint32_t request, const char *what, const void *payload, uint32_t size, int fd)
{
    send_message(request, what, reply_ack ? MSG_NEED_REPLY : 0, payload, size, fd);
    uint64_t refused = 0;
    if (reply_ack)
        reply(request, what, &refused, sizeof refused);
    if (refused)
        fail("the back-end refuses %s (%" PRIu64 ")", what, refused);
}

#define get_u64(request) get_u64_message(request, #request)
static uint64_t get_u64_message(uint32_t request, const char *what)
{
    uint64_t value;
    send_message(request, what, 0, NULL, 0, -1);
    reply(request, what, &value, sizeof value);
    return value;
}

static void connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        fail("the socket's path has more than %zu bytes: %s", sizeof address.sun_path - 1, path);
    strcpy(address.sun_path, path);
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct timeval limit = {(time_t)opt.timeout_s, (suseconds_t)((opt.timeout_s - (double)(time_t)opt.timeout_s) * 1e6)};
    if (sock < 0 || setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit)
        || setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit))
        fail("no socket: %s", strerror(errno));
    if (connect(sock, (struct sockaddr *)&address, sizeof address))
        fail("cannot connect to %s: %s", path, strerror(errno));
}

/* Features, protocol features, number of queues, capacity; returns the disk's bytes, 0 if the back-end has no CONFIG. */
static uint64_t negotiate(void)
{
    const uint64_t needed = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;
    uint64_t offered = get_u64(GET_FEATURES), capacity = 0, protocol = 0;
    if ((offered & needed) != needed)
        fail("the back-end offers features %#" PRIx64 " and not all of VERSION_1, EVENT_IDX, INDIRECT_DESC", offered);
    if (offered & F_RO && (opt.write || opt.verify))
        fail("the disk is read-only");
    if (offered & F_PROTOCOL_FEATURES) {
        protocol = get_u64(GET_PROTOCOL_FEATURES) & (PF_MQ | PF_REPLY_ACK | PF_CONFIG);
        set(SET_PROTOCOL_FEATURES, &protocol, sizeof protocol, -1);
        reply_ack = protocol & PF_REPLY_ACK;
    }
    set(SET_OWNER, NULL, 0, -1);
    uint64_t most = protocol & PF_MQ ? get_u64(GET_QUEUE_NUM) : 1;
    if (opt.queues > most)
        fail("--queues %u, the back-end has %" PRIu64, opt.queues, most);
    if (protocol & PF_CONFIG) {
        struct { uint32_t offset, size, flags; uint8_t region[CONFIG_BYTES]; } config = {.size = CONFIG_BYTES};
        send_message(GET_CONFIG, "GET_CONFIG", 0, &config, sizeof config, -1);
        reply(GET_CONFIG, "GET_CONFIG", &config, sizeof config);
        memcpy(&capacity, config.region, sizeof capacity);
        capacity *= SECTOR;
    }
    uint64_t features = offered & (needed | F_RO | F_FLUSH | F_PROTOCOL_FEATURES | (opt.queues > 1 ? F_BLK_MQ : 0));
    set(SET_FEATURES, &features, sizeof features, -1);
    return capacity;
}

/* -- memory and rings ----------------------------------------------------------------------------------------------------- */

static size_t whole_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }
static uint64_t guest(const void *p) { return (uint64_t)((const char *)p - memory); }
static struct slot *slot_of(const struct queue *q, unsigned i) { return (struct slot *)(q->slots + (size_t)i * SLOT_BYTES); }
static char *data_of(const struct queue *q, unsigned i) { return q->data + (size_t)i * whole_pages(opt.bs); }

static void share_memory(void)
{
    const size_t ring = whole_pages(sizeof(struct desc) * RING) + whole_pages(sizeof(struct avail)) + whole_pages(sizeof(struct used));
    const size_t one = ring + whole_pages((size_t)SLOT_BYTES * opt.iodepth) + whole_pages(opt.bs) * opt.iodepth;
    memory_bytes = one * opt.queues;
    int fd = memfd_create("vhost_load", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)memory_bytes))
        fail("no shared memory of %zu bytes: %s", memory_bytes, strerror(errno));
    memory = mmap(NULL, memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (memory == MAP_FAILED)
        fail("no shared memory of %zu bytes: %s", memory_bytes, strerror(errno));
    memset(memory, 0, memory_bytes);
    struct { uint32_t regions, padding; uint64_t guest, size, user, offset; } table =
        {1, 0, 0, memory_bytes, (uint64_t)(uintptr_t)memory, 0};
    set(SET_MEM_TABLE, &table, sizeof table, fd);
    close(fd);
    char *at = memory;
    for (struct queue *q = queues; q < queues + opt.queues; q++) {
        q->desc = (void *)at, at += whole_pages(sizeof(struct desc) * RING);
        q->avail = (void *)at, at += whole_pages(sizeof(struct avail));
        q->used = (void *)at, at += whole_pages(sizeof(struct used));
        q->slots = at, at += whole_pages((size_t)SLOT_BYTES * opt.iodepth);
        q->data = at, at += whole_pages(opt.bs) * opt.iodepth;
    }
}

static void start_ring(struct queue *q)
{
    const uint32_t number = (uint32_t)(q - queues);
    const uint64_t with_fd = number;
    for (unsigned i = 0; i < opt.iodepth; i++) {
        q->is_free[i] = true;
        q->desc[i] = (struct desc){guest(slot_of(q, i)), sizeof(struct desc) * 3, DESC_INDIRECT, 0};
    }
    q->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    q->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (q->kick < 0 || q->call < 0)
        fail("no eventfd: %s", strerror(errno));
    uint32_t state[2] = {number, RING};
    set(SET_VRING_NUM, state, sizeof state, -1);
    state[1] = 0;
    set(SET_VRING_BASE, state, sizeof state, -1);
    struct { uint32_t index, flags; uint64_t desc, used, avail, log; } place =
        {number, 0, (uint64_t)(uintptr_t)q->desc, (uint64_t)(uintptr_t)q->used, (uint64_t)(uintptr_t)q->avail, 0};
    set(SET_VRING_ADDR, &place, sizeof place, -1);
    set(SET_VRING_CALL, &with_fd, sizeof with_fd, q->call);
    set(SET_VRING_KICK, &with_fd, sizeof with_fd, q->kick);
    state[1] = 1;
    set(SET_VRING_ENABLE, state, sizeof state, -1);
}

static void stop_ring(struct queue *q)
{
    uint32_t state[2] = {(uint32_t)(q - queues), 0};
    set(SET_VRING_ENABLE, state, sizeof state, -1);
    send_message(GET_VRING_BASE, "GET_VRING_BASE", 0, state, sizeof state, -1);
    reply(GET_VRING_BASE, "GET_VRING_BASE", state, sizeof state);
    if (state[0] != (uint32_t)(q - queues) || (uint16_t)state[1] != q->avail_idx)
        fail("ring %u stopped at %u:%u instead of %u", (unsigned)(q - queues), state[0], state[1], q->avail_idx);
    close(q->kick);
    close(q->call);
}

/* -- data ----------------------------------------------------------------------------------------------------------------- */

static uint64_t word_of(uint64_t offset, uint32_t count)
{
    return offset ^ (count + opt.seed) * 0x9e3779b97f4a7c15u;
}

static void fill(char *data, uint64_t offset, uint32_t count)
{
    for (unsigned i = 0; i < opt.bs; i += 8) {
        uint64_t word = word_of(offset + i, count);
        memcpy(data + i, &word, 8);
    }
}

static bool holds(const char *data, uint64_t offset, uint32_t count)
{
    for (unsigned i = 0; i < opt.bs; i += 8) {
        uint64_t word;
        memcpy(&word, data + i, 8);
        if (word != word_of(offset + i, count))
            return false;
    }
    return true;
}

/* -- histogram of latencies: 128 steps an octave, under 1 % --------------------------------------------------------------- */

enum { STEPS = 128, BUCKETS = STEPS * 40 };
static uint64_t histogram[BUCKETS];

static void record(uint64_t ns)
{
    unsigned octave = ns < STEPS ? 0 : 64u - (unsigned)__builtin_clzll(ns) - 7;
    uint64_t bucket = ns < STEPS ? ns : (uint64_t)octave * STEPS + ((ns >> (octave - 1)) - STEPS);
    histogram[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
}

static uint64_t percentile(double share)
{
    uint64_t all = 0, seen = 0;
    for (unsigned i = 0; i < BUCKETS; i++)
        all += histogram[i];
    for (unsigned i = 0; i < BUCKETS; i++)
        if ((seen += histogram[i]) > 0 && (double)seen >= share * (double)all)
            return i < STEPS ? i : (2 * (uint64_t)(STEPS + i % STEPS) + 1) << (i / STEPS - 1) >> 1;
    return 0;
}

/* -- requests ------------------------------------------------------------------------------------------------------------- */

struct job {
    bool write, random, only_written;
    uint64_t most, end_ns;  /* requests; when to start no more */
    uint64_t started;
};

/* The next block, or false if the job has none left. */
static bool choose(struct job *job, uint64_t *block)
{
    for (uint64_t tries = 0; tries <= blocks; tries++) {
        if (job->random) {
            random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
            *block = random_state % blocks;
        } else {
            if (job->only_written && next_block == blocks)
                return false;
            *block = next_block++ % blocks;
        }
        if (!opt.verify || (!busy[*block] && (!job->only_written || written[*block])))
            return true;
    }
    return false;
}

static bool submit(struct queue *q, unsigned i, struct job *job, uint64_t now)
{
    uint64_t block;
    if (job->started >= job->most || now >= job->end_ns || !choose(job, &block))
        return false;
    struct slot *slot = slot_of(q, i);
    char *data = data_of(q, i);
    const uint64_t header = guest(&slot->header), status = guest(&slot->status);
    if (opt.verify) {
        busy[block] = 1;
        if (job->write)
            fill(data, block * opt.bs, written[block] = ++counter);
        else
            memset(data, 0xa5, opt.bs);
    }
    slot->table[0] = (struct desc){header, sizeof slot->header, DESC_NEXT, 1};
    slot->table[1] = (struct desc){guest(data), opt.bs, (uint16_t)(DESC_NEXT | (job->write ? 0 : DESC_WRITE)), 2};
    slot->table[2] = (struct desc){status, 1, DESC_WRITE, 0};
    slot->header = (struct blk_header){job->write ? BLK_T_OUT : BLK_T_IN, 0, block * (opt.bs / SECTOR)};
    slot->status = 0xff;
    q->block[i] = block;
    q->is_write[i] = job->write;
    q->is_free[i] = false;
    q->start_ns[i] = now;
    q->avail->ring[q->avail_idx % RING] = (uint16_t)i;
    atomic_store_explicit(&q->avail->idx, ++q->avail_idx, memory_order_release);
    q->in_flight++;
    job->started++;
    return true;
}

static bool need_event(uint16_t event, uint16_t new, uint16_t old) { return (uint16_t)(new - event - 1) < (uint16_t)(new - old); }

static void kick_if_wanted(struct queue *q)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (need_event(atomic_load_explicit(&q->used->avail_event, memory_order_relaxed), q->avail_idx, q->kicked_idx)) {
        const uint64_t one = 1;
        if (write(q->kick, &one, sizeof one) != sizeof one)
            fail("the kick eventfd cannot be written: %s", strerror(errno));
        kicks++;
    }
    q->kicked_idx = q->avail_idx;
}

static void end(struct queue *q, struct used_elem element)
{
    if (element.id >= opt.iodepth || q->is_free[element.id])
        fail("ring %u gave back buffer %" PRIu32 ", which it did not have", (unsigned)(q - queues), element.id);
    const unsigned i = element.id;
    const uint64_t block = q->block[i];
    q->is_free[i] = true;
    q->in_flight--;
    done++;
    if (slot_of(q, i)->status || (!q->is_write[i] && element.len < opt.bs))
        errors++;
    else if (opt.verify && !q->is_write[i] && !holds(data_of(q, i), block * opt.bs, written[block]))
        mismatches++;
    if (opt.verify)
        busy[block] = 0;
}

/* Take everything that is used and put the job's next requests in its place; false if there was nothing. */
static bool harvest(struct queue *q, struct job *job, bool measured)
{
    uint16_t used_idx = atomic_load_explicit(&q->used->idx, memory_order_acquire);
    if (used_idx == q->last_used_idx)
        return false;
    if ((uint16_t)(used_idx - q->last_used_idx) > q->in_flight)
        fail("ring %u has used.idx %u after %u with %u requests in flight", (unsigned)(q - queues), used_idx, q->last_used_idx, q->in_flight);
    const uint64_t now = progress_ns = now_ns();
    const uint16_t before = q->avail_idx;
    while (q->last_used_idx != used_idx) {
        const struct used_elem element = q->used->ring[q->last_used_idx++ % RING];
        end(q, element);
        if (measured)
            record(now - q->start_ns[element.id]);
        submit(q, element.id, job, now);
    }
    if (opt.poll)  /* far from any index that will come: no calls */
        atomic_store_explicit(&q->avail->used_event, (uint16_t)(used_idx + 0x8000), memory_order_relaxed);
    if (before != q->avail_idx)
        kick_if_wanted(q);
    return true;
}

static void check_progress(void)
{
    unsigned left = 0;
    if (now_ns() - progress_ns < timeout_ns)
        return;
    for (unsigned i = 0; i < opt.queues; i++)
        left += queues[i].in_flight;
    fail("the back-end hangs: requests in flight %u, none came back for %g s", left, opt.timeout_s);
}

/* A back-end that is gone never uses anything: the socket says so at once. */
static void look_at_socket(short events)
{
    char byte;
    if (events & (POLLHUP | POLLERR) || (events & POLLIN && recv(sock, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0))
        fail("the back-end ended the connection while its rings run");
    if (events & POLLIN)
        fail("the back-end sent a message that nobody asked for");
}

/* Calls on, look once more, sleep until one comes. */
static void wait_for_call(struct job *job, bool measured)
{
    bool found = false;
    for (struct queue *q = queues; q < queues + opt.queues; q++) {
        atomic_store_explicit(&q->avail->used_event, q->last_used_idx, memory_order_relaxed);
        atomic_thread_fence(memory_order_seq_cst);
        found |= harvest(q, job, measured);
    }
    if (found)
        return;
    struct pollfd fds[QUEUES_MAX + 1] = {{.fd = sock, .events = POLLIN}};
    for (unsigned i = 0; i < opt.queues; i++)
        fds[i + 1] = (struct pollfd){.fd = queues[i].call, .events = POLLIN};
    int n = poll(fds, opt.queues + 1, (int)(opt.timeout_s * 1000) + 1);
    if (n < 0 && errno != EINTR)
        fail("poll: %s", strerror(errno));
    check_progress();
    for (unsigned i = 0; n > 0 && i < opt.queues; i++) {
        uint64_t count;
        if (fds[i + 1].revents && read(queues[i].call, &count, sizeof count) == sizeof count) {
            calls++;
            atomic_store_explicit(&queues[i].avail->used_event, 0, memory_order_relaxed);  /* off, as virtqueue_disable_cb() does */
        }
    }
    if (n > 0 && fds[0].revents)
        look_at_socket(fds[0].revents);
}

static void spin(struct job *job, bool measured)
{
    for (unsigned turn = 0;; turn++) {
        bool found = false;
        for (struct queue *q = queues; q < queues + opt.queues; q++)
            found |= q->in_flight && harvest(q, job, measured);
        if (found)
            return;
        relax();
        if (turn % 65536 == 65535) {
            struct pollfd one = {.fd = sock, .events = POLLIN};
            check_progress();
            if (poll(&one, 1, 0) > 0)
                look_at_socket(one.revents);
        }
    }
}

/* Run one job until nothing of it is in flight; returns its seconds. */
static double run(struct job job, bool measured)
{
    const uint64_t start = progress_ns = now_ns();
    bool active = true;
    if (job.end_ns != UINT64_MAX)
        job.end_ns += start;
    next_block = 0;
    for (struct queue *q = queues; q < queues + opt.queues; q++) {
        atomic_store_explicit(&q->avail->used_event, (uint16_t)(q->last_used_idx + (opt.poll ? 0x8000 : 0)), memory_order_relaxed);
        for (unsigned i = 0; i < opt.iodepth; i++)
            submit(q, i, &job, now_ns());
        kick_if_wanted(q);
    }
    while (active) {
        active = false;
        for (struct queue *q = queues; q < queues + opt.queues; q++) {
            if (!opt.poll)
                while (harvest(q, &job, measured))
                    ;
            active |= q->in_flight > 0;
        }
        if (active && opt.poll)
            spin(&job, measured);
        else if (active)
            wait_for_call(&job, measured);
    }
    return (double)(now_ns() - start) / 1e9;
}

/* -- the command line ------------------------------------------------------------------------------------------------------ */

static const char usage[] =
    "usage: vhost_load SOCKET [--rw randread|randwrite|read|write] [--bs BYTES] [--iodepth N] [--queues N]\n"
    "                  [--seconds S | --ios N] [--size BYTES] [--seed N] [--poll] [--verify] [--stay] [--timeout S]\n"
    "\n"
    "  --iodepth N   requests in flight in each queue, up to 128 (default 32)\n"
    "  --queues N    virtqueues (default 1)\n"
    "  --seconds S   how long (default 5); --ios N: how many requests instead\n"
    "  --size BYTES  use that much from the disk's beginning (default: all of it)\n"
    "  --poll        look at the used ring without a pause, calls off; default: the call eventfd\n"
    "  --verify      writes carry a pattern of offset and counter.  A job that writes then reads all it wrote; a job that reads\n"
    "                first writes all of --size.  What was on the disk is lost\n"
    "  --stay        stay connected after the job until standard input ends\n"
    "  --timeout S   a back-end that does nothing for so long hangs (default 10)\n";

static uint64_t number(const char *name, const char *text, uint64_t least, uint64_t most)
{
    char *rest;
    errno = 0;
    uint64_t value = strtoull(text, &rest, 0);
    if (errno || *rest || rest == text || *text == '-' || value < least || value > most)
        fail("%s %s: give a whole number from %" PRIu64 " to %" PRIu64, name, text, least, most);
    return value;
}

static double positive(const char *name, const char *text)
{
    char *rest;
    double value = strtod(text, &rest);
    if (*rest || rest == text || !(value > 0 && value < 1e6))
        fail("%s %s: give seconds, more than 0", name, text);
    return value;
}

static void parse(int count, char **arguments)
{
    for (int i = 1; i < count; i++) {
        const char *name = arguments[i], *value = i + 1 < count ? arguments[i + 1] : NULL;
        if (!strcmp(name, "--help")) {
            fputs(usage, stdout);
            exit(0);
        }
        if (strncmp(name, "--", 2)) {
            if (opt.socket)
                fail("%s: there is a socket already; --help says how", name);
            opt.socket = name;
            continue;
        }
        if (!strcmp(name, "--poll")) {
            opt.poll = true;
            continue;
        }
        if (!strcmp(name, "--stay")) {
            opt.stay = true;
            continue;
        }
        if (!strcmp(name, "--verify")) {
            opt.verify = true;
            continue;
        }
        if (!value)
            fail("%s: unknown or without its value; --help says how", name);
        i++;
        if (!strcmp(name, "--rw")) {
            opt.rw = value;
            opt.random = !strncmp(value, "rand", 4);
            const char *what = opt.random ? value + 4 : value;
            opt.write = !strcmp(what, "write");
            if (!opt.write && strcmp(what, "read"))
                fail("--rw %s: choose randread, randwrite, read or write", value);
        } else if (!strcmp(name, "--bs"))
            opt.bs = (unsigned)number(name, value, SECTOR, 16u << 20);
        else if (!strcmp(name, "--iodepth"))
            opt.iodepth = (unsigned)number(name, value, 1, RING);
        else if (!strcmp(name, "--queues"))
            opt.queues = (unsigned)number(name, value, 1, QUEUES_MAX);
        else if (!strcmp(name, "--ios"))
            opt.ios = number(name, value, 1, UINT64_MAX - 1);
        else if (!strcmp(name, "--size"))
            opt.size = number(name, value, SECTOR, INT64_MAX);
        else if (!strcmp(name, "--seed"))
            opt.seed = number(name, value, 0, UINT64_MAX);
        else if (!strcmp(name, "--seconds"))
            opt.seconds = positive(name, value);
        else if (!strcmp(name, "--timeout"))
            opt.timeout_s = positive(name, value);
        else
            fail("%s: unknown; --help says how", name);
    }
    if (!opt.socket)
        fail("which socket? --help says how");
    if (opt.bs % SECTOR)
        fail("--bs %u: not whole sectors of %d bytes", opt.bs, SECTOR);
    if (opt.seconds > 0 && opt.ios)
        fail("--seconds and --ios: give one of them");
    if (!opt.ios && opt.seconds <= 0)
        opt.seconds = 5;
}

static void prepare(uint64_t capacity)
{
    if (!capacity && !opt.size)
        fail("the back-end tells no capacity (no CONFIG): give --size");
    if (capacity && opt.size > capacity)
        fail("--size %" PRIu64 ": the disk has %" PRIu64 " bytes", opt.size, capacity);
    blocks = (opt.size ? opt.size : capacity) / opt.bs;
    if (!blocks)
        fail("--bs %u: no block of that size fits the disk", opt.bs);
    if (opt.verify && blocks < (uint64_t)opt.iodepth * opt.queues)
        fail("--verify needs a block for each of %u requests, there are %" PRIu64, opt.iodepth * opt.queues, blocks);
    if (opt.verify && (!(written = calloc(blocks, sizeof *written)) || !(busy = calloc(blocks, 1))))
        fail("no memory to remember %" PRIu64 " blocks", blocks);
    random_state = (opt.seed + 1) * 0x9e3779b97f4a7c15u | 1;
    timeout_ns = (uint64_t)(opt.timeout_s * 1e9);
}

static void print_result(uint64_t ios, double seconds, uint64_t job_kicks, uint64_t job_calls)
{
    printf("{\"rw\": \"%s\", \"bs\": %u, \"iodepth\": %u, \"queues\": %u, \"poll\": %s, \"verify\": %s, \"seed\": %" PRIu64 ", ", opt.rw,
           opt.bs, opt.iodepth, opt.queues, opt.poll ? "true" : "false", opt.verify ? "true" : "false", opt.seed);
    printf("\"ios\": %" PRIu64 ", \"seconds\": %.6f, \"iops\": %.1f, \"mb_s\": %.3f, ", ios, seconds, (double)ios / seconds,
           (double)ios * opt.bs / seconds / 1e6);
    printf("\"p50_ns\": %" PRIu64 ", \"p95_ns\": %" PRIu64 ", \"p99_ns\": %" PRIu64 ", ", percentile(.5), percentile(.95), percentile(.99));
    printf("\"kicks\": %" PRIu64 ", \"calls\": %" PRIu64 ", \"errors\": %" PRIu64 ", \"mismatches\": %" PRIu64 "}\n", job_kicks, job_calls,
           errors, mismatches);
    fflush(stdout);
}

/* A guest that does nothing: connected, rings running, until standard input ends. */
static void stay(void)
{
    struct pollfd fds[2] = {{.fd = sock, .events = POLLIN}, {.fd = STDIN_FILENO, .events = POLLIN}};
    char bytes[64];
    for (;;) {
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            fail("poll: %s", strerror(errno));
        if (fds[0].revents)
            look_at_socket(fds[0].revents);
        if (fds[1].revents && read(STDIN_FILENO, bytes, sizeof bytes) <= 0)
            return;
    }
}

int main(int count, char **arguments)
{
    parse(count, arguments);
    connect_to(opt.socket);
    prepare(negotiate());
    share_memory();
    for (unsigned i = 0; i < opt.queues; i++)
        start_ring(&queues[i]);
    if (opt.verify && !opt.write)
        run((struct job){.write = true, .most = blocks, .end_ns = UINT64_MAX}, false);
    const struct job job = {
        .write = opt.write,
        .random = opt.random,
        .most = opt.ios ? opt.ios : UINT64_MAX,
        .end_ns = opt.ios ? UINT64_MAX : (uint64_t)(opt.seconds * 1e9),
    };
    kicks = calls = done = 0;
    const double seconds = run(job, true);
    const uint64_t ios = done, job_kicks = kicks, job_calls = calls;
    if (opt.verify && opt.write)
        run((struct job){.only_written = true, .most = UINT64_MAX, .end_ns = UINT64_MAX}, false);
    if (opt.stay) {
        print_result(ios, seconds, job_kicks, job_calls);
        stay();
    }
    for (unsigned i = 0; i < opt.queues; i++)
        stop_ring(&queues[i]);
    close(sock);
    if (!opt.stay)
        print_result(ios, seconds, job_kicks, job_calls);
    return errors || mismatches ? 1 : 0;
}
