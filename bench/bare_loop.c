/* The bare guest of bench_bare.py with everything else in C: a virtio-blk device in RAM, and the exits of the vCPU.
 * bare_loop IMAGE START DESC AVAIL USED SIZE GPA=FILE...: IMAGE is payload.image(), START the bare payload's first instruction, then the
 * ring; each FILE is mapped, shared, as guest memory at GPA (the first holds ring and buffers), so the guest's stamps stay in it. */
#include "kvm_vm.h"

#define DISK (1 << 20)
#define GSI 5
static int kick, call;
static uint8_t *memory, disk[DISK];
static uint32_t desc, avail, used, size;
static volatile uint32_t *words, acked;
struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };

static int need_event(uint16_t event, uint16_t new, uint16_t old) {
    return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

static uint32_t serve(uint16_t head) {
    struct desc *d = (struct desc *)(memory + desc) + head;
    struct desc *at = d->flags & 4 ? (struct desc *)(memory + d->addr) : d, *table = d->flags & 4 ? at : (struct desc *)(memory + desc);
    uint32_t *header = (uint32_t *)(memory + at->addr);
    uint64_t byte = *(uint64_t *)(header + 2) << 9;
    struct desc *data = &table[at->next], *status = data->flags & 1 ? &table[data->next] : data;
    uint32_t length = data == status ? 0 : data->len;
    uint8_t good = byte + length <= DISK;
    if (length && good && header[0]) memcpy(disk + byte, memory + data->addr, length);
    if (length && good && !header[0]) memcpy(memory + data->addr, disk + byte, length);
    memory[status->addr] = !good;
    return header[0] ? 1 : length + 1;
}

static void *device(void *unused) {
    volatile uint16_t *a = (uint16_t *)(memory + avail), *u = (uint16_t *)(memory + used);
    uint16_t last = 0, done = 0, told = 0;
    uint64_t count;
    while (read(kick, &count, 8) == 8 && count < 1000000) {
        do {
            while (last != a[1]) {
                uint16_t head = a[2 + (last++ & (size - 1))];
                uint32_t *element = (uint32_t *)(memory + used + 4) + 2 * (done++ & (size - 1));
                element[1] = serve(head);
                element[0] = head;
                __atomic_thread_fence(__ATOMIC_SEQ_CST);
                u[1] = done;
                __atomic_thread_fence(__ATOMIC_SEQ_CST);
                if (need_event(a[2 + size], done, told)) {
                    words[0]++;
                    eventfd_write(call, 1);
                }
                told = done;
            }
            u[2 + 4 * size] = last; /* avail_event: a kick for the next one */
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
        } while (last != a[1]);
    }
    return unused;
}

int main(int argc, char **argv) {
    if (argc < 8) return 1;
    uint32_t start = strtoul(argv[2], 0, 0);
    desc = strtoul(argv[3], 0, 0); avail = strtoul(argv[4], 0, 0); used = strtoul(argv[5], 0, 0); size = strtoul(argv[6], 0, 0);
    make_vm(argv[1]);
    words = mail + 0x400;
    for (int i = 7; i < argc; i++) {
        char *path;
        uint32_t gpa = strtoul(argv[i], &path, 0);
        int file = open(path + 1, O_RDWR);
        struct stat about;
        need(file, path + 1);
        need(fstat(file, &about), "fstat");
        void *at = mmap(0, about.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (i == 7) memory = at;
        give(gpa, at, about.st_size);
    }
    op(STORE4, 0xFEC00000, 0x10 + 2 * GSI, 1); op(STORE4, 0xFEC00010, 0x30, 1);
    op(STORE4, 0xFEC00000, 0x11 + 2 * GSI, 1); op(STORE4, 0xFEC00010, 0, 1);
    kick = eventfd(0, 0); call = eventfd(0, 0);
    on_bell(kick);
    on_call(call, (struct kvm_irq_routing_entry){.gsi = GSI, .type = KVM_IRQ_ROUTING_IRQCHIP, .u.irqchip = {2, GSI}});
    pthread_t thread;
    pthread_create(&thread, 0, device, 0);
    stand_at(start, start + 0x1000);
    for (;;) {
        need(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
        if (run->exit_reason == KVM_EXIT_IO && run->io.port == 0x10) break;
        if (run->exit_reason != KVM_EXIT_MMIO) { fprintf(stderr, "exit %u\n", run->exit_reason); return 2; }
        if (!run->mmio.is_write) {
            uint32_t raised = words[0], pending = raised != acked;
            memcpy(run->mmio.data, &pending, 4);
            acked = raised;
        }
    }
    eventfd_write(kick, 1000000);
    pthread_join(thread, 0);
    return 0;
}
