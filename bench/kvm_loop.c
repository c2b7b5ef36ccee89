/* The loops of bench_kvm.py in C: the same payload, the same ops, nothing else.
 * kvm_loop IMAGE COUNT: IMAGE is payload.image(); prints two lines, ns of each round trip's median: doorbell exit, ioeventfd + irqfd. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define BASE 0xE0000000u
#define SLOT 0x4000u
#define BELL 0xE0100050u
enum { OP, ADDR, VALUE, RESULT, RUNG, TELL };
enum { HLT = 0, STORE4 = 7, RING4 = 9 };

static int vm, vcpu, kick, call;
static volatile uint32_t *mail;
static struct kvm_run *run;

static void need(int answer, const char *what) {
    if (answer < 0) { perror(what); exit(1); }
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void op(uint32_t number, uint32_t addr, uint32_t value, uint32_t tell) {
    mail[ADDR] = addr; mail[VALUE] = value; mail[TELL] = tell; mail[OP] = number;
    need(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
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
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), image = open(argv[1], O_RDONLY), count = atoi(argv[2]);
    (void)argc;
    need(kvm, "/dev/kvm");
    need(vm = ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    need(ioctl(vm, KVM_SET_TSS_ADDR, 0xFFFBD000), "KVM_SET_TSS_ADDR");
    need(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    uint8_t *slot = mmap(0, SLOT + 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    need(read(image, slot, SLOT) - (int)SLOT, "the image");
    mail = (uint32_t *)(slot + 0x3000);
    struct kvm_userspace_memory_region region = {0, 0, BASE, SLOT + 4096, (uintptr_t)slot};
    need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    need(vcpu = ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    run = mmap(0, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);

    struct kvm_sregs sregs;
    need(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    struct kvm_segment code = {.limit = 0xFFFFFFFF, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1}, data = code;
    data.selector = 16; data.type = 3;
    sregs.cs = code; sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.idt.base = BASE + 0x1000; sregs.idt.limit = 0x7FF;
    sregs.gdt.base = BASE + 0x1800; sregs.gdt.limit = 23;
    sregs.cr0 |= 1;
    need(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    struct kvm_regs regs = {.rip = BASE, .rsp = BASE + 0x3000, .rflags = 2};
    need(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
    op(STORE4, 0xFEE000F0, 0x1FF, 1);

    uint64_t *times = calloc(count, sizeof *times);
    for (int i = 0; i < count; i++) {
        uint64_t start = now();
        op(RING4, BELL, 0, 0);
        if (run->exit_reason != KVM_EXIT_MMIO || run->mmio.phys_addr != BELL) return 2;
        times[i] = now() - start;
    }
    printf("%llu\n", (unsigned long long)median(times, count));

    kick = eventfd(0, 0); call = eventfd(0, 0);
    struct kvm_ioeventfd bell = {.addr = BELL, .len = 4, .fd = kick, .flags = KVM_IOEVENTFD_FLAG_DATAMATCH};
    need(ioctl(vm, KVM_IOEVENTFD, &bell), "KVM_IOEVENTFD");
    struct { struct kvm_irq_routing head; struct kvm_irq_routing_entry entry; } route = {
        {1, 0}, {.gsi = 24, .type = KVM_IRQ_ROUTING_MSI, .u.msi = {.address_lo = 0xFEE00000, .data = strtoul(argv[3], 0, 0)}}};
    need(ioctl(vm, KVM_SET_GSI_ROUTING, &route), "KVM_SET_GSI_ROUTING");
    struct kvm_irqfd irq = {.fd = call, .gsi = 24};
    need(ioctl(vm, KVM_IRQFD, &irq), "KVM_IRQFD");
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
