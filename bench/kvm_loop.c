/* The loops of bench_kvm.py in C: the same payload, the same ops, nothing else.
 * kvm_loop IMAGE COUNT VECTOR: IMAGE is payload.image(); prints two lines, ns of each round trip's median: doorbell exit, ioeventfd + irqfd. */
#include "kvm_vm.h"

static int kick, call;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void *device(void *unused) {
    uint64_t count;
    while (read(kick, &count, 8) == 8 && count < 1000000)
        if (eventfd_write(call, 1)) break;
    return unused;
}

static int by_size(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static uint64_t median(uint64_t *times, int count) {
    qsort(times, count, sizeof *times, by_size);
    return times[count / 2];
}

int main(int argc, char **argv) {
    if (argc != 4) return 1;
    int count = atoi(argv[2]);
    make_vm(argv[1]);
    uint64_t *times = calloc(count, sizeof *times);
    for (int i = 0; i < count; i++) {
        uint64_t start = now();
        op(RING4, BELL, 0, 0);
        if (run->exit_reason != KVM_EXIT_MMIO || run->mmio.phys_addr != BELL) return 2;
        times[i] = now() - start;
    }
    printf("%llu\n", (unsigned long long)median(times, count));

    kick = eventfd(0, 0); call = eventfd(0, 0);
    on_bell(kick);
    uint32_t vector = strtoul(argv[3], 0, 0);
    on_call(call, (struct kvm_irq_routing_entry){
        .gsi = 24, .type = KVM_IRQ_ROUTING_MSI, .u.msi = {.address_lo = 0xFEE00000, .data = vector}});
    pthread_t thread;
    pthread_create(&thread, 0, device, 0);
    for (int i = 0; i < count; i++) {
        uint64_t start = now();
        op(RING4, BELL, 0, 1);
        op(HLT, 0, 0, 0);
        if (run->exit_reason != KVM_EXIT_IO || run->io.port != 0x11) return 3;
        times[i] = now() - start;
    }
    printf("%llu\n", (unsigned long long)median(times, count));
    eventfd_write(kick, 1000000);
    pthread_join(thread, 0);
    return 0;
}
