/* A VM with one vCPU that runs the payload of vblklab/kvm/payload.py: what the loops in C have in common. */
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
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define BASE 0xE0000000u
#define SLOT 0x4000u
#define BELL 0xE0100050u
enum { OP, ADDR, VALUE, RESULT, RUNG, TELL };
enum { HLT = 0, STORE4 = 7, RING4 = 9 };

static int vm, vcpu, slots;
static volatile uint32_t *mail;
static struct kvm_run *run;

static void need(int answer, const char *what) {
    if (answer < 0) { perror(what); exit(1); }
}

static void op(uint32_t number, uint32_t addr, uint32_t value, uint32_t tell) {
    mail[ADDR] = addr; mail[VALUE] = value; mail[TELL] = tell; mail[OP] = number;
    need(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
}

static void give(uint32_t gpa, void *at, uint64_t bytes) {
    struct kvm_userspace_memory_region region = {slots++, 0, gpa, bytes, (uintptr_t)at};
    need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
}

static void stand_at(uint32_t rip, uint32_t idt) {
    struct kvm_sregs sregs;
    need(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    struct kvm_segment code = {.limit = 0xFFFFFFFF, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1}, data = code;
    data.selector = 16; data.type = 3;
    sregs.cs = code; sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.idt.base = idt; sregs.idt.limit = 0x7FF;
    sregs.gdt.base = BASE + 0x1800; sregs.gdt.limit = 23;
    sregs.cr0 |= 1;
    need(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    struct kvm_regs regs = {.rip = rip, .rsp = BASE + 0x3000, .rflags = 2};
    need(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void make_vm(const char *image_path) {
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), image = open(image_path, O_RDONLY);
    need(kvm, "/dev/kvm");
    need(vm = ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    need(ioctl(vm, KVM_SET_TSS_ADDR, 0xFFFBD000), "KVM_SET_TSS_ADDR");
    need(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    uint8_t *slot = mmap(0, SLOT + 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    need(read(image, slot, SLOT) - (int)SLOT, "the image");
    mail = (uint32_t *)(slot + 0x3000);
    give(BASE, slot, SLOT + 4096);
    need(vcpu = ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    run = mmap(0, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    stand_at(BASE, BASE + 0x1000);
    op(STORE4, 0xFEE000F0, 0x1FF, 1);
}

static void on_bell(int kick) {
    struct kvm_ioeventfd bell = {.addr = BELL, .len = 4, .fd = kick, .flags = KVM_IOEVENTFD_FLAG_DATAMATCH};
    need(ioctl(vm, KVM_IOEVENTFD, &bell), "KVM_IOEVENTFD");
}

static void on_call(int call, struct kvm_irq_routing_entry entry) {
    struct { struct kvm_irq_routing head; struct kvm_irq_routing_entry entry; } route = {{1, 0}, entry};
    need(ioctl(vm, KVM_SET_GSI_ROUTING, &route), "KVM_SET_GSI_ROUTING");
    struct kvm_irqfd irq = {.fd = call, .gsi = entry.gsi};
    need(ioctl(vm, KVM_IRQFD, &irq), "KVM_IRQFD");
}
